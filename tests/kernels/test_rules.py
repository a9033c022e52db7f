"""House rules of Triton kernels and of what launches them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT / "kernels" / "_common.py"
LAUNCHER = ROOT / "pyruntime" / "ops" / "gpu" / "frame.py"
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
HOSTS = sorted((ROOT / "pyruntime" / "ops" / "gpu").rglob("*.py"))
# measures the device: its kernels are launched one by one
ALONE = ROOT / "kernels" / "probe.py"
# what only kernels/_common.py may use, and why
ONLY_SHARED = {
    "tl.dot": "the interpreter multiplies bfloat16 wrongly: call dot",
    "tl.dot_scaled": "the interpreter multiplies bfloat16 wrongly: call dot",
    "tl.extra": "the interpreter has none of it: guard it in kernels/_common.py",
}
NOWHERE = {
    "tl.make_block_ptr": "Triton 3.9 has no block pointers: use plain ones",
    "tl.advance": "Triton 3.9 has no block pointers: use plain ones",
    "triton.autotune": "it measures while it launches: choose from the sizes, beside the launch",
    "triton.heuristics": "constants are chosen beside the launch, where they are recorded",
}


def dotted(node: ast.expr) -> str:
    """`a.b.c` for a chain of names, with the long name of the language shortened."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}".replace("triton.language.", "tl.") if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def uses(tree: ast.Module, banned: dict[str, str]) -> Iterator[str]:
    """Every use of a banned name."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute():
                names = [dotted(node)]
            case ast.ImportFrom(module=str(module)) if module.startswith("triton"):
                prefix = "tl" if module == "triton.language" else module
                names = [f"{prefix}.{alias.name}" for alias in node.names]
            case ast.keyword(arg="warp_specialize"):
                yield f"{node.lineno}: warp_specialize: the compiler crashes on it"
                continue
            case _:
                continue
        yield from (f"{node.lineno}: {name}: {banned[name]}" for name in names if name in banned)


def direct_launches(tree: ast.Module) -> Iterator[str]:
    """Every kernel[grid](...)."""
    for node in ast.walk(tree):
        match node:
            # every kernel is called so
            case ast.Call(func=ast.Subscript(value=kernel)) if dotted(kernel).endswith("kernel"):
                yield f"{node.lineno}: {ast.unparse(node.func)}(...): launch through frame.launch, which tests record"


def kernels_of(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Functions that Triton compiles, by name."""
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return {each.name: each for each in functions if "triton.jit" in map(decorator, each.decorator_list)}


def decorator(node: ast.expr) -> str:
    """Its name, with or without arguments behind it."""
    return dotted(node.func if isinstance(node, ast.Call) else node)


def called(function: ast.FunctionDef, functions: dict[str, ast.FunctionDef]) -> set[str]:
    """Names that a function calls, and that the functions call which it calls in turn."""
    names = {dotted(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
    others = {name: each for name, each in functions.items() if each is not function}
    return names.union(*(called(others[name], others) for name in names if name in others))


def careless(tree: ast.Module) -> list[str]:
    """Kernels that might start before their inputs are there."""
    functions = kernels_of(tree)
    launched = [each for name, each in functions.items() if name.endswith("_kernel")]
    wrong = [f"{each.name} has no PDL" for each in launched if "PDL" not in [arg.arg for arg in each.args.args]]
    never = [each.name for each in launched if "wait_for_inputs" not in called(each, functions)]
    return [*wrong, *(f"{name} never calls wait_for_inputs" for name in never)]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_use_what_every_triton_and_the_interpreter_have(path: Path) -> None:
    banned = NOWHERE if path == SHARED else {**NOWHERE, **ONLY_SHARED}
    assert list(uses(parse(path), banned)) == []


@pytest.mark.parametrize("path", [*KERNELS, *HOSTS], ids=lambda path: path.name)
def test_kernels_are_launched_through_the_frame_alone(path: Path) -> None:
    if path != LAUNCHER:
        assert list(direct_launches(parse(path))) == []


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_every_kernel_waits_for_its_inputs(path: Path) -> None:
    if path != ALONE:
        assert careless(parse(path)) == []


@pytest.mark.parametrize(
    "source",
    [
        "acc = tl.dot(a, b)",
        "acc = triton.language.dot(a, b)",
        "from triton.language import dot",
        "p = tl.make_block_ptr(x)",
        "tl.extra.cuda.gdc_wait()",
        "@triton.autotune([], [])\ndef f(): pass",
        "for i in tl.range(n, warp_specialize=True): pass",
    ],
)
def test_the_rules_see(source: str) -> None:
    assert len(list(uses(ast.parse(source), {**NOWHERE, **ONLY_SHARED}))) == 1


def test_the_rules_see_direct_launches_and_missing_waits() -> None:
    assert len(list(direct_launches(ast.parse("scale_kernel[(1,)](x, 3)")))) == 1
    kernel = (
        "@triton.jit(do_not_specialize=['x'])\ndef a_kernel(x{}):\n    inner(x)\n@triton.jit\ndef inner(x):\n    {}\n"
    )
    assert careless(ast.parse(kernel.format(", PDL", "wait_for_inputs(PDL)"))) == []
    assert careless(ast.parse(kernel.format(", PDL", "pass"))) == ["a_kernel never calls wait_for_inputs"]
    assert careless(ast.parse(kernel.format("", "wait_for_inputs(0)"))) == ["a_kernel has no PDL"]
