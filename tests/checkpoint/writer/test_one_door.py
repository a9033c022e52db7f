"""Everything that pyruntime writes goes through checkpoint/atomic.py, whose calls the other tests fail and kill."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "pyruntime"
DOOR = "checkpoint/atomic.py"
OF_OS = {
    "rename", "renames", "replace", "mkdir", "makedirs", "unlink", "remove", "rmdir", "removedirs", "write", "pwrite",
    "truncate", "ftruncate", "link", "symlink", "fsync",
}  # fmt: skip
OF_PATHS = {"write_text", "write_bytes", "unlink", "rmdir", "rename", "touch", "symlink_to", "hardlink_to", "mkdir"}
OF_LIBRARIES = {"save_file", "copyfile", "copytree", "copy2", "rmtree", "move", "savefig", "NamedTemporaryFile"}
# file and call -> why it may
ALLOWED = {
    ("evaluate/plot.py", "savefig"): "into memory",
    ("prune/plot.py", "savefig"): "into memory",
}


def writes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of calls that change a disk."""
    own = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "pyruntime.checkpoint.atomic"
        for alias in node.names
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Attribute(value=ast.Name(id="os"), attr=name) if name in OF_OS:
                yield node.lineno, name
            case ast.Attribute(value=ast.Name(id="DISK" | "os")):
                continue
            case ast.Attribute(attr=name) if name in OF_PATHS | OF_LIBRARIES:
                yield node.lineno, name
            case ast.Attribute(attr="open") | ast.Name(id="open") if _mode(node) & set("wax+"):
                yield node.lineno, "open"
            case ast.Name(id=name) if name in OF_PATHS | OF_LIBRARIES and name not in own:
                yield node.lineno, name


def _mode(call: ast.Call) -> set[str]:
    """The letters of the mode of a call of open, where it is written out."""
    said = [each.value for each in call.keywords if each.arg == "mode"]
    said += call.args[1:2] if isinstance(call.func, ast.Name) else call.args[:1]
    return {letter for each in said if isinstance(each, ast.Constant) for letter in str(each.value)}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_is_written_by_another_door(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    if name == DOOR or name.startswith("kernels/"):
        return
    found = writes(ast.parse(path.read_text()))
    assert [f"{line}: {call}" for line, call in found if (name, call) not in ALLOWED] == []


@pytest.mark.parametrize(
    "source",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('w', encoding='utf-8')",
        "import os\nos.rename(a, b)",
        "path.write_text('x')",
        "from safetensors.torch import save_file\nsave_file(t, path)",
        "import shutil\nshutil.rmtree(path)",
        "os.mkdir(path)",
        "path.mkdir(parents=True, exist_ok=True)",
    ],
)
def test_the_check_sees(source: str) -> None:
    assert len(list(writes(ast.parse(source)))) == 1


def test_the_check_allows_reading_and_the_door() -> None:
    allowed = "open(p, 'rb')\nopen(p)\npath.open()\ntext.replace('w', 'x')\nreplace(a, b=1)\nDISK.rename(a, b)\n"
    allowed += "from pyruntime.checkpoint.atomic import write_text\nwrite_text(path, 'x')\n"
    assert list(writes(ast.parse(allowed))) == []
