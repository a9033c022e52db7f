"""What can go wrong, as three exception classes, and the exit code of each."""

from __future__ import annotations

from typing import Final

EXIT_BUG: Final = 70
# a message may quote a value of a hostile file
_MAX_MESSAGE: Final = 2000
_RUN_EXIT_CODES: Final = {"NUMERICS": 4, "MERGE_ILL_CONDITIONED": 4, "IO": 5, "LOCKED": 6, "MEMORY": 7}


class PyruntimeError(Exception):
    """Base of every error this package raises on purpose.

    `code` is a short upper-case name that programs may match (`"OFFSETS"`); the message says what was found, what was
    expected and what to do, in one line.
    """

    def __init__(self, code: str, message: str) -> None:
        shown = message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + "..."
        # what a terminal would obey, and half a character that no encoding takes, must not come out as it went in
        super().__init__("".join(each if each.isprintable() else ascii(each)[1:-1] for each in shown))
        self.code = code

    @property
    def exit_code(self) -> int:
        """Exit status of a command that ends with this error."""
        return EXIT_BUG

    def one_line(self) -> str:
        """Text that a command prints: `error[CODE]: message`."""
        return f"error[{self.code}]: {' '.join(str(self).split())}"


class UsageError(PyruntimeError):
    """A caller or a configuration asked for something impossible (exit 2)."""

    @property
    def exit_code(self) -> int:
        return 2


class CheckpointError(PyruntimeError):
    """The files of a checkpoint are not what they claim to be (exit 3)."""

    @property
    def exit_code(self) -> int:
        return 3


class RunError(PyruntimeError):
    """The machine or the numbers failed.

    NUMERICS, MERGE_ILL_CONDITIONED (exit 4), IO (5), LOCKED (6), MEMORY (7), anything else 70.
    """

    @property
    def exit_code(self) -> int:
        return _RUN_EXIT_CODES.get(self.code, EXIT_BUG)
