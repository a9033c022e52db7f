"""mergekit's slices as drop plans: layers not taken, sublayers scaled to nothing; every other merge is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyruntime.checkpoint.dialects import mergekit
from pyruntime.errors import UsageError
from pyruntime.passes import load_drop_plan
from tests.checkpoint.dialects.tiny import attention, mlp, spec_of

MODEL = spec_of(*[(attention(4), mlp(256))] * 8)


def taken(*ranges: str, model: str = "some/llama", method: str = "passthrough") -> str:
    parts = "".join(f"  - sources:\n      - model: {model}\n        layer_range: {each}\n" for each in ranges)
    return f"slices:\n{parts}merge_method: {method}\ndtype: bfloat16\n"


def read(tmp_path: Path, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    (tmp_path / "merge.yml").write_text(text)
    plan = load_drop_plan(tmp_path / "merge.yml", MODEL)
    assert "mergekit" in plan.origin
    return plan.attention, plan.mlp


def refused(tmp_path: Path, text: str | bytes) -> str:
    (tmp_path / "merge.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        load_drop_plan(tmp_path / "merge.yml", MODEL)
    assert caught.value.code == "DROP_PLAN"
    assert len(str(caught.value)) < 1000 and str(caught.value).isascii()
    return str(caught.value)


@pytest.mark.parametrize(
    "ranges, gone",
    [
        (["[0, 8]"], ()),
        (["[0, 5]", "[7, 8]"], (5, 6)),
        (["[2, 4]"], (0, 1, 4, 5, 6, 7)),
        (["[0, 2]", "[2, 3]", "[4, 8]"], (3,)),
    ],
)
def test_layers_that_no_slice_takes_are_gone(tmp_path: Path, ranges: list[str], gone: tuple[int, ...]) -> None:
    assert read(tmp_path, taken(*ranges)) == (gone, gone)


BY_SCALE = {
    "attention": ("[{filter: o_proj, value: 0.0}, {value: 1.0}]", (2, 3), ()),
    "MLP": ("[{filter: down_proj, value: 0.0}, {value: 1.0}]", (), (2, 3)),
    "by a longer name": ("[{filter: self_attn.o_proj, value: 0}]", (2, 3), ()),
    "both": ("[{filter: o_proj, value: 0}, {filter: down_proj, value: 0.0}]", (2, 3), (2, 3)),
    "neither": ("1.0", (), ()),
    "by a star": ("[{filter: o_proj, value: 0}, {filter: '*', value: 1}]", (2, 3), ()),
    "the first one counts": ("[{filter: o_proj, value: 1}, {filter: o_proj, value: 0}]", (), ()),
}


@pytest.mark.parametrize("case", BY_SCALE)
@pytest.mark.parametrize("indent", [8, 4], ids=["of the source", "of the slice"])
def test_sublayers_that_are_scaled_to_nothing_are_gone(tmp_path: Path, case: str, indent: int) -> None:
    scale, attn, mlps = BY_SCALE[case]
    before, after = taken("[0, 2]", "[2, 4]", "[4, 8]").split("[2, 4]\n")
    text = f"{before}[2, 4]\n{' ' * indent}parameters: {{scale: {scale}}}\n{after}"
    assert read(tmp_path, text) == (attn, mlps)


def test_the_form_of_published_merges(tmp_path: Path) -> None:
    text = """
slices:
- sources:
  - model: some/llama
    layer_range: [0, 4]
- sources:
  - model: some/llama
    layer_range: [5, 8]
    parameters:
      scale:
      - filter: o_proj
        value: 0.0
      - filter: down_proj
        value: 0.0
      - value: 1.0
merge_method: passthrough
dtype: bfloat16
"""
    assert read(tmp_path, text) == ((4, 5, 6, 7), (4, 5, 6, 7))


def test_the_inner_scale_hides_the_outer_one(tmp_path: Path) -> None:
    outer = "parameters: {scale: [{filter: o_proj, value: 0}]}\n"
    assert read(tmp_path, taken("[0, 8]") + outer) == (tuple(range(8)), ())
    inner = taken("[0, 4]", "[4, 8]").replace("[4, 8]\n", "[4, 8]\n        parameters: {scale: 1}\n")
    assert read(tmp_path, inner + outer) == ((0, 1, 2, 3), ())
    # a filter that does not fit leaves the outer one in force
    other = inner.replace("{scale: 1}", "{scale: [{filter: down_proj, value: 0}]}")
    assert read(tmp_path, other + outer) == (tuple(range(8)), (4, 5, 6, 7))


def test_anchors_and_long_names_are_read(tmp_path: Path) -> None:
    text = """
slices:
  - sources:
      - model: &base {model: {path: some/llama}}
        layer_range: [0, 4]
  - sources:
      - {model: *base, layer_range: [6, 8]}
merge_method: passthrough
"""
    assert read(tmp_path, text) == ((4, 5), (4, 5))


REFUSED: dict[str, tuple[str, str]] = {
    "a layer twice": (taken("[0, 5]", "[4, 8]"), "layer 4"),
    "a model upon itself": (taken("[0, 8]", "[0, 8]"), "layer 0"),
    "layers out of order": (taken("[4, 8]", "[0, 4]"), "layer 0"),
    "two models": (taken("[0, 4]", "[4, 8]").replace("some/llama", "other/llama", 1), "other/llama"),
    "another method": (taken("[0, 8]", method="slerp"), "slerp"),
    "no method": (taken("[0, 8]").replace("merge_method: passthrough\n", ""), "merge_method"),
    "beyond the model": (taken("[0, 9]"), "8"),
    "nothing taken": (taken("[3, 3]"), "layer_range"),
    "backwards": (taken("[5, 3]"), "layer_range"),
    "negative": (taken("[-1, 3]"), "layer_range"),
    "three ends": (taken("[0, 3, 5]"), "layer_range"),
    "ends of text": (taken("[a, b]"), "'a', 'b'"),
    "ends of floats": (taken("[0.0, 8.0]"), "layer_range"),
    "other digits": (taken("[\u0660, 8]"), "layer_range"),
    "no range": (taken("").replace("layer_range: ", ""), ""),
    "range a text": (taken("all"), "layer_range"),
    "slices a text": ("slices: all\nmerge_method: passthrough\n", "slices"),
    "no slices": ("slices: []\nmerge_method: passthrough\n", "slices"),
    "a slice a text": ("slices: [all]\nmerge_method: passthrough\n", "slices[0]"),
    "no sources": ("slices: [{sources: []}]\nmerge_method: passthrough\n", "slices[0]"),
    "a source a text": ("slices: [{sources: [x]}]\nmerge_method: passthrough\n", "slices[0]"),
    "no model": ("slices: [{sources: [{layer_range: [0, 8]}]}]\nmerge_method: passthrough\n", "model"),
    "two sources": (
        "slices: [{sources: [{model: a, layer_range: [0, 8]}, {model: a, layer_range: [0, 8]}]}]\n"
        "merge_method: passthrough\n",
        "2 sources",
    ),
    "half a scale": (taken("[0, 8]") + "parameters: {scale: [{filter: o_proj, value: 0.5}]}\n", "0.5"),
    "everything scaled": (taken("[0, 8]") + "parameters: {scale: 0}\n", "embed_tokens"),
    "queries scaled": (taken("[0, 8]") + "parameters: {scale: [{filter: q_proj, value: 0.7}]}\n", "q_proj"),
    "a gradient": (taken("[0, 8]") + "parameters: {scale: [0, 0.5, 1]}\n", "layer to layer"),
    "a gradient in a filter": (taken("[0, 8]") + "parameters: {scale: [{filter: o_proj, value: [0, 1]}]}\n", "a list"),
    "a layer in a filter": (taken("[0, 8]") + "parameters: {scale: [{filter: layers.3., value: 2}]}\n", "layers.3."),
    "not a number": (taken("[0, 8]") + "parameters: {scale: [{filter: o_proj, value: zero}]}\n", "zero"),
    "NaN": (taken("[0, 8]") + "parameters: {scale: [{filter: o_proj, value: .nan}]}\n", "nan"),
    "another parameter": (taken("[0, 8]") + "parameters: {density: 0.5}\n", "density"),
    "parameters a text": (taken("[0, 8]") + "parameters: scale\n", "parameters"),
    "an unknown key": (taken("[0, 8]") + "random_seed: 3\n", "random_seed"),
    "modules": (taken("[0, 8]") + "modules: {}\n", "modules"),
    "a key twice": (taken("[0, 8]") + "dtype: float16\n", "twice"),
    "a merge key": (taken("[0, 8]") + "<<: {dtype: float16}\n", "'<<'"),
    "no YAML": ("slices: [\n", "neither JSON nor YAML"),
    "a tag": ("slices: !!python/object/apply:os.system [true]\n", ""),
    "two documents": ("slices: []\n---\nslices: []\n", "neither JSON nor YAML"),
    "an unknown anchor": ("slices: *nowhere\n", "nowhere"),
    "itself": ("slices: &a [*a]\nmerge_method: passthrough\n", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_merges_that_do_more_than_leave_out_are_refused(tmp_path: Path, case: str) -> None:
    text, word = REFUSED[case]
    assert word in refused(tmp_path, text)


def bomb(kind: str) -> str:
    """Nine levels of nine references each, under a key that is read and not obeyed: 9 ** 9 entries written out."""
    lines = ["tokenizer:", "  a0: &a0 [x]" if kind == "lists" else "  a0: &a0 {x: y}"]
    for level in range(1, 10):
        refs = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"  a{level}: &a{level} " + (f"[{refs}]" if kind == "lists" else f"{{<<: [{refs}]}}"))
    return "\n".join([*lines, "merge_method: passthrough", ""])


HOSTILE: dict[str, bytes] = {
    "lists": (bomb("lists") + "slices: *a9\n").encode(),
    "merge keys": (bomb("merge") + "slices: *a9\n").encode(),
    "a model": (bomb("lists") + "slices: [{sources: [{model: *a9, layer_range: [0, 8]}]}]\n").encode(),
    "a path": (bomb("lists") + "slices: [{sources: [{model: {model: {path: *a9}}, layer_range: [0, 8]}]}]\n").encode(),
    "a range": (bomb("lists") + "slices: [{sources: [{model: m, layer_range: *a9}]}]\n").encode(),
    "ends of a range": (bomb("lists") + "slices: [{sources: [{model: m, layer_range: [*a9, *a9]}]}]\n").encode(),
    "parameters": (bomb("lists") + taken("[0, 8]").replace("merge_method", "parameters: *a9\n#")).encode(),
    "a scale": (bomb("lists") + taken("[0, 8]").replace("merge_method", "parameters: {scale: *a9}\n#")).encode(),
    "a method": (bomb("lists").replace("passthrough", "*a9") + "slices: []\n").encode(),
    "deep": b"x: " + b"[" * 100_000,
    "above 1 MiB": b"x: 1".ljust((1 << 20) + 1),
    "not UTF-8": b"slices: \xff",
    "control characters": b"slices: \x1b[2J",
    "an escape beyond all characters": rb'slices: "\U00110000"',
    "many digits": b"slices: " + b"9" * 100_000,
    "minutes and seconds": b"slices: " + b"59:" * 100_000 + b"59",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    """Some of them would take minutes or all memory."""
    refused(tmp_path, HOSTILE[case])


def test_size_and_depth_are_looked_at_before_the_parser_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mergekit._Texts, "get_single_data", lambda self: pytest.fail("the YAML was parsed"))
    assert "65537 bytes" in refused(tmp_path, b"x: 1".ljust((1 << 16) + 1))
    assert "deeper than 16" in refused(tmp_path, b"x: " + b"[" * 17)
