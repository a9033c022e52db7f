"""What a run does: the published shapes on a GPU, or all of it in the small, to try the program itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from pyruntime.bench import Shape, shape_spec
from pyruntime.spec import Activation, Attention, DropPlan, ModelSpec, NormKind, Rope, RopeKind, drop_sublayers

VARIANTS: Final = ("dense", "half", "merged", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes of everything that is measured. Model names are keys of `models`, in the order of their decode steps."""

    models: Mapping[str, ModelSpec]
    small_plans: tuple[tuple[str, str], ...]  # (variant, dtype) of small models that are checked as a whole
    gate_lengths: tuple[int, int]  # tokens of the two sequences that check a plan
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    kernel_models: tuple[str, ...]
    kernel_rows: tuple[int, ...]
    kernel_repeats: int
    nodes_per_graph: int
    attention_cases: tuple[tuple[int, int], ...]  # (batch, context) of the first of `kernel_models`
    compiled_models: tuple[str, ...]
    eager_model: str
    eager_tokens: int
    prefill_model: str
    prefill_lengths: tuple[int, ...]
    prompt_repeats: int
    tail: ModelSpec
    tail_kept: int  # layers in front that keep their attention
    tail_length: int
    long_model: str
    long_case: tuple[int, int]
    warmup: int
    replays: int
    passes: int
    bitwise_repeats: int
    replayed_steps: int
    probe_repeats: int
    copy_bytes: int
    read_bytes: int
    matmul_side: int
    chain_length: int
    num_barriers: int
    rotated_bytes: int
    compile_backend: str
    tests: tuple[str, ...]  # arguments of pytest
    num_test_processes: int
    sanitize: bool
    warm_up_compiler: bool


def full() -> Settings:
    """The run on a GPU of a data centre."""
    names = ("llama-3-8b", "llama-3.2-1b", "qwen2.5-0.5b", "llama-2-7b")
    # room for the new tokens behind a context that fills the model's own
    models = {name: replace(shape_spec(name), max_position=16384) for name in names}
    return Settings(
        models=models,
        small_plans=tuple((form, dtype) for form in VARIANTS for dtype in ("bfloat16", "float16")),
        # the first is longer than a page and a block of attention, the second shorter than either
        gate_lengths=(70, 5),
        batches=(1, 8, 64),
        contexts=(512, 4096),
        kernel_models=("llama-3-8b", "qwen2.5-0.5b"),
        kernel_rows=(1, 4, 16, 64),
        kernel_repeats=7,
        nodes_per_graph=16,
        # keys and values of 2 MB, 64 MB, 512 MB and 4 GB
        attention_cases=((1, 512), (1, 4096), (16, 1024), (64, 2048), (128, 8192)),
        compiled_models=("llama-3-8b", "llama-3.2-1b", "qwen2.5-0.5b"),
        eager_model="llama-3-8b",
        eager_tokens=20,
        prefill_model="llama-3-8b",
        prefill_lengths=(2048, 4096, 8192),
        prompt_repeats=5,
        # the layers of the 70B shape at half their widths: 35 GB
        tail=deep(models["llama-3-8b"], 80),
        tail_kept=45,
        tail_length=2048,
        long_model="llama-2-7b",
        long_case=(32, 4096),
        warmup=5,
        replays=30,
        passes=2,
        bitwise_repeats=50,
        replayed_steps=8,
        probe_repeats=10,
        copy_bytes=4 << 30,
        read_bytes=8 << 30,
        matmul_side=8192,
        chain_length=1000,
        num_barriers=1000,
        # twice the L2 of an H200
        rotated_bytes=128 << 20,
        compile_backend="inductor",
        tests=("tests/gpu",),
        num_test_processes=8,
        sanitize=True,
        warm_up_compiler=True,
    )


def tiny() -> Settings:
    """Every section in seconds, in Triton's interpreter too."""
    dense = tiny_spec(tied=False, qkv_bias=False)
    return Settings(
        models={"tiny": dense},
        small_plans=(("both", "bfloat16"),),
        gate_lengths=(6, 3),
        batches=(2,),
        contexts=(5,),
        kernel_models=("tiny",),
        kernel_rows=(3,),
        kernel_repeats=1,
        nodes_per_graph=1,
        attention_cases=((2, 20),),
        compiled_models=("tiny",),
        eager_model="tiny",
        eager_tokens=1,
        prefill_model="tiny",
        prefill_lengths=(9,),
        prompt_repeats=1,
        tail=deep(dense, 3),
        tail_kept=2,
        tail_length=9,
        long_model="tiny",
        long_case=(1, 17),
        warmup=0,
        replays=1,
        passes=2,
        bitwise_repeats=2,
        replayed_steps=1,
        probe_repeats=1,
        copy_bytes=1 << 16,
        read_bytes=1 << 14,
        matmul_side=64,
        chain_length=3,
        num_barriers=2,
        rotated_bytes=1 << 12,
        compile_backend="eager",
        tests=("tests/gpu/test_add_gather.py", "-k", "replace or refused"),
        num_test_processes=0,
        sanitize=False,
        warm_up_compiler=False,
    )


def tiny_spec(*, tied: bool, qkv_bias: bool) -> ModelSpec:
    """A model of two layers whose query heads are as wide as its stream, so that Q and P can be gone."""
    return Shape(
        source="made up",
        family="qwen2" if qkv_bias else "llama",
        hidden_size=64,
        ffn_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=97,
        max_position=64,
        tied_head=tied,
        norm=NormKind.RMS,
        norm_eps=1e-5,
        activation=Activation.SILU,
        gated=True,
        qkv_bias=qkv_bias,
        rope=Rope(kind=RopeKind.DEFAULT, dim=16, theta=10000.0),
    ).spec()


def deep(spec: ModelSpec, num_layers: int) -> ModelSpec:
    """`num_layers` layers like the first one of `spec`."""
    return replace(spec, layers=tuple(replace(spec.layers[0], index=i) for i in range(num_layers)))


def variant(spec: ModelSpec, name: str) -> ModelSpec:
    """`spec` as it is ("dense"), with the later half of its attentions dropped, with Q and P merged away, or both."""
    if name in ("merged", "both"):
        spec = merged(spec)
    if name in ("half", "both"):
        spec = without_attentions(spec, len(spec.layers) - len(spec.layers) // 2)
    return spec


def without_attentions(spec: ModelSpec, first: int) -> ModelSpec:
    """`spec` without the attentions of layer `first` and of those behind it."""
    return drop_sublayers(spec, DropPlan(tuple(range(first, len(spec.layers))), ()))


def merged(spec: ModelSpec) -> ModelSpec:
    """`spec` with attentions that read their queries from the stream and write to it without a projection.

    Only what a step costs is the same as in a model that was merged: nobody trained these weights.
    """
    layers = []
    for layer in spec.layers:
        attention = layer.attention
        assert isinstance(attention, Attention)
        layers.append(replace(layer, attention=replace(attention, q=None, o=None)))
    return replace(spec, layers=tuple(layers))
