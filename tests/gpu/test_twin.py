"""What the host twin of the CUDA kernels finds: each of these kernels has one fault."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAULTS = {
    "without_barrier": "nan",
    "without_waiting_for_copies": "nan",
    "waiting_for_too_few_copies": "nan",
    "reading_too_early": "calls load_input before wait_for_inputs()",
    "writing_too_early": "calls store before wait_for_inputs()",
    "never_waiting": "never called wait_for_inputs()",
    "divergent_barrier": "wait for each other: 40 at sync_threads, 0 at a warp's exchange, 0 spin, 24 ended",
    "lanes_that_differ": "is at shuffle_xor(2) while its warp is at shuffle_xor(1)",
    "lanes_that_are_missing": "at shuffle_xor",
    "beyond_shared_memory": "wrote behind its 2048 bytes of shared memory",
    "copy_beyond_shared_memory": "copies to an address outside shared memory",
    "unaligned_load": "touches an address that is not a multiple of 16",
    "spinning_for_ever": "spin",
}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each kernel of faulty.cpp printed."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "no C++ compiler"
    program = tmp_path_factory.mktemp("faulty") / "faulty"
    source = Path(__file__).with_name("faulty.cpp")
    command = [compiler, "-std=c++17", "-O1", "-w", f"-I{ROOT / 'kernels'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=True)
    return dict(line.split("|") for line in done.stdout.splitlines())


def test_a_sound_kernel_runs(printed: dict[str, str]) -> None:
    assert printed["sound"] == "64"


def test_every_fault_is_tried(printed: dict[str, str]) -> None:
    assert set(printed) == {"sound", *FAULTS}


@pytest.mark.parametrize("kernel", FAULTS)
def test_the_twin_finds_the_fault(printed: dict[str, str], kernel: str) -> None:
    found = printed[kernel]
    assert FAULTS[kernel] in found
    if found != "nan":
        assert found.startswith(f"host twin: kernel {kernel}: ")
