def device_count() -> int: ...
def norm(
    *,
    x: int,
    residual: int,
    weight: int,
    sum_out: int,
    out: int,
    rows: int,
    hidden: int,
    x_stride: int,
    residual_stride: int,
    sum_out_stride: int,
    out_stride: int,
    eps: float,
    dtype: str,
    stream: int,
) -> None: ...
