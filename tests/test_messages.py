"""What a message quotes of a hostile file comes out harmless."""

from __future__ import annotations

import pytest

from pyruntime.errors import CheckpointError


@pytest.mark.parametrize(
    "hostile", ["\x1b[2J", "\n", "\r", "\x00", "\x85", "\u2028", "\u202e", "\udcff", "\x7f"], ids=ascii
)
def test_messages_are_one_printable_line(hostile: str) -> None:
    error = CheckpointError("CONFIG", f"the key is {hostile}, which is no key")
    assert str(error).isprintable()
    assert ascii(hostile)[1:-1] in str(error)
    str(error).encode("utf-8")
    assert error.one_line().startswith("error[CONFIG]: the key is ")


def test_printable_messages_stay_as_they_are() -> None:
    text = "größer als 3 °C, naïve, 漢字"
    assert str(CheckpointError("CONFIG", text)) == text
