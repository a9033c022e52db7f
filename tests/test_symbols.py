"""The per-ISA objects share nothing that a linker could merge."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[1]
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Object files of csrc/cpu per ISA, compiled as setup.py compiles them."""
    folder = tmp_path_factory.mktemp("objects")
    cmake = [sys.executable, "-m", "cmake"]
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    subprocess.run([*cmake, "-S", ROOT, "-B", folder, *options], check=True, capture_output=True)
    build = [*cmake, "--build", folder, "--target", "isa_objects"]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {isa: sorted((folder / f"CMakeFiles/cpu_{isa}.dir").rglob("*.o")) for isa in ISAS}


def defined_symbols(path: Path) -> list[tuple[str, str]]:
    """(kind, demangled name) of everything the object defines."""
    listed = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    return [(line.split(maxsplit=2)[1], line.split(maxsplit=2)[2]) for line in listed.splitlines()]


@pytest.mark.parametrize("isa", ISAS)
def test_isa_objects_emit_no_shared_symbol(isa: str, objects: dict[str, list[Path]]) -> None:
    assert objects[isa]
    for path in objects[isa]:
        symbols = defined_symbols(path)
        assert symbols
        # lower case is local; u, v, w are not, and capitals are visible to the linker
        visible = [name for kind, name in symbols if kind.isupper() or kind in "uvw"]
        assert [name for name in visible if not name.startswith(f"pyruntime::cpu_{isa}::")] == []
        assert [(kind, name) for kind, name in symbols if kind in "uvwVW"] == []


def disassembly(path: Path) -> str:
    return subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout


def test_each_isa_uses_its_own_registers_and_no_wider_ones(objects: dict[str, list[Path]]) -> None:
    code = {isa: "".join(disassembly(path) for path in paths) for isa, paths in objects.items()}
    assert not re.search(r"%[yz]mm", code["generic"])
    assert "%ymm" in code["avx2"]
    assert "%zmm" not in code["avx2"]
    for isa in ("avx512", "avx512_bf16"):
        assert re.search(r"vfmadd\S+\s.*%zmm", code[isa])


def test_one_copy_multiplies_bfloat16_in_hardware(objects: dict[str, list[Path]]) -> None:
    code = {isa: "".join(disassembly(path) for path in paths) for isa, paths in objects.items()}
    assert [isa for isa in ISAS if re.search(r"\bvdpbf16ps\b", code[isa])] == ["avx512_bf16"]


def test_the_extension_links_no_torch() -> None:
    import pyruntime._C as native

    assert native.__file__ is not None
    listed = subprocess.run(["ldd", native.__file__], capture_output=True, text=True, check=True).stdout
    assert "not found" not in listed
    assert not re.search(r"torch|c10|cuda", listed)
