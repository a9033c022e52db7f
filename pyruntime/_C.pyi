from collections.abc import Sequence
from typing import Any

def isa_detected() -> str: ...
def isa_available() -> list[str]: ...
def num_threads() -> int: ...
def start_team(num_threads: int) -> int: ...
def cgroup_cpus(membership: str, mount: str) -> int: ...

class Program:
    def __init__(
        self, *, isa: str, num_threads: int, vocab_size: int, num_slots: int, widths: Sequence[tuple[int, int]]
    ) -> None: ...
    def add(self, op: str, fields: Any) -> None: ...
    def add_rotary(self, fields: Any) -> int: ...
    def regions(self, rows: int, wanted: int) -> list[tuple[int, int]]: ...
    def workspace_bytes(self, rows: int, wanted: int) -> int: ...
    def run(
        self,
        begin: int,
        end: int,
        slices: Sequence[tuple[Sequence[int], int, Sequence[int], Sequence[int]]],
        cache: Any,
        workspace: tuple[int, int],
        logits: tuple[int, int],
    ) -> None: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def num_threads(self) -> int: ...

class SampleRequest:
    def __init__(
        self,
        *,
        temperature: float,
        min_p: float,
        top_p: float,
        uniform: float,
        top_k: int,
        repetition: float,
        presence: float,
        frequency: float,
        allowed: Sequence[int] | None,
        biased: Sequence[int],
        bias: Sequence[float],
        banned: Sequence[int],
        prompt: Sequence[int],
        output: Sequence[int],
        given: int,
        num_top: int,
    ) -> None: ...

def sample_scratch_size(*, vocab: int, num_threads: int) -> int: ...
def sample_greedy(
    *,
    isa: str,
    logits: int,
    num_rows: int,
    vocab: int,
    rows: Sequence[int],
    scratch: int,
    scratch_size: int,
    num_threads: int,
) -> list[int]: ...
def sample(
    *,
    isa: str,
    logits: int,
    num_rows: int,
    vocab: int,
    rows: Sequence[int],
    requests: Sequence[SampleRequest],
    scratch: int,
    scratch_size: int,
    num_threads: int,
) -> list[tuple[int, int, float, float, int, list[int], list[float]]]: ...
def read_probe(*, isa: str, data: int, num_bytes: int, num_threads: int) -> int: ...
def multiply_probe(*, isa: str, dtype: str, rounds: int, num_threads: int) -> int: ...
