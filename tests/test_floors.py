"""The house rules that a machine can check: who may import whom, what is never called, how long things may be."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# a room may import its own floor and those below
FLOORS = {
    "cli": 10,
    "__main__": 10,
    "serve": 9,
    "integrations": 9,
    "llm": 8,
    "async_llm": 8,
    "prune": 8,
    "evaluate": 8,
    "bench": 8,
    "engine": 7,
    "plan": 6,
    "graph": 5,
    "passes": 4,
    "checkpoint": 3,
    "ops": 2,
    "spec": 1,
    "env": 1,
    "errors": 1,
    "kernels": 0,
    "_C": 0,
    "_C_cuda": 0,
    # pyruntime/__init__.py shows the offline API
    "__init__": 8,
}
# rooms of one floor that do not know each other: what they share is a file on disk, not an import
STRANGERS = {"llm", "async_llm", "prune", "evaluate", "bench"}
# (room, the one stranger that it knows all the same)
TWINS = {("async_llm", "llm")}

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"torch.load", "eval", "exec"}
FORBIDDEN_ARGUMENTS = {"shell", "trust_remote_code"}
HEAVY = {"typer", "fastapi", "uvicorn", "matplotlib"}

MAX_LINES = 400
MAX_KERNEL_LINES = 500
MAX_FUNCTION_LINES = 60
# bodies of Triton functions, whose arguments take a line each, at their head and wherever they are called
MAX_KERNEL_BODY_LINES = 120
# "path" -> the most lines it may have, with the reason beside it
LONG_FILES: dict[str, int] = {}
# "path::function" -> the most lines it may have, with the reason beside it
LONG_FUNCTIONS: dict[str, int] = {}

SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}
FOLDERS = ("pyruntime", "kernels", "csrc", "tests", "benchmarks", "examples")


def files(*folders: str, suffixes: set[str]) -> list[Path]:
    """Source files under the folders; kernels are listed once, not again through the link in the package."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    link = ROOT / "pyruntime" / "kernels"
    return sorted(path for path in found if path.is_file() and link not in path.parents)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def dotted(node: ast.expr) -> str:
    """`a.b.c` for a chain of names, else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def imported_modules(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also by import_module; a relative one starts with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module") and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def floor_violations(tree: ast.Module, room: str) -> list[str]:
    """What is wrong with the imports of one file of a room."""
    wrong = []
    for line, module in imported_modules(tree):
        package, _, rest = module.partition(".")
        target = rest.partition(".")[0]
        if module.startswith("."):
            wrong.append(f"{line}: relative import of {module}")
        elif package in ("kernels", "csrc"):
            wrong.append(f"{line}: {module} is imported as pyruntime.{module}")
        elif package != "pyruntime" or target in ("", "__version__", room):
            continue
        elif target not in FLOORS:
            wrong.append(f"{line}: {module} belongs to no room")
        elif FLOORS[target] > FLOORS[room]:
            wrong.append(f"{line}: {room} (floor {FLOORS[room]}) imports {target} (floor {FLOORS[target]})")
        elif {room, target} <= STRANGERS and (room, target) not in TWINS:
            wrong.append(f"{line}: {room} and {target} must not know each other")
    return wrong


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def forbidden_uses(tree: ast.Module) -> list[str]:
    """Every place that would run code from data."""
    wrong = [
        f"{line}: imports {module}"
        for line, module in imported_modules(tree)
        if module.partition(".")[0] in FORBIDDEN_MODULES or module == "torch.load"
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in FORBIDDEN_CALLS:
            wrong.append(f"{node.lineno}: calls {dotted(node.func)}")
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_ARGUMENTS and is_true(node.value):
            wrong.append(f"{node.lineno}: passes {node.arg}=True")
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            names = [key.value for key, value in pairs if isinstance(key, ast.Constant) and is_true(value)]
            wrong += [f"{node.lineno}: sets {name}: True" for name in names if name in FORBIDDEN_ARGUMENTS]
    return wrong


PACKAGE = files("pyruntime", "kernels", suffixes={".py", ".pyi"})
PROGRAM = [*PACKAGE, *files("benchmarks", "examples", suffixes={".py"}), ROOT / "setup.py"]
PYTHON = [*PROGRAM, *files("tests", suffixes={".py"})]
ALL = [*files(*FOLDERS, suffixes=SUFFIXES), ROOT / "setup.py"]


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_imports_are_absolute_and_go_down(path: Path) -> None:
    room = room_of(path)
    assert room in FLOORS, f"pyruntime/{room} stands on no floor; add it to the table and to the design"
    assert floor_violations(parse(path), room) == []


@pytest.mark.parametrize("path", PROGRAM, ids=name_of)
def test_no_code_is_run_from_data(path: Path) -> None:
    assert forbidden_uses(parse(path)) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("ops", "from pyruntime.graph import node"),
        ("spec", "import pyruntime.ops.mlp"),
        ("plan", "def f():\n    from pyruntime import engine"),
        ("ops", "import importlib\nimportlib.import_module('pyruntime.cli.main')"),
        ("ops", "from . import mlp"),
        ("ops", "import kernels.norm"),
        ("ops", "from pyruntime.helpers import x"),
        ("prune", "from pyruntime.evaluate import perplexity"),
        ("async_llm", "import pyruntime.bench"),
        ("llm", "from pyruntime.async_llm import AsyncLLM"),
    ],
)
def test_the_floor_check_sees(room: str, source: str) -> None:
    assert len(floor_violations(ast.parse(source), room)) == 1


def test_the_floor_check_allows_down_and_sideways() -> None:
    allowed = "import torch, pyruntime\nfrom pyruntime import env, errors\nfrom pyruntime.ops._native import load"
    assert floor_violations(ast.parse(allowed), "ops") == []
    assert floor_violations(ast.parse("from pyruntime.llm import LLM"), "async_llm") == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from shelve import open",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "run('ls', shell=True)",
        "load('x', trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
    ],
)
def test_the_data_check_sees(source: str) -> None:
    assert len(forbidden_uses(ast.parse(source))) == 1


def test_the_data_check_allows_what_is_harmless() -> None:
    assert forbidden_uses(ast.parse("model.eval()\nrun(shell=False)\nf(trust_remote_code=False)")) == []


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_files_are_short(path: Path) -> None:
    limit = MAX_KERNEL_LINES if name_of(path).startswith("kernels/") else MAX_LINES
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= LONG_FILES.get(name_of(path), limit)


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_functions_are_short(path: Path) -> None:
    long = {}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            kernel = name_of(path).startswith("kernels/")
            lines = node.end_lineno - (node.body[0].lineno if kernel else node.lineno) + 1
            limit = MAX_KERNEL_BODY_LINES if kernel else MAX_FUNCTION_LINES
            if lines > LONG_FUNCTIONS.get(f"{name_of(path)}::{node.name}", limit):
                long[node.name] = lines
    assert long == {}


def test_listed_exceptions_still_exist() -> None:
    names = {name_of(path) for path in ALL}
    assert {name.partition("::")[0] for name in (*LONG_FILES, *LONG_FUNCTIONS)} <= names


def test_kernels_is_no_package_of_its_own() -> None:
    # transformers looks for a package called kernels; ours must never be found under that name
    assert not (ROOT / "kernels" / "__init__.py").exists()
    taken = {"triton", "torch", "cuda"}
    assert [path for path in (ROOT / "kernels").iterdir() if path.stem in taken] == []


@pytest.mark.parametrize("path", files("kernels", suffixes={".py"}), ids=name_of)
def test_only_the_dot_helper_calls_dot(path: Path) -> None:
    calls = (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call))
    bare = [call.lineno for call in calls if dotted(call.func) == "tl.dot"]
    assert path.name == "_common.py" or bare == []


def modules_up_to(floor: int) -> list[str]:
    """Import names of the package's modules on the floors up to this one, kernels (which need Triton) left out."""
    paths = [path for path in PACKAGE if path.suffix == ".py" and 0 < FLOORS.get(room_of(path), 99) <= floor]
    return sorted(name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths)


@pytest.mark.parametrize("modules", [["pyruntime"], modules_up_to(FLOORS["engine"])], ids=["package", "engine"])
def test_the_core_imports_no_heavy_library(modules: list[str]) -> None:
    program = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert HEAVY & set(done.stdout.split()) == set()
