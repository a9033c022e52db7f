"""What the native sampler writes to, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyruntime.errors import UsageError
from pyruntime.ops import _native
from pyruntime.ops.sample import SampleConfig
from pyruntime.ops.sample_native import NativeSampler, on_cpu
from tests.sampling import make_row

ISAS = _native.load().module.isa_available()
INF = float("inf")


def raw_arguments(logits: torch.Tensor, scratch: int, size: int, num_threads: int = 1) -> dict[str, Any]:
    rows, vocab = logits.shape
    return {
        "isa": _native.load().isa,
        "logits": logits.data_ptr(),
        "num_rows": rows,
        "vocab": vocab,
        "rows": list(range(rows)),
        "scratch": scratch,
        "scratch_size": size,
        "num_threads": num_threads,
    }


def aligned(memory: torch.Tensor) -> int:
    return -memory.data_ptr() % 64


def request(**change: Any) -> Any:
    neutral: dict[str, Any] = {"temperature": 1.0, "min_p": 0.0, "top_p": 1.0, "uniform": 0.5, "top_k": 0}
    neutral |= {"repetition": 1.0, "presence": 0.0, "frequency": 0.0, "allowed": None, "biased": [], "bias": []}
    neutral |= {"banned": [], "prompt": [], "output": [], "given": -1, "num_top": -1}
    return _native.load().module.SampleRequest(**neutral | change)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [1, 63, 257, 1000])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_only_the_scratch_memory_is_written(isa: str, vocab: int, num_threads: int) -> None:
    module = _native.load().module
    size = module.sample_scratch_size(vocab=vocab, num_threads=num_threads)
    memory = torch.full((size + 256,), 0xA5, dtype=torch.uint8)
    begin = aligned(memory) + 64
    # rows of NaN around the one that is asked for: they must not be read
    logits = torch.full((3, vocab), math.nan)
    logits[1] = make_row(1, vocab=vocab)
    before = logits.clone()
    arguments = raw_arguments(logits, memory.data_ptr() + begin, size, num_threads) | {"isa": isa, "rows": [1, 1]}
    asked = [
        request(),
        request(top_p=0.99, num_top=vocab),
        request(top_k=max(vocab - 1, 1), min_p=1e-9),
        request(temperature=50.0, top_p=0.999999, prompt=[0], output=[vocab - 1], repetition=1.5, num_top=3),
    ]
    for each in asked:
        assert [found[0] for found in module.sample(**arguments, requests=[each, each])] == [0, 0]
    assert module.sample_greedy(**arguments) == [int(logits[1].argmax())] * 2
    assert (memory[:begin] == 0xA5).all()
    assert (memory[begin + size :] == 0xA5).all()
    assert not (memory[begin : begin + size] == 0xA5).all()
    assert torch.equal(logits[1], before[1])
    assert logits[[0, 2]].isnan().all()


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown isa": ({"isa": "sse9"}, "'sse9' cannot run here"),
    "null logits": ({"logits": 0}, "logits is a null pointer"),
    "null scratch": ({"scratch": 0}, "scratch is a null pointer"),
    "odd logits": ({"logits": 4097}, "logits is not aligned"),
    "odd scratch": ({"scratch": 4100}, "scratch is not aligned"),
    "end of memory": ({"logits": (1 << 64) - 8}, "end of the address space"),
    "no rows": ({"num_rows": 0}, "num_rows is 0"),
    "too many rows": ({"num_rows": 1 << 60}, "num_rows is"),
    "no vocabulary": ({"vocab": 0}, "vocab is 0"),
    "vocabulary beyond 31 bits": ({"vocab": 1 << 31}, "vocab is 2147483648"),
    "row beyond": ({"rows": [0, 2]}, "row is 2; expected 0 to 1"),
    "row before": ({"rows": [-1]}, "row is -1"),
    "no threads": ({"num_threads": 0}, "num_threads is 0"),
    "more threads than memory": ({"num_threads": 2}, "expected at least"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_raw_arguments_raise(case: str) -> None:
    change, message = BAD_ARGUMENTS[case]
    module, logits = _native.load().module, torch.zeros(2, 5)
    size = module.sample_scratch_size(vocab=5, num_threads=1)
    memory = torch.empty(size + 64, dtype=torch.uint8)
    arguments = raw_arguments(logits, memory.data_ptr() + aligned(memory), size)
    with pytest.raises(ValueError, match=message):
        module.sample_greedy(**arguments | change)
    with pytest.raises(ValueError, match=message):
        module.sample(**arguments | {"requests": [request(), request()]} | change)
    with pytest.raises(ValueError, match="expected at least"):
        module.sample_greedy(**arguments | {"scratch_size": size - 1})
    with pytest.raises(ValueError, match="overlaps"):
        module.sample_greedy(**arguments | {"logits": arguments["scratch"] + size - 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: math.nan}, "nan|NaN") for name in ("temperature", "min_p", "top_p", "uniform", "repetition")),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": INF}, "temperature is inf"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"uniform": 1.0}, "uniform is 1"),
        ({"given": 5}, "given is 5"),
        ({"biased": [1]}, "bias has 0 values; expected 1"),
        ({"biased": [5], "bias": [1.0]}, "biased has the id 5"),
        *(({name: [0, 5]}, f"{name} has the id 5") for name in ("allowed", "banned", "prompt", "output")),
        *(({name: [-1]}, f"{name} has the id -1") for name in ("allowed", "banned", "prompt", "output")),
    ],
)
def test_bad_requests_raise(change: dict[str, Any], message: str) -> None:
    module, logits = _native.load().module, torch.zeros(1, 5)
    size = module.sample_scratch_size(vocab=5, num_threads=1)
    memory = torch.empty(size + 64, dtype=torch.uint8)
    arguments = raw_arguments(logits, memory.data_ptr() + aligned(memory), size)
    with pytest.raises(ValueError, match=message):
        module.sample(**arguments, requests=[request(**change)])
    with pytest.raises(ValueError, match="requests has 0 entries; expected 1"):
        module.sample(**arguments, requests=[])


BAD_LOGITS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "float64": (lambda t: t.double(), "expected contiguous torch.float32"),
    "transposed": (lambda t: t.T.contiguous().T, "expected contiguous"),
    "other device": (lambda t: t.to("meta"), "on meta"),
    "other vocabulary": (lambda t: t[:, :4].contiguous(), r"expected \[rows, 5\]"),
    "one dimension": (lambda t: t[0], r"expected \[rows, 5\]"),
}


@pytest.mark.parametrize("case", BAD_LOGITS)
def test_bad_logits_are_refused(case: str) -> None:
    spoil, message = BAD_LOGITS[case]
    with pytest.raises(UsageError, match=message):
        NativeSampler(5).sample(spoil(torch.zeros(2, 5)), [0], [SampleConfig()], [()], [()], [0])


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(banned_token_ids=(4,)),
        SampleConfig(allowed_token_ids=(-1,)),
        SampleConfig(logit_bias=((2**40, 1.0),)),
        SampleConfig(repetition_penalty=1.1),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(config: SampleConfig) -> None:
    with pytest.raises(UsageError, match="expected ids from 0 to 3"):
        on_cpu(torch.zeros(4), [config], [(4,)], [()], [0])
    with pytest.raises(UsageError, match="steps has 2 entries; expected 1"):
        on_cpu(torch.zeros(4), [config], [()], [()], [0, 0])
    with pytest.raises(UsageError, match="expected ids from 0 to 3"):
        NativeSampler(4).token_logprobs(torch.zeros(1, 4), [4], 0)
