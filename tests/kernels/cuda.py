"""Compile every CUDA C++ kernel for GPUs that need not be here, as CMakeLists.txt does, and read what came out."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tests.kernels.facts import CACHE, ROOT, TOOL, Facts, instructions_of, run

SOURCES: Final = ROOT / "kernels"
INCLUDES: Final = (SOURCES, ROOT / "csrc", ROOT / "csrc" / "include")
# capability -> what nvcc calls it
ARCHITECTURES: Final = {80: "sm_80", 90: "sm_90a"}
FLAGS: Final = ("-cubin", "-O3", "-DNDEBUG", "-std=c++17", *(f"-I{folder}" for folder in INCLUDES))


def nvcc_version() -> str | None:
    """The version of nvcc on PATH, or None."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    found = re.search(r"release [\d.]+, V([\d.]+)", run(nvcc, "--version"))
    assert found is not None, "nvcc does not say its version"
    return f"nvcc {found[1]}"


def facts_of_all(capability: int, num_processes: int) -> dict[str, Facts | str]:
    """Facts of every kernel in kernels/*.cu, or why a file does not compile."""
    sources = sorted(SOURCES.glob("*.cu"))
    with ThreadPoolExecutor(num_processes) as pool:
        made = pool.map(lambda source: _facts_of(source, ARCHITECTURES[capability]), sources)
        return {key: facts for each in made for key, facts in each.items()}


def _facts_of(source: Path, architecture: str) -> Mapping[str, Facts | str]:
    try:
        cubin = _compiled(source, architecture)
    except AssertionError as error:
        return {source.name: f"does not compile: {error}"}
    return facts_in(run(TOOL, "-res-usage", cubin), run(TOOL, "-sass", cubin))


def _compiled(source: Path, architecture: str) -> Path:
    """The object, made anew only if something in it changed."""
    digest = hashlib.sha256(f"{nvcc_version()} {architecture} {FLAGS}".encode())
    for path in sorted(_with_headers(source)):
        digest.update(path.read_bytes())
    cubin = CACHE / "cuda" / f"{source.stem}-{architecture}-{digest.hexdigest()[:32]}.cubin"
    if not cubin.exists():
        cubin.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cubin.with_suffix(".unfinished")
        run("nvcc", *FLAGS, f"-arch={architecture}", "-o", unfinished, source)
        unfinished.replace(cubin)
    return cubin


def _with_headers(source: Path) -> set[Path]:
    """A file and everything of this project that it includes."""
    found = {source}
    waiting = [source]
    while waiting:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', waiting.pop().read_text(), re.MULTILINE):
            header = next((folder / name for folder in INCLUDES if (folder / name).exists()), None)
            if header is not None and header not in found:
                found.add(header)
                waiting.append(header)
    return found


def facts_in(usage: str, disassembly: str) -> dict[str, Facts]:
    """Facts of every kernel of an object by its readable name."""
    code = {
        each[1]: each[0]
        for each in re.finditer(r"Function : (\S+)\n.*?(?=\n\s*Function : |\Z)", disassembly, re.DOTALL)
    }
    found = {}
    resources = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, registers, stack, shared, local in re.findall(resources, usage):
        found[readable(name)] = Facts(int(registers), int(shared), int(stack) + int(local), instructions_of(code[name]))
    return found


def readable(name: str) -> str:
    """kernel<template arguments> of a mangled name."""
    plain = run("c++filt", name).strip().replace("(anonymous namespace)::", "").replace("pyruntime::", "")
    # the parameters are in the last pair of parentheses
    depth = 0
    for at in range(len(plain) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(plain[at], 0)
        if depth == 0 and plain[at] == "(":
            return plain[:at].removeprefix("void ")
    return plain
