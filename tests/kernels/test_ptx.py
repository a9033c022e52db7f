"""Compiled kernels wait for what they read, and what a block stored is there when one thread arrives for it."""

from __future__ import annotations

import re

import pytest

from pyruntime.bench import shape_spec
from tests.kernels.compiled import absent_device, unique
from tests.kernels.models import Case, merged, pruned, with_sublayers
from tests.kernels.ptx import around_arrivals, before_waiting, parse
from tests.kernels.record import DEVICES, Recorded, record

pytestmark = pytest.mark.gpu

CAPABILITY = 90
# the rest takes minutes to compile
KERNELS = ("qkv_rope", "product", "attention_decode", "attention_prefill", "rope_append", "finish", "gather", "embed")


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """PTX of a small model's kernels, whole and without query projections, by what tells them apart."""
    model = pruned(shape_spec("smollm2-135m"))
    cases = (Case("whole", model, buckets=(1,)), Case("merged", with_sublayers(model, merged), buckets=(1,)))
    launches = [each for case in cases for each in record(case, DEVICES[CAPABILITY])]
    with absent_device(CAPABILITY):
        chosen = {key: each for key, each in unique(launches, CAPABILITY).items() if key.startswith(KERNELS)}
        assert all(each.early for each in chosen.values())
        return {key: ptx_of(each) for key, each in chosen.items()}


def ptx_of(launch: Recorded) -> str:
    """What an early launch compiles to; in an `absent_device`."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "launch_pdl": True}
    text: str = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.constants, **options).asm["ptx"]
    return text


def test_no_path_touches_memory_or_ends_before_it_has_waited(texts: dict[str, str]) -> None:
    found = {key: before_waiting(parse(text)) for key, text in texts.items()}
    assert not {key: each for key, each in found.items() if each}


def test_the_block_meets_before_one_thread_arrives_and_after(texts: dict[str, str]) -> None:
    programs = {key: parse(text) for key, text in texts.items()}
    arriving = {key for key, each in programs.items() if any(one.startswith("atom.") for one in each.instructions)}
    assert {"qkv_rope_kernel", "product_kernel", "attention_decode_kernel"} <= {key.split()[0] for key in arriving}
    found = {key: around_arrivals(programs[key]) for key in arriving}
    assert not {key: each for key, each in found.items() if each}


GOOD = """
.visible .entry kernel(.param .u64 p)
{
	.reg .pred %p<3>;
$L__func_begin0:
	ld.param.b64 %rd1, [p];
	@%p1 bra $L__BB0_2;
	// begin inline asm
	prefetch.global.L2 [%rd1]; mov.u32 %r1, 0;
	// end inline asm
	griddepcontrol.wait; // dummy
	@%p2 ld.global.b32 { %r1 }, [ %rd1 + 0 ];
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
	st.global.b32 [ %rd1 + 0 ], { %r1 };
	bar.sync 	0;
	@%p2 atom.global.gpu.acq_rel.add.u32 %r2, [ %rd1 + 0 ], %r1;
	st.shared.b32 [ %r3 ], %r2;
	bar.sync 	0;
	@%p2 bra $L__BB0_3;
	ld.global.cg.b32 { %r1 }, [ %rd1 + 0 ];
	bra.uni $L__BB0_3;
$L__BB0_2:
	griddepcontrol.wait; // dummy
$L__BB0_3:
	ret;
}
"""


def test_a_kernel_in_order_passes() -> None:
    assert before_waiting(parse(GOOD)) == around_arrivals(parse(GOOD)) == []


@pytest.mark.parametrize(
    "early",
    [
        "ld.global.nc.b32 %r1, [%rd1]",
        "st.global.b32 [%rd1], %r1",
        "cp.async.ca.shared.global [%r1], [%rd1], 0x4, %r2",
        "atom.global.add.u32 %r1, [%rd1], 1",
        "red.global.add.u32 [%rd1], 1",
        "ret",
    ],
)
@pytest.mark.parametrize("place", ["\t// begin inline asm", "$L__BB0_2:"])
def test_what_stands_before_the_wait_is_found(early: str, place: str) -> None:
    doctored = GOOD.replace(place, f"{place}\n\t@%p2 {early};")
    assert before_waiting(parse(doctored)) == [early]


@pytest.mark.parametrize("place", range(2))
def test_a_path_without_a_wait_is_found(place: int) -> None:
    parts = re.split(r"\tgriddepcontrol\.wait;[^\n]*\n", GOOD)
    doctored = parts[0] + ("\tgriddepcontrol.wait;\n" if place else "") + parts[1]
    doctored += ("" if place else "\tgriddepcontrol.wait;\n") + parts[2]
    assert "ret" in before_waiting(parse(doctored))


@pytest.mark.parametrize(("barrier", "found"), [(0, "st.global"), (1, "ld.global")])
def test_a_missing_barrier_is_found(barrier: int, found: str) -> None:
    parts = GOOD.split("\tbar.sync \t0;\n")
    doctored = "".join([parts[0], *("\tbar.sync \t0;\n" * (i != barrier) + part for i, part in enumerate(parts[1:]))])
    assert [each[:9] for each in around_arrivals(parse(doctored))] == [found]


def test_a_barrier_on_one_of_two_paths_is_not_enough() -> None:
    around = "\t@%p1 bra $L__BB0_9;\n\tbar.sync \t0;\n$L__BB0_9:\n"
    doctored = GOOD.replace("\tbar.sync \t0;\n", around, 1)
    assert [each[:9] for each in around_arrivals(parse(doctored))] == ["st.global"]


def test_doctored_kernels_are_found(texts: dict[str, str]) -> None:
    text = next(text for key, text in texts.items() if key.startswith("product_kernel") and "atom." in text)
    assert before_waiting(parse(text.replace("griddepcontrol.wait", "griddepcontrol.launch_dependents", 1)))
    assert around_arrivals(parse(re.sub(r"bar\.sync\s+0;", "bar.warp.sync 0;", text)))
