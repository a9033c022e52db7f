"""The lock: what it recognises in compiled kernels, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.bench import shape_spec
from tests.kernels import cuda, locks
from tests.kernels.facts import Facts, instructions_of
from tests.kernels.models import PROMPT, Case, cases, pruned
from tests.kernels.record import DEVICES, Recorded, record

GOOD = Facts(registers=100, shared=1000, spilled=0, instructions=("HMMA", "ACQBULK"))


def test_what_is_as_locked_passes_and_what_is_better_too() -> None:
    better = replace(GOOD, registers=50, instructions=("HGMMA", "HMMA", "ACQBULK"))
    assert locks.worse({"k": GOOD, "l": better}, {"k": GOOD, "l": GOOD}) == {}
    assert locks.broken({"k": GOOD}, "sm_80", 80, {"k"}) == {}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"registers": 111}, "registers grew from 100 to 111"),
        ({"shared": 1101}, "shared memory grew from 1000 to 1101"),
        ({"instructions": ("ACQBULK",)}, "lost HMMA"),
        ({"registers": 255, "instructions": ()}, "registers grew from 100 to 255; lost HMMA and ACQBULK"),
    ],
)
def test_what_is_worse_than_the_lock_fails(change: dict[str, Any], why: str) -> None:
    assert locks.worse({"k": replace(GOOD, **change)}, {"k": GOOD}) == {"k": why}


def test_registers_may_grow_by_a_tenth() -> None:
    assert locks.worse({"k": replace(GOOD, registers=110)}, {"k": GOOD}) == {}


def test_kernels_that_the_lock_lacks_and_those_that_are_gone_fail() -> None:
    found = locks.worse({"new": GOOD}, {"old": GOOD})
    assert found == {"old": "is in the lock file and is not launched any more", "new": "is not in the lock file"}


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (replace(GOOD, spilled=36), "spills 36 bytes"),
        (replace(GOOD, shared=(163 << 10) + 1), "shared memory"),
        (replace(GOOD, instructions=("HMMA",)), "does not wait"),
        ("does not compile: no", "does not compile"),
    ],
)
def test_broken_kernels_fail_without_a_lock(facts: Facts | str, why: str) -> None:
    assert why in locks.broken({"k": facts}, "sm_80", 80, {"k"})["k"]


def test_known_spills_are_bounded_and_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(reason for _, reason in locks.KNOWN_SPILLS.values())
    monkeypatch.setattr(locks, "KNOWN_SPILLS", {("sm_80", "k"): (8, "a reason")})
    assert locks.broken({"k": replace(GOOD, spilled=8)}, "sm_80", 80) == {}
    assert "k" in locks.broken({"k": replace(GOOD, spilled=16)}, "sm_80", 80)
    assert "k" in locks.broken({"k": replace(GOOD, spilled=8)}, "sm_90", 90)
    assert locks.unneeded({"k": replace(GOOD, spilled=8)}, "sm_80") == {}
    assert list(locks.unneeded({"k": GOOD}, "sm_80")) == list(locks.unneeded({}, "sm_80")) == ["k"]


def test_a_lock_file_says_what_was_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(locks, "FOLDER", tmp_path)
    lock = locks.Lock("triton 0", {"b": GOOD, "a": replace(GOOD, spilled=4, instructions=())})
    locks.write("sm_0", lock)
    assert locks.read("sm_0") == lock
    assert locks.read("sm_1") == locks.Lock("", {})


SASS = """
        /*0050*/                   ACQBULK ;                               /* 0x000000000000782e */
        /*0060*/              @!P0 LDG.E.EF.128.CONSTANT R4, [R2.64] ;     /* 0x0000000402040981 */
        /*0070*/                   LDG.E R4, [R2.64] ;                     /* 0x0000000402040981 */
        /*0080*/            @!UP0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ; /* 0x0 */
        /*0090*/                   LDSM.16.M88.4 R4, [R2] ;                /* 0x0 */
        /*00a0*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ; /* HMMA */
"""


def test_instruction_classes_are_read_from_disassembly() -> None:
    assert instructions_of(SASS) == ("HGMMA", "LDSM", "LDG128", "ACQBULK")


def test_resources_are_read_for_each_kernel_of_an_object() -> None:
    usage = (
        "Resource usage:\n Common:\n  GLOBAL:0\n"
        " Function _ZN9pyruntime1fIfLi4EEEvi:\n  REG:32 STACK:8 SHARED:16 LOCAL:4 CONSTANT[0]:640 TEXTURE:0\n"
        " Function _ZN9pyruntime12_GLOBAL__N_11gEv:\n  REG:9 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:640 TEXTURE:0\n"
    )
    code = f"\t\tFunction : _ZN9pyruntime1fIfLi4EEEvi\n{SASS}\t\tFunction : _ZN9pyruntime12_GLOBAL__N_11gEv\n\n"
    assert cuda.facts_in(usage, code) == {
        "f<float, 4>": Facts(32, 16, 12, ("HGMMA", "LDSM", "LDG128", "ACQBULK")),
        "g": Facts(9, 0, 0, ()),
    }


@pytest.fixture(scope="module")
def recorded() -> list[Recorded]:
    case = Case("smollm2-135m", pruned(shape_spec("smollm2-135m")), buckets=(1, 64))
    return record(case, DEVICES[90])


def test_launches_of_a_model_are_recorded_for_every_step(recorded: list[Recorded]) -> None:
    steps = {each.place for each in recorded}
    assert steps == {f"smollm2-135m, {step}" for step in ("decode 1", "decode 64", f"prefill {PROMPT}")}
    names = {each.kernel.__name__ for each in recorded}
    assert names >= {"embed_kernel", "gather_kernel", "product_kernel", "attention_decode_kernel", "sample_rows_kernel"}


def test_launches_have_no_memory(recorded: list[Recorded]) -> None:
    tensors = [each for launch in recorded for each in launch.arguments if isinstance(each, torch.Tensor)]
    assert tensors and all(each.is_meta for each in tensors)


def test_every_case_has_its_own_name() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
