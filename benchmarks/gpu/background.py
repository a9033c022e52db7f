"""Programs that run beside this one."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]


@dataclass(slots=True)
class Background:
    """A program and the file with all that it says."""

    process: subprocess.Popen[bytes]
    log: Path

    @staticmethod
    def start(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Background:
        """Start it from the root of the checkout, in a group of its own."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        return Background(process, log)

    def wait(self, seconds: float) -> int | None:
        """Its exit code, or None where it had to be stopped."""
        try:
            return self.process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return None

    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")
