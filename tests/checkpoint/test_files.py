"""What is said where the system or a link stands in the way of a file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pyruntime.checkpoint.files import io_error
from pyruntime.checkpoint.strict_json import read_object
from pyruntime.errors import CheckpointError


def test_a_link_to_nothing_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("../../blobs/gone")
    with pytest.raises(CheckpointError, match=r"config\.json: is a link to nothing") as caught:
        read_object(tmp_path / "config.json", "CONFIG")
    assert caught.value.code == "CONFIG"


@pytest.mark.parametrize(
    "number, advice",
    {
        errno.EMFILE: "ulimit -n",
        errno.ENFILE: "open files",
        errno.ENOSPC: "see to the disk",
        errno.EIO: "see to the disk",
        errno.EACCES: "see to the permissions",
        errno.EPERM: "see to the permissions",
    }.items(),
)
def test_an_error_of_the_system_says_what_to_see_to(number: int, advice: str) -> None:
    text = str(io_error("cannot read x", OSError(number, os.strerror(number))))
    assert errno.errorcode[number] in text and advice in text
    assert not ("disk" in text and "permissions" in text)
