"""A write that fails at any call that changes the disk leaves the old or the new folder, never a mixture."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyruntime.errors import RunError
from tests.checkpoint.writer.faults import MANY, Case, Faults, broken, contents, full, injected


def attempt(case: Case, out: Path) -> RunError | None:
    try:
        case.write(out, 1)
    except RunError as error:
        return error
    return None


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for ever"])
def test_a_call_that_fails_leaves_old_or_new(case: Case, forever: bool, tmp_path: Path) -> None:
    num_failed = 0
    for at in range(1, MANY):
        out = case.start(tmp_path / str(at))
        with injected(Faults(at, full if at % 2 else broken, forever)) as faults:
            error = attempt(case, out)
        if not faults.fired:
            break
        if error is not None:
            num_failed += 1
            assert (error.code, error.exit_code) == ("IO", 5)
            # be it under another name, what was there is still there
            folders = [contents(path) for path in out.parent.iterdir()]
            assert case.before is None or case.versions[0] in folders
            left = [name for name in os.listdir(out.parent) if name.endswith(("-tmp", "-old"))]
            assert all(name in str(error) for name in left)
            # a disk that works again lets nothing lie about
            assert forever or not left
        # a disk that refuses everything also refuses to put back what the first of two steps took
        case.check(out, error is None, recoverable=forever)
    assert error is None and contents(out) == case.versions[1]
    assert num_failed > 20
