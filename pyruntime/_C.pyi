def isa_detected() -> str: ...
def isa_available() -> list[str]: ...
def num_threads() -> int: ...
def cgroup_cpus(membership: str, mount: str) -> int: ...
def mlp(
    *,
    isa: str,
    x: int,
    norm_weight: int,
    eps: float,
    gate: int,
    up: int,
    down: int,
    residual: int,
    scratch: int,
    scratch_size: int,
    out: int,
    rows: int,
    hidden: int,
    ffn: int,
    num_threads: int,
) -> None: ...
