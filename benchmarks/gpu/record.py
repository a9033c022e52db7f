"""The result file of a run, written anew after every row, and the clock that its sections look at."""

from __future__ import annotations

import itertools
import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.atomic import make_folder, write_text
from pyruntime.errors import RunError

# how a section ended
DONE: Final = "done"
CUT: Final = "cut"
FAILED: Final = "failed"
WRONG: Final = "wrong"
# what is cut where a section did not begin
EVERYTHING: Final = "everything"


class Deadline:
    """`seconds` from now on, told by `now` (time.monotonic)."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._now = now
        self._begin = now()

    def elapsed(self) -> float:
        """Seconds since it was made."""
        return self._now() - self._begin

    def left(self, share: float = 1.0) -> float:
        """Seconds until `share` of all the time is over; negative behind it."""
        return share * self.seconds - self.elapsed()


class Section:
    """One part of a run: facts by name, rows, and the names of what its time did not allow."""

    def __init__(self, name: str, share: float, deadline: Deadline, flush: Callable[[], None]) -> None:
        self.name = name
        self.data: dict[str, Any] = {"status": "running", "rows": [], "cut": []}
        self._share = share
        self._deadline = deadline
        self._flush = flush
        self._longest = 0.0
        self._begun: float | None = None

    def left(self) -> float:
        """Seconds that the section may still take."""
        return self._deadline.left(self._share)

    def fits(self, name: str) -> bool:
        """Whether there is time for one more part as long as the longest so far; if not, `name` is noted as cut."""
        now = self._deadline.elapsed()
        if self._begun is not None:
            self._longest = max(self._longest, now - self._begun)
        self._begun = now
        if self.left() > self._longest:
            return True
        self.data["cut"].append(name)
        return False

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row and write the file."""
        self.data["rows"].append(dict(row))
        self._flush()

    def say(self, **facts: Any) -> None:
        """Set facts and write the file."""
        self.data.update(facts)
        self._flush()


class Record:
    """The result file. `correct` is None until the checks have passed, and False once one has failed."""

    def __init__(self, folder: Path, stem: str, about: Mapping[str, Any], deadline: Deadline) -> None:
        make_folder(folder)
        names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
        self.path = next(path for each in names if not (path := folder / f"{each}.json").exists())
        self.data: dict[str, Any] = {**about, "correct": None, "sections": {}}
        self.deadline = deadline
        self.flush()

    def flush(self) -> None:
        """Write all there is."""
        self.data["seconds"] = round(self.deadline.elapsed(), 1)
        write_text(self.path, json.dumps(self.data, indent=1) + "\n")

    def section(self, name: str, share: float, run: Callable[[Section], None]) -> str:
        """Run a section until it ends, and say how it did.

        Whatever goes wrong in it is recorded; a wrong result (RunError NUMERICS) makes the run incorrect.
        """
        section = Section(name, share, self.deadline, self.flush)
        self.data["sections"][name] = section.data
        if section.left() <= 0:
            section.say(status=CUT, cut=[EVERYTHING])
            return CUT
        begin = self.deadline.elapsed()
        try:
            run(section)
            status = CUT if section.data["cut"] else DONE
        except RunError as error:
            status = WRONG if error.code == "NUMERICS" else FAILED
            section.data["error"] = error.one_line()
        # a kernel that cannot be launched, memory that is full: the sections behind it may still run
        except Exception as error:
            status = FAILED
            section.data["error"] = f"{type(error).__name__}: {error}"
            section.data["traceback"] = traceback.format_exc().splitlines()[-12:]
        if status == WRONG:
            self.data["correct"] = False
        section.say(status=status, seconds=round(self.deadline.elapsed() - begin, 2))
        return status
