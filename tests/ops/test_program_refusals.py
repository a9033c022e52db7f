"""What the C++ executor refuses: every size, place, id and address, with what was found and what was expected."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyruntime.errors import UsageError
from pyruntime.graph import build
from pyruntime.ops import _native
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan import lower
from tests.specs import ATTENTION as SPEC_ATTENTION
from tests.specs import PLAIN_MLP, model_of, random_model

VOCAB, SIZE, HEADS, HEAD_DIM = 37, 24, 2, 6
# places: three of all rows, one of wanted rows, the logits
WIDTHS = [(SIZE, 0), (48, 0), (SIZE, 0), (0, SIZE), (0, VOCAB)]
# enough for every weight of the steps here
MEMORY = torch.zeros(4096)
ADDRESS = MEMORY.data_ptr()
# C++ holds addresses only
KEPT: list[torch.Tensor] = []


def norm(**changes: Any) -> SimpleNamespace:
    fields = {"size": SIZE, "eps": 1e-5, "centered": False, "gain": (ADDRESS, SIZE), "bias": None}
    return SimpleNamespace(**{**fields, **changes})


def matrix(inputs: int, outputs: int, **changes: Any) -> SimpleNamespace:
    words = (ADDRESS, -(-outputs // 16) * 16 * inputs)
    fields = {"inputs": inputs, "outputs": outputs, "dtype": "float32", "words": words, "bias": None, "starts": None}
    return SimpleNamespace(**{**fields, **changes})


def cut(*starts: int) -> SimpleNamespace:
    """A matrix of 80 outputs, a group of four panels and one of one, whose panels start at these words."""
    memory = torch.tensor(starts)
    KEPT.append(memory)
    return matrix(SIZE, 80, words=(ADDRESS, starts[-1]), starts=(memory.data_ptr(), len(starts)))


def numbers(*values: int) -> tuple[int, int]:
    """Memory of as many int32."""
    memory = torch.tensor(values, dtype=torch.int32)
    KEPT.append(memory)
    return memory.data_ptr(), len(values)


ATTENTION = {"num_heads": HEADS, "num_kv_heads": 1, "head_dim": HEAD_DIM, "slot": 0, "cache_dtype": "float32"}
STEPS: dict[str, dict[str, Any]] = {
    "embed": {
        "table": (ADDRESS, VOCAB * SIZE),
        "dtype": "float32",
        "in_panels": False,
        "size": SIZE,
        "scale": 1.0,
        "num_positions": 60,
        "position_table": (ADDRESS, 60 * SIZE),
        "out": 0,
    },
    "norm": {"norm": norm(), "input": 0, "residual": 2, "out": 1},
    "linear": {"norm": norm(), "matrix": matrix(SIZE, 48), "input": 0, "residual": None, "out": 1},
    "qkv_rope": {
        **ATTENTION,
        "norm": norm(),
        "matrix": matrix(SIZE, 24),
        "q_norm": None,
        "k_norm": None,
        "v_norm": None,
        "q_column": 0,
        "k_column": 36,
        "v_column": 42,
        "q_columns": None,
        "k_columns": None,
        "v_columns": None,
        "rotary": 0,
        "input": 0,
        "out": 1,
    },
    "attention": {
        **ATTENTION,
        "window": 0,
        "scale": 0.4,
        "softcap": 0.0,
        "slopes": (ADDRESS, HEADS),
        "softmax_gain": (ADDRESS, HEADS),
        "identity_gain": (ADDRESS, HEADS),
        "centre_gain": (ADDRESS, HEADS),
        "input": 0,
        "out": 1,
    },
    "mlp": {
        "norm": norm(),
        "sub": None,
        "gate_up": matrix(SIZE, 96),
        "down": matrix(40, SIZE),
        "gated": True,
        "activation": "silu",
        "input": 0,
        "residual": 0,
        "out": 2,
    },
    "add": {"width": SIZE, "input": 0, "other": 2, "out": 1},
    "gather": {"width": SIZE, "input": 0, "out": 3, "wanted": True},
    "head": {"norm": norm(), "matrix": matrix(SIZE, VOCAB), "softcap": 0.0, "input": 3, "out": 4, "wanted": True},
}


def make(**changes: Any) -> Any:
    native = _native.load()
    fields = {"isa": native.isa, "num_threads": 1, "vocab_size": VOCAB, "num_slots": 1, "widths": WIDTHS}
    return native.module.Program(**{**fields, **changes})


def rotary(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"half": 2, "frequencies": (ADDRESS, 2), "factor": 1.0, "wanted": False, **changes})


def add(program: Any, op: str, **changes: Any) -> None:
    program.add(op, SimpleNamespace(**{"wanted": False, **STEPS[op], **changes}))


def whole_program() -> Any:
    program = make()
    program.add_rotary(rotary())
    for op in STEPS:
        add(program, op)
    return program


def test_the_steps_here_are_right_as_they_stand() -> None:
    assert whole_program().num_steps == len(STEPS)


BAD_STEPS: list[tuple[str, dict[str, Any], str]] = [
    ("embed", {"size": 0}, "size is 0; expected 1 to"),
    ("embed", {"size": 1 << 40}, f"size is {1 << 40}; expected 1 to"),
    ("embed", {"size": SIZE + 1}, "out is place 0 of 24 values a row; expected 25"),
    ("embed", {"out": 5}, "out is place 5; expected 0 to 4"),
    ("embed", {"out": -1}, "out is place -1; expected 0 to 4"),
    ("embed", {"table": (ADDRESS, VOCAB * SIZE - 1)}, "table holds 887 elements; expected 888"),
    ("embed", {"table": None}, "the embedding has no table"),
    ("embed", {"table": (ADDRESS + 1, VOCAB * SIZE)}, "table is at address .*; expected memory aligned to 4"),
    ("embed", {"table": (0, VOCAB * SIZE)}, "table is at address 0"),
    ("embed", {"in_panels": True}, "table holds 888 elements; expected 1152"),
    ("embed", {"dtype": "float16"}, "dtype is 'float16'; expected float32 or bfloat16"),
    ("embed", {"scale": float("inf")}, "scale is inf; expected a finite number"),
    ("embed", {"position_table": (ADDRESS, 60 * SIZE - 1)}, "position_table holds 1439 elements; expected 1440"),
    ("embed", {"num_positions": -1}, "num_positions is -1; expected 0 to"),
    ("norm", {"norm": None}, "a norm step has no norm"),
    ("norm", {"norm": norm(eps=-1.0)}, "eps is -1; expected at least 0"),
    ("norm", {"norm": norm(eps=float("nan"))}, "eps is nan; expected a finite number"),
    ("norm", {"norm": norm(gain=(ADDRESS, 23))}, "gain holds 23 elements; expected 24"),
    ("norm", {"norm": norm(size=25, gain=None)}, "input is place 0 of 24 values a row; expected 25"),
    ("norm", {"residual": 3}, "residual is place 3 of 0 values a row; expected 24"),
    ("linear", {"norm": norm(size=20, gain=None)}, "a norm spans 20 values; its input has 24"),
    ("linear", {"matrix": matrix(SIZE, 49)}, "out is place 1 of 48 values a row; expected 49"),
    ("linear", {"matrix": matrix(SIZE, 48, words=(ADDRESS, 5))}, "words holds 5 elements; expected 1152"),
    ("linear", {"matrix": matrix(SIZE, 48, words=None)}, "a matrix of 48 outputs has no words"),
    ("linear", {"matrix": matrix(SIZE, 48, bias=(ADDRESS, 47))}, "bias holds 47 elements; expected 48"),
    ("linear", {"matrix": matrix(SIZE, 48, dtype="int8")}, "dtype is 'int8'; expected float32 or bfloat16"),
    ("linear", {"matrix": cut(0, 1536)}, "starts holds 2 elements; expected 3"),
    ("linear", {"matrix": cut(64, 1536, 1920)}, "the first panel starts at word 64; expected 0"),
    (
        "linear",
        {"matrix": cut(0, 1600, 1984)},
        "panels from 0 on lie from word 0 to 1600; expected up to 24 units of 64",
    ),
    (
        "linear",
        {"matrix": cut(0, 1530, 1914)},
        "panels from 0 on lie from word 0 to 1530; expected up to 24 units of 64",
    ),
    ("linear", {"matrix": cut(0, 1536, 1520)}, "panels from 4 on lie from word 1536 to 1520; expected up to 24 units"),
    ("linear", {"matrix": cut(0, 1536, 1936)}, "panels from 4 on lie from word 1536 to 1936; expected up to 24 units"),
    ("linear", {"residual": 0}, "residual is place 0 of 24 values a row; expected 48"),
    ("qkv_rope", {"num_heads": 3, "num_kv_heads": 2}, "3 heads are not a multiple of 2 key heads"),
    # the input has 24 values, the product behind it too
    ("qkv_rope", {"q_column": 13}, "q_column is 13 with room for 11 values; expected 12"),
    ("qkv_rope", {"q_column": 37}, "q_column is 37 with room for 11 values; expected 12"),
    ("qkv_rope", {"k_column": 19}, "k_column is 19 with room for 5 values; expected 6"),
    ("qkv_rope", {"k_column": 48}, "k_column is 48 with room for 0 values; expected 6"),
    ("qkv_rope", {"v_column": -2}, "v_column is -2; expected 0 to 48, or -1"),
    ("qkv_rope", {"k_column": 49}, "k_column is 49; expected 0 to 48"),
    # near the least number of 64 bits a difference to it would wrap around
    ("qkv_rope", {"v_column": -(1 << 63)}, "v_column is -9223372036854775808; expected 0 to 48"),
    ("qkv_rope", {"k_column": 0, "k_columns": numbers(0, 5, 47, 3, 48, 1)}, "k_columns holds 48; expected 0 to 47"),
    ("qkv_rope", {"k_column": 0, "k_columns": numbers(0, 5, -1, 3, 4, 1)}, "k_columns holds -1; expected 0 to 47"),
    ("qkv_rope", {"k_column": 0, "k_columns": numbers(0, 5, 1)}, "k_columns holds 3 elements; expected 6"),
    ("qkv_rope", {"k_columns": numbers(*range(6))}, "k_column is 36 beside k_columns; expected 0"),
    ("qkv_rope", {"v_column": -1, "v_columns": numbers(*range(6))}, "v_column is -1 beside v_columns; expected 0"),
    ("qkv_rope", {"v_norm": norm(size=5, gain=None)}, "a norm spans 5 values; its input has 6"),
    ("qkv_rope", {"v_column": -1}, "keys and values must both be computed, or neither"),
    ("qkv_rope", {"q_norm": norm(size=5, gain=None)}, "a norm spans 5 values; its input has 12"),
    ("qkv_rope", {"rotary": 1}, "table of angles 1 of 1"),
    ("qkv_rope", {"wanted": True, "input": 3}, "table of angles 0 is of the other view"),
    ("qkv_rope", {"slot": 1}, "cache slot 1 of 1"),
    ("qkv_rope", {"cache_dtype": "float64"}, "cache_dtype is 'float64'; expected float32 or bfloat16"),
    ("attention", {"head_dim": 13}, "input is place 0 of 24 values a row; expected 26"),
    ("attention", {"window": -1}, "window is -1; expected 0 to"),
    ("attention", {"slot": 1}, "cache slot 1 of 1"),
    ("attention", {"slopes": (ADDRESS, 3)}, "slopes holds 3 elements; expected 2"),
    ("attention", {"softmax_gain": None}, "shaped attention has some of its three gains; expected all or none"),
    ("attention", {"centre_gain": None}, "shaped attention has some of its three gains; expected all or none"),
    ("attention", {"identity_gain": (ADDRESS, 1)}, "identity_gain holds 1 elements; expected 2"),
    ("attention", {"scale": float("nan")}, "scale is nan; expected a finite number"),
    ("mlp", {"activation": "swish"}, "activation is 'swish'; expected silu, gelu, gelu_tanh, relu or relu2"),
    ("mlp", {"gate_up": matrix(SIZE, 80)}, "gate_up gives 80 values; down needs 96"),
    ("mlp", {"gated": False}, "gate_up gives 96 values; down needs 40"),
    ("mlp", {"down": matrix(40, 25)}, "residual is place 0 of 24 values a row; expected 25"),
    ("mlp", {"sub": norm()}, "a norm spans 24 values; its input has 40"),
    ("add", {"width": 25}, "is place . of 24 values a row; expected 25"),
    ("gather", {"wanted": False, "out": 0}, "a gather gives the wanted rows"),
    ("head", {"matrix": matrix(SIZE, 38)}, "the head gives 38 logits; the vocabulary has 37"),
]


@pytest.mark.parametrize("op, changes, said", BAD_STEPS)
def test_a_bad_step_is_refused(op: str, changes: dict[str, Any], said: str) -> None:
    program = make()
    program.add_rotary(rotary())
    with pytest.raises(ValueError, match=said):
        add(program, op, **changes)
    assert program.num_steps == 0


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match="op 'conv' is not known"):
        make().add("conv", SimpleNamespace(wanted=False))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"half": 0}, "half is 0; expected 1 to"),
        ({"frequencies": (ADDRESS, 3)}, "frequencies holds 3 elements; expected 2"),
        ({"frequencies": None}, "a rope has no frequencies"),
        ({"factor": float("inf")}, "factor is inf; expected a finite number"),
    ],
)
def test_a_bad_table_of_angles_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make().add_rotary(rotary(**changes))


def test_a_rope_wider_than_a_head_is_refused() -> None:
    program = make()
    program.add_rotary(rotary(half=4, frequencies=(ADDRESS, 4)))
    with pytest.raises(ValueError, match="rope turns 8 of 6 values"):
        add(program, "qkv_rope")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"isa": "sse9"}, "CPU path 'sse9' cannot run here; this CPU has generic"),
        ({"num_threads": -1}, "num_threads is -1; expected 1"),
        ({"num_threads": 1025}, "num_threads is 1025; expected 1 to 1024"),
        ({"vocab_size": 0}, "vocab_size is 0; expected 1 to"),
        ({"widths": []}, "a program needs a place for its logits"),
        ({"widths": [(-1, 0)]}, "a place of -1 and 0 values a row"),
    ],
)
def test_a_bad_program_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**changes)


KEYS = torch.zeros(3 * HEAD_DIM * 16)
GOOD_RUN: dict[str, Any] = {
    "begin": 0,
    "end": len(STEPS),
    "slices": [([5, 36, 0], 15, [2, 0], [0, 2])],
    "cache": {"num_pages": 3, "page_size": 16, "addresses": [(KEYS.data_ptr(), KEYS.data_ptr())]},
    "short": 0,
    "shift": 0,
    "logits": 2 * VOCAB,
}
MOST = (1 << 63) - 1
BAD_RUNS: list[tuple[dict[str, Any], str]] = [
    ({"end": len(STEPS) + 1}, f"steps 0 to {len(STEPS) + 1} of {len(STEPS)}"),
    ({"begin": 3, "end": 2}, "steps 3 to 2 of"),
    ({"begin": -1}, "steps -1 to"),
    ({"slices": [([5, 37], 0, [0], [])]}, "token id 37; expected 0 to 36"),
    ({"slices": [([-1], 0, [0], [])]}, "token id -1; expected 0 to 36"),
    ({"slices": [([], 0, [0], [])]}, "a slice has 0 tokens"),
    ({"slices": [([1], -1, [0], [])]}, "1 tokens from position -1; expected"),
    ({"slices": [([1, 2], 15, [0], [])]}, "a slice of 2 tokens from position 15 has 1 pages of 16"),
    ({"slices": [([1], 0, [], [])]}, "a slice of 1 tokens from position 0 has 0 pages of 16"),
    ({"slices": [([1], MOST, [0], [])]}, f"1 tokens from position {MOST} has 1 pages of 16"),
    # the last position does not fit 64 bits
    ({"slices": [([1, 2], MOST, [0], [])]}, f"2 tokens from position {MOST} has 1 pages of 16"),
    ({"slices": [([1] * 46, 15, [0, 1, 2, 0], [])]}, "a slice ends at position 61; the model embeds 60"),
    ({"slices": [([1], 0, [3], [])]}, "page 3; expected 0 to 2"),
    ({"slices": [([1], 0, [-1], [])]}, "page -1; expected 0 to 2"),
    ({"slices": [([1, 2], 0, [0], [2])]}, "wanted offset 2 .*expected ascending offsets below 2"),
    ({"slices": [([1, 2], 0, [0], [1, 0])]}, "wanted offset 0 behind 1; expected ascending"),
    ({"slices": [([1, 2], 0, [0], [0, 0])]}, "wanted offset 0 behind 0; expected ascending"),
    ({"slices": [([1, 2], 0, [0], [-1])]}, "wanted offset -1"),
    ({"cache": {**GOOD_RUN["cache"], "page_size": 24}}, "page_size is 24; expected a multiple of 16"),
    ({"cache": {**GOOD_RUN["cache"], "page_size": 0}}, "page_size is 0; expected 1 to"),
    ({"cache": {**GOOD_RUN["cache"], "addresses": []}}, "the cache has 0 slots; the plan has 1"),
    ({"short": 1}, "a workspace of .* bytes at address .*; expected .* bytes aligned to 64"),
    ({"shift": 4}, "a workspace of .* bytes at address .*; expected .* bytes aligned to 64"),
    ({"logits": 2 * VOCAB - 1}, "logits hold 73 values; expected 74"),
]


def run(program: Any, changes: dict[str, Any]) -> None:
    asked = {**GOOD_RUN, **changes}
    # the rows of the good run; a bad one is refused before its own are counted, or has fewer
    num_bytes = program.workspace_bytes(3, 2)
    memory = torch.zeros(num_bytes + 128, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + asked["shift"]
    workspace = (memory.data_ptr() + start, num_bytes - asked["short"])
    logits = torch.zeros(2 * VOCAB)
    given = asked["begin"], asked["end"], asked["slices"], SimpleNamespace(**asked["cache"])
    program.run(*given, workspace, (logits.data_ptr(), asked["logits"]))


def test_the_run_here_is_right_as_it_stands() -> None:
    run(whole_program(), {})


@pytest.mark.parametrize("changes, said", BAD_RUNS)
def test_a_bad_run_is_refused(changes: dict[str, Any], said: str) -> None:
    program = whole_program()
    with pytest.raises(ValueError, match=said):
        run(program, changes)


@pytest.mark.parametrize("rows, wanted", [(-1, 0), (0, -1), ((1 << 24) + 1, 0), (0, 1 << 40)])
def test_impossible_numbers_of_rows_are_refused(rows: int, wanted: int) -> None:
    for ask in (whole_program().regions, whole_program().workspace_bytes):
        with pytest.raises(ValueError, match=f"{rows} and {wanted} rows; expected 0 to {1 << 24} of each"):
            ask(rows, wanted)


@pytest.mark.parametrize(
    "bad, said",
    [
        (SequenceSlice([5, 37], 0, [0], []), "token id 37; expected 0 to 36"),
        (SequenceSlice([5], 0, [3], []), "page 3; expected 0 to 2"),
        (SequenceSlice([5, 6], 15, [0], []), "a slice of 2 tokens from position 15 has 1 pages of 16"),
        (SequenceSlice([5, 6], 0, [0], [2]), "wanted offset 2"),
    ],
)
def test_a_plan_refuses_a_bad_step_as_a_callers_mistake(bad: SequenceSlice, said: str) -> None:
    spec = model_of([(SPEC_ATTENTION, PLAIN_MLP, False)])
    plan = lower(build(spec), random_model(spec, torch.float32), target="cpu")
    with pytest.raises(UsageError, match=said) as caught:
        plan.run(make_step([bad], plan.new_cache(3, 16)))
    assert caught.value.code == "STEP"
    good = SequenceSlice([5, 6], 0, [0], [1])
    assert not plan.run(make_step([good], plan.new_cache(3, 16))).isnan().any()
