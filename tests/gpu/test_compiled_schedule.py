"""Who computes what in the CUDA kernels: every row and input once, and no processor much longer than the others."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.twin import kernels

NEIGHBOURS, HALVES, HEADS = range(3)
# outputs, inputs of 8B and 0.5B models: q/k/v, keys and values alone, output, gate and up, down, vocabulary
PRODUCTS = [
    *[(6144, 4096), (2048, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
    *[(1152, 896), (256, 896), (896, 896), (9728, 896), (896, 4864), (151936, 896)],
]
# weights of a product that takes longer than a launch
LARGE = 1 << 23
ROWS = (1, 2, 4, 8, 16, 32, 64)


# of a block: of an H100 or B200, an A100, an RTX 4090
SHARED = {"sm_90": 227 * 1024, "sm_80": 163 * 1024, "sm_89": 99 * 1024}


@pytest.fixture(scope="module")
def module() -> Any:
    """The kernels that run here."""
    return kernels()


@pytest.mark.parametrize("total", [0, 1, 5, 64, 131, 1000])
@pytest.mark.parametrize("parts", [1, 2, 7, 132])
def test_parts_cover_everything_once_and_differ_by_one_at_most(module: Any, total: int, parts: int) -> None:
    ranges = [module.part_of(total=total, parts=parts, part=part) for part in range(parts)]
    assert [i for begin, end in ranges for i in range(begin, end)] == list(range(total))
    lengths = {end - begin for begin, end in ranges}
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    "matrix",
    [
        {"pairing": NEIGHBOURS, "outputs": 1},
        {"pairing": NEIGHBOURS, "outputs": 63},
        {"pairing": HALVES, "outputs": 26},
        {"pairing": HEADS, "outputs": 96, "head_dim": 16, "rope_dim": 16, "num_roped": 4},
        {"pairing": HEADS, "outputs": 96, "head_dim": 16, "rope_dim": 6, "num_roped": 4},
        {"pairing": HEADS, "outputs": 35, "head_dim": 7, "rope_dim": 4, "num_roped": 3},
        {"pairing": HEADS, "outputs": 35, "head_dim": 7, "rope_dim": 0, "num_roped": 0},
    ],
)
def test_pairs_hold_every_row_of_the_weight_once(module: Any, matrix: dict[str, int]) -> None:
    rows = [row for pair in module.row_pairs(**matrix) for row in pair if row >= 0]
    assert sorted(rows) == list(range(matrix["outputs"]))


def test_pairs_are_what_is_finished_together(module: Any) -> None:
    assert module.row_pairs(pairing=HALVES, outputs=6) == [(0, 3), (1, 4), (2, 5)]
    pairs = module.row_pairs(pairing=HEADS, outputs=16, head_dim=8, rope_dim=4, num_roped=1)
    assert pairs == [(0, 2), (1, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), PRODUCTS)
@pytest.mark.parametrize(("num_sms", "arch"), [(132, "sm_90"), (108, "sm_80"), (128, "sm_89")])
def test_products_fill_the_processors_in_whole_rounds(
    module: Any, outputs: int, inputs: int, rows: int, num_sms: int, arch: str
) -> None:
    if arch == "sm_89" and rows > 16:
        pytest.skip("more rows take several launches there")
    sizes = {"rows": rows, "pairs": outputs // 2, "inputs": inputs}
    plan = module.plan_product(**sizes, num_sms=num_sms, shared_bytes=SHARED[arch])
    tile = module.product_tile(rows=rows)
    columns, splits = plan["columns"], plan["splits"]
    blocks = num_sms * tile["blocks_per_sm"]
    assert columns * splits <= blocks
    assert module.product_shared_bytes(rows=rows, inputs=inputs, splits=splits) <= SHARED[arch]
    if outputs * inputs < LARGE:
        return
    groups, steps = -(-outputs // 2 // tile["group_pairs"]), -(-inputs // tile["step"])
    longest = -(-groups // (columns * tile["warps"])) * -(-steps // splits)
    # a warp's round cannot be cut, but rounds that do not matter beside what it costs to begin may be uneven
    assert longest <= 1.3 * groups * steps / (blocks * tile["warps"]) + 8


@pytest.mark.parametrize("rows", ROWS)
def test_products_too_wide_for_shared_memory_are_refused(module: Any, rows: int) -> None:
    with pytest.raises(ValueError, match="find no room in shared memory"):
        module.plan_product(rows=rows, pairs=8, inputs=1 << 24, num_sms=132, shared_bytes=SHARED["sm_90"])
