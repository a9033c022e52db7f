"""The native format: every specification comes back from its folder; a folder that is not what it says is refused."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pyruntime import LLM
from pyruntime.checkpoint import Model, ReadOptions, Weight, read_model
from pyruntime.checkpoint.manifest import MANIFEST
from pyruntime.checkpoint.native import native_config
from pyruntime.checkpoint.writer import write_native, write_pruned
from pyruntime.errors import PyruntimeError, RunError, UsageError
from pyruntime.passes import drop
from pyruntime.spec import DropPlan, Head, ModelSpec, MoE, NormKind, weight_shapes
from tests import naive
from tests.checkpoint import schema
from tests.checkpoint.craft import watched_reads
from tests.helpers import all_logits, make_plan, relative_error
from tests.specs import (
    ATTENTION,
    ATTENTIONS,
    MLPS,
    ODD_MODELS,
    PLAIN_MLP,
    VOCAB,
    D,
    as_arrays,
    lin,
    model_of,
    random_model,
    random_weights,
    rms,
)

TOKENS = [(5 * i * i + 3 * i) % VOCAB for i in range(13)]
SKIPLESS = model_of(
    [(replace(ATTENTION, residual=False, q=None, o=None, pre=None), replace(PLAIN_MLP, residual=False), False)],
    final_norm=None,
)
# queries, keys and values are 48 values: the 24 of the stream, and 24 of a narrow map, in any order
PIVOTED = replace(
    ATTENTION, q=None, k=None, v=None, pre=None, columns=tuple(7 * i % 48 for i in range(48)), rest=lin(D, 24)
)
MIXTURE = MoE(
    num_experts=3, top_k=2, router=lin(D, 3), gate=lin(D, 8), up=lin(D, 8), down=lin(8, D),
    activation=PLAIN_MLP.activation, shared=replace(PLAIN_MLP, pre=None), shared_gate=lin(D, 1), pre=rms(),
)  # fmt: skip
SPECS: dict[str, ModelSpec] = {
    **{f"attention, {name}": model_of([(each, PLAIN_MLP, False)]) for name, each in ATTENTIONS.items()},
    **{f"mlp, {name}": model_of([(ATTENTION, each, False)]) for name, each in MLPS.items()},
    **ODD_MODELS,
    "skipless": SKIPLESS,
    "pivoted": model_of([(PIVOTED, PLAIN_MLP, False)]),
    "mixture": model_of([(ATTENTION, MIXTURE, False)]),
    "nothing left": model_of([(None, None, False)]),
}


def written(spec: ModelSpec, out: Path, dtype: str = "float32", **options: Any) -> Path:
    write_native(random_model(spec), out, dtype=dtype, **options)
    return out


@pytest.mark.parametrize("name", SPECS)
def test_every_specification_comes_back_with_its_weights(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    folder = written(spec, tmp_path / "model", shard_bytes=20_000)
    model = read_model(folder)
    assert (model.spec, model.dense_spec, model.dtype, model.notes) == (spec, spec, "float32", ())
    expected = random_weights(spec, torch.float32)
    stored: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            stored |= {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
    assert stored.keys() == expected.keys() == weight_shapes(spec).keys()
    assert all(torch.equal(stored[each], expected[each]) for each in stored)
    assert all(torch.equal(weight.read(), expected[each]) for each, weight in model.weights.items())


@pytest.mark.parametrize("name", ["attention, window", "skipless", "merged, parallel, chained"])
def test_what_comes_back_computes_what_the_formulas_say(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    expected = naive.logits(spec, as_arrays(random_weights(spec, torch.float32)), TOKENS)
    (found,) = all_logits(make_plan(written(spec, tmp_path / "model"), dtype="float64"), [TOKENS], 64)
    assert relative_error(found, torch.from_numpy(expected)) < 1e-10


@pytest.mark.parametrize("name", SPECS)
def test_what_is_written_follows_the_published_schema(name: str, tmp_path: Path) -> None:
    config = json.loads((written(SPECS[name], tmp_path / "model") / "config.json").read_text())
    assert schema.faults(config, schema.schema(), schema.schema()) == []
    skipless = name == "skipless"
    assert config["model_type"] == ("skipless" if skipless else "pyruntime")


def test_the_published_schema_is_that_of_the_specification() -> None:
    """`python -m tests.checkpoint.schema` writes it anew."""
    assert schema.FILE.read_text() == schema.text()


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["spec"].pop("layers"),
        lambda config: config.update(extra=1),
        lambda config: config["spec"]["layers"][0].update(extra=1),
        lambda config: config["spec"]["layers"][0]["attention"].update(num_heads=1.5),
        lambda config: config["spec"]["layers"][0]["mlp"].update(activation="tanh"),
        lambda config: config["spec"]["layers"][0]["mlp"].update(kind_of_sublayer="attention"),
        lambda config: config["spec"]["head"].update(tied=1),
        lambda config: config.update(format_version=2),
    ],
)
def test_the_schema_and_the_reader_refuse_the_same(change: Callable[[Any], object], tmp_path: Path) -> None:
    folder = written(SKIPLESS, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    change(config)
    assert schema.faults(config, schema.schema(), schema.schema()) != []
    assert refused(folder, config)[0] == "CONFIG"


def refused(folder: Path, config: Any) -> tuple[str, str]:
    """Code and words of the refusal of `folder` with this config.json; no tensor byte is read for it."""
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    begin = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    with watched_reads() as seen, pytest.raises(PyruntimeError) as caught:
        read_model(folder)
    assert all(end <= begin for _, end in seen)
    assert caught.value.exit_code in (2, 3)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000
    return caught.value.code, str(caught.value)


def edited(**changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(native_config(SKIPLESS, "float32", {}))), **changes}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in edited().items() if name != key}


BAD: dict[str, tuple[Any, str]] = {
    "no version": (
        without("format_version"),
        "format_version is None",
    ),
    "a later version": (edited(format_version=2), "format_version is 2; this release reads 1"),
    "true as version": (edited(format_version=True), "format_version is True"),
    "no spec": (without("spec"), "model is NoneType"),
    "a spec that is no object": (edited(spec=[]), "model is list"),
    "an unknown key": (edited(rope_theta=5), "unknown keys: rope_theta"),
    "quantised weights": (edited(quantization_config={"bits": 4}), "unknown keys: quantization_config"),
    "a path": (edited(weights="../../etc/passwd"), "unknown keys: weights"),
    "another vocabulary": (edited(vocab_size=38), "vocab_size is 38; by its spec it is 37"),
    "another width": (edited(hidden_size=D + 1), "hidden_size is 25; by its spec it is 24"),
    "another number of layers": (edited(num_hidden_layers=True), "num_hidden_layers is True; by its spec it is 1"),
    "another context": (edited(max_position_embeddings=None), "max_position_embeddings is None"),
    "another head": (edited(tie_word_embeddings=True), "tie_word_embeddings is True; by its spec it is False"),
    "another class": (edited(architectures=["LlamaForCausalLM"]), "architectures"),
    "skips under the name of skipless": (
        edited(spec=native_config(model_of([(ATTENTION, None, False)]), "float32", {})["spec"]),
        "model_type is skipless; by its spec it is pyruntime",
    ),
    "a family that a terminal would obey": (
        edited(spec={**edited()["spec"], "family": "\x1b[2J"}),
        "is no name",
    ),
    "a family that is a book": (edited(spec={**edited()["spec"], "family": "x" * 65}), "is no name"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_configuration_that_is_not_clear_is_refused(name: str, tmp_path: Path) -> None:
    config, words = BAD[name]
    code, message = refused(written(SKIPLESS, tmp_path / "model"), config)
    assert code == "CONFIG"
    assert words in message


def test_more_experts_than_a_file_may_have_tensors_are_refused_before_they_are_counted_up(tmp_path: Path) -> None:
    many = replace(MIXTURE, num_experts=4096, router=lin(D, 4096))
    spec = model_of([(None, many, False)] * 100)
    code, message = refused(written(SKIPLESS, tmp_path / "model"), native_config(spec, "float32", {}))
    assert (code, "409600 experts" in message) == ("CONFIG", True)


def test_only_this_format_may_have_a_long_configuration(tmp_path: Path) -> None:
    folder = written(SKIPLESS, tmp_path / "model")
    long, too_long = (
        json.dumps(edited(spec={**edited()["spec"], "pad": "x" * count})) for count in (2_000_000, 20_000_000)
    )
    assert "unknown fields ['pad']" in refused(folder, long)[1]
    assert "at most 16777216 are read" in refused(folder, too_long)[1]
    other = json.dumps({"model_type": "llama", "pad": "x" * 2_000_000})
    assert "at most 1048576 are read" in refused(folder, other)[1]


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str, str]] = {
    "one is missing": (lambda tensors: tensors.pop("head.weight"), "MISSING_TENSOR", "missing: head.weight"),
    "one too many": (lambda t: t.update({"layers.0.attention.q.weight": torch.ones(24, D)}), "UNEXPECTED_TENSOR", "q."),
    "a name of another format": (
        lambda t: t.update({"model.norm.weight": torch.ones(D)}), "UNEXPECTED_TENSOR", "not in its spec: model.norm"
    ),
    "turned": (
        lambda t: t.update({"layers.0.mlp.up.weight": t["layers.0.mlp.up.weight"].T.contiguous()}), "SHAPE", "[24, 40]"
    ),
    "whole numbers": (lambda t: t.update({"head.weight": t["head.weight"].int()}), "DTYPE", "head.weight is I32"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_must_be_those_of_the_specification(name: str, tmp_path: Path) -> None:
    harm, code, words = TENSORS[name]
    folder = written(SKIPLESS, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    harm(tensors)
    save_file(tensors, folder / "model.safetensors")
    found, message = refused(folder, edited())
    assert (found, words in message) == (code, True), message


def test_a_tied_head_must_not_be_stored(tmp_path: Path) -> None:
    spec = replace(SKIPLESS, head=Head(linear=lin(D, VOCAB), tied=True))
    folder = written(spec, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "head.weight": torch.ones(VOCAB, D)}, folder / "model.safetensors")
    code, message = refused(folder, native_config(spec, "float32", {}))
    assert (code, "head.weight" in message) == ("UNEXPECTED_TENSOR", True)


def test_keys_that_the_user_calls_harmless_are_passed_over(tmp_path: Path) -> None:
    folder = written(SKIPLESS, tmp_path / "model")
    config = edited(author="x")
    refused(folder, config)
    assert read_model(folder, ReadOptions(ignore_config_keys=["author"])).spec == SKIPLESS


def test_sublayers_can_be_dropped_and_written_again(tmp_path: Path) -> None:
    spec = model_of([(ATTENTION, PLAIN_MLP, True), (ATTENTIONS["biases"], MLPS["biases"], False)])
    source, plan = written(spec, tmp_path / "source"), DropPlan(attention=(1,), mlp=(0, 1))
    dropped = drop(read_model(source), plan)
    write_pruned(source, plan, tmp_path / "hf")
    model = read_model(tmp_path / "hf")
    assert model.spec == dropped.spec
    assert all(torch.equal(model.weights[name].read(), dropped.weights[name].read()) for name in dropped.weights)
    write_pruned(source, plan, tmp_path / "zeros", dialect="zeros")
    assert read_model(tmp_path / "zeros").spec == spec
    expected = naive.logits(dropped.spec, as_arrays(random_weights(spec, torch.float32)), TOKENS)
    for name in ("hf", "zeros"):
        (found,) = all_logits(make_plan(tmp_path / name, dtype="float64"), [TOKENS], 64)
        assert relative_error(found, torch.from_numpy(expected)) < 1e-10
    with pytest.raises(UsageError, match="LLM-Drop cannot read"):
        write_pruned(source, plan, tmp_path / "lists", dialect="llm-drop")


def test_a_post_norm_with_a_bias_is_silenced_too(tmp_path: Path) -> None:
    biased = rms(kind=NormKind.LAYER, bias=True)
    spec = model_of([(replace(ATTENTION, post=biased), replace(PLAIN_MLP, post=biased), False)])
    source = written(spec, tmp_path / "source")
    write_pruned(source, DropPlan(attention=(0,)), tmp_path / "zeros", dialect="zeros")
    kept = drop(read_model(source), DropPlan(attention=(0,))).spec
    expected = naive.logits(kept, as_arrays(random_weights(spec, torch.float32)), TOKENS)
    (found,) = all_logits(make_plan(tmp_path / "zeros", dtype="float64"), [TOKENS], 64)
    assert relative_error(found, torch.from_numpy(expected)) < 1e-10


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_rounded_to_the_dtype_that_is_asked_for(dtype: str, tmp_path: Path) -> None:
    model = read_model(written(SKIPLESS, tmp_path / "model", dtype))
    assert (model.dtype, model.config["dtype"]) == (dtype, dtype)
    expected = random_weights(SKIPLESS)
    for name, weight in model.weights.items():
        assert torch.equal(weight.read(), expected[name].to(getattr(torch, dtype)))


def test_without_a_dtype_weights_keep_their_own_and_float64_becomes_that_of_the_checkpoint(tmp_path: Path) -> None:
    wide, narrow = random_model(SKIPLESS), random_model(SKIPLESS, torch.bfloat16)
    mixed = {**wide.weights, "embedding.weight": narrow.weights["embedding.weight"]}
    write_native(replace(wide, weights=mixed, dtype="float16"), tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        name: torch.bfloat16 if name == "embedding.weight" else torch.float16 for name in mixed
    }
    with pytest.raises(UsageError, match="'float64' cannot be stored") as caught:
        write_native(wide, tmp_path / "other")
    assert caught.value.code == "DTYPE"


def test_values_beyond_a_dtype_are_an_error(tmp_path: Path) -> None:
    model = random_model(SKIPLESS)
    for value, dtype in ((1e5, "float16"), (float("nan"), "float32")):
        model.weights["layers.0.mlp.up.weight"].read()[1, 2] = value
        with pytest.raises(RunError, match=rf"layers.0.mlp.up.weight .*as {dtype}") as caught:
            write_native(model, tmp_path / "out", dtype=dtype)
        assert (caught.value.code, caught.value.exit_code) == ("NUMERICS", 4)
        assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True, eq=False)
class Made:
    """A weight that is computed when it is read; `alive` are the tensors so made that are still there."""

    shape: tuple[int, ...]
    alive: weakref.WeakSet[torch.Tensor]
    most: list[int]

    num_bytes = 0

    def refs(self) -> Iterator[Weight]:
        return iter(())

    def read(self) -> torch.Tensor:
        tensor = torch.ones(self.shape)
        self.alive.add(tensor)
        self.most.append(len(self.alive))
        return tensor


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most: list[int] = []
    weights = {name: Made(shape, alive, most) for name, shape in weight_shapes(SKIPLESS).items()}
    write_native(Model(spec=SKIPLESS, dense_spec=SKIPLESS, weights=weights, dtype="float32"), tmp_path / "out")
    assert len(most) == len(weights) > 5
    assert max(most) == 1


def test_a_text_model_says_the_same_from_a_native_folder(text_model: tuple[Path, Any], tmp_path: Path) -> None:
    """Tokenizer, chat template and settings go along; ids at which to stop stay in config.json."""
    source = text_model[0]
    model = read_model(source)
    write_native(model, tmp_path / "out", made={"what": "nothing"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    told = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert {key: config.get(key) for key in told} == {key: model.config.get(key) for key in told}
    made = json.loads((tmp_path / "out" / MANIFEST).read_text())["made"]
    assert (made["what"], made["format"], made["from"]["name"]) == ("nothing", "pyruntime", source.name)
    texts = [LLM(folder).generate(["the cat", "a"])[0].outputs[0].text for folder in (source, tmp_path / "out")]
    assert texts[0] == texts[1] != ""
