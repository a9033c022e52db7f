"""A write that is killed at any call that changes the disk leaves the old or the new folder, never a mixture."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.checkpoint.writer.faults import KILLED, MANY, Case, Faults, contents, in_child, injected, killed


def killed_at(case: Case, out: Path, at: int) -> int:
    with injected(Faults(at, killed)):
        case.write(out, 1)
    return 0


def test_a_kill_at_any_call_leaves_old_or_new(case: Case, tmp_path: Path) -> None:
    for at in range(1, MANY):
        out = case.start(tmp_path / str(at))
        status = in_child(partial(killed_at, case, out, at))()
        if status == 0:
            break
        assert status == KILLED
        case.check(out, finished=False, recoverable=True)
    assert contents(out) == case.versions[1]
    assert at > 20
