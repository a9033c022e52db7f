"""The bars that a data-centre GPU is held to, from a result file: each with what was measured, met, missed or unknown.

One NVIDIA H200 is what they were written for; on another GPU the milliseconds mean little, and the fractions hold.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from benchmarks.gpu.decode import median

Data = Mapping[str, Any]
# (batch, context) of the cells that are quoted
_FIRST: Final = (1, 512)
_STEP_SECONDS: Final = 4.4e-3
_COMPILED_RATIOS: Final = {"llama-3-8b": 1.10, "llama-3.2-1b": 1.2, "qwen2.5-0.5b": 1.4}
_OF_BYTES: Final = 0.97
_OF_READ: Final = 0.85
_LARGE_CACHE: Final = 64 << 20
_OF_TORCH: Final = 0.95
_OF_MULTIPLY: Final = 0.70
_OF_PREDICTED: Final = 0.95
_LONG_RATIO: Final = 1.75
_PREFILL: Final = 4096


def bars(data: Data) -> list[dict[str, Any]]:
    """Every bar: `bar`, `wanted`, `measured` (text, or None: not measured) and `met` (None: not measured)."""
    return [*_decode(data), *_speedups(data), *_attention(data), *_prompts(data), *_tail(data), *_long(data)]


def rows_of(data: Data, section: str) -> Sequence[Mapping[str, Any]]:
    """The rows of a section, none where it did not run."""
    found: Sequence[Mapping[str, Any]] = data["sections"].get(section, {}).get("rows", [])
    return found


def cell(data: Data, model: str, variant: str, batch: int, context: int, section: str = "decode") -> Any:
    """The row of one cell, or None."""
    wanted = (model, variant, batch, context)
    for row in rows_of(data, section):
        if (row["model"], row["variant"], row["batch"], row["context"]) == wanted:
            return row
    return None


def rate(data: Data, name: str, unit: str) -> float | None:
    """A ceiling, or None."""
    return next((row[unit] for row in rows_of(data, "ceilings") if row["name"] == name), None)


def speedup(dense: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """How many times as fast as dense, and how many times the floors allow."""
    return median(dense) / median(other), dense["floor_seconds"] / other["floor_seconds"]


def _bar(name: str, wanted: str, measured: str | None = None, met: bool | None = None) -> dict[str, Any]:
    return {"bar": name, "wanted": wanted, "measured": measured, "met": met}


def _decode(data: Data) -> Iterator[dict[str, Any]]:
    batch, context = _FIRST
    name = f"Llama-3-8B dense, batch {batch}, context {context}"
    found = cell(data, "llama-3-8b", "dense", batch, context)
    wanted = f"at most {_STEP_SECONDS * 1e3:.1f} ms a token"
    if found is None:
        yield _bar(name, wanted)
    else:
        seconds = median(found)
        yield _bar(name, wanted, f"{seconds * 1e3:.2f} ms", seconds <= _STEP_SECONDS)
    for model, ratio in _COMPILED_RATIOS.items():
        name, wanted = f"{model} dense beside the compiled PyTorch decoder", f"at least {ratio:.2f}x"
        ours = cell(data, model, "dense", batch, context)
        theirs = peer(data, "compiled", model, "dense")
        if ours is None or theirs is None:
            yield _bar(name, wanted)
        else:
            reached = median(theirs) / median(ours)
            yield _bar(name, wanted, f"{reached:.2f}x", reached >= ratio)


def peer(data: Data, name: str, model: str, variant: str) -> Any:
    """The row of a baseline, or None."""
    for row in rows_of(data, "baselines"):
        if (row["peer"], row["model"], row["variant"]) == (name, model, variant):
            return row
    return None


def _speedups(data: Data) -> Iterator[dict[str, Any]]:
    for variant, what in (("half", "half the attentions dropped"), ("merged", "Q and P merged away")):
        parts = []
        for row in rows_of(data, "decode"):
            if row["variant"] == variant:
                dense = cell(data, row["model"], "dense", row["batch"], row["context"])
                if dense is not None:
                    measured, allowed = speedup(dense, row)
                    parts.append((measured / allowed, f"{row['model']} batch {row['batch']} context {row['context']}"))
        wanted = f"at least {_OF_BYTES:.0%} of the speed-up that the bytes allow, in every cell"
        if parts:
            worst, where = min(parts)
            met = sum(part >= _OF_BYTES for part, _ in parts)
            text = f"{met} of {len(parts)} cells; worst {worst:.0%} ({where})"
            yield _bar(what, wanted, text, met == len(parts))
        else:
            yield _bar(what, wanted)


def _attention(data: Data) -> Iterator[dict[str, Any]]:
    read = rate(data, "read", "bytes_per_second")
    large = [row for row in rows_of(data, "kernels") if row["op"] == "attention" and row["bytes"] >= _LARGE_CACHE]
    name, wanted = "decode attention from 64 MB of keys and values on", f"at least {_OF_READ:.0%} of the read ceiling"
    if not large or not read:
        yield _bar(name, wanted)
        return
    parts = [row["bytes"] / min(_ours(row)) / read for row in large]
    yield _bar(name, wanted, f"{min(parts):.0%} to {max(parts):.0%}", min(parts) >= _OF_READ)


def _ours(row: Mapping[str, Any]) -> list[float]:
    return [seconds for name, seconds in row["seconds"].items() if name != "torch"]


def _prompts(data: Data) -> Iterator[dict[str, Any]]:
    found = next((row for row in rows_of(data, "prefill") if row["length"] == _PREFILL), None)
    peak = rate(data, "multiply", "flops_per_second")
    name = f"prefill of {_PREFILL} tokens, Llama-3-8B"
    beside, against = f"at least {_OF_TORCH:.0%} of cuBLAS and SDPA alone", f"above {_OF_MULTIPLY:.0%} of the GEMM peak"
    if found is None or not peak:
        yield _bar(name, beside)
        yield _bar(name, against)
        return
    seconds = statistics.median(found["seconds"])
    ratio, part = statistics.median(found["torch_seconds"]) / seconds, found["flops"] / seconds / peak
    yield _bar(name, beside, f"{ratio:.0%}", ratio >= _OF_TORCH)
    yield _bar(name, against, f"{part:.0%}", part > _OF_MULTIPLY)


def _tail(data: Data) -> Iterator[dict[str, Any]]:
    found = data["sections"].get("tail", {})
    wanted = f"at least {_OF_PREDICTED:.0%} of the gain that cost() predicts"
    name = "the tail: 80 layers, attentions 45-79 dropped, prompt of 2048"
    if "measured" not in found:
        yield _bar(name, wanted)
        return
    part = found["measured"] / found["predicted"]
    text = f"{found['measured']:.2f}x of {found['predicted']:.2f}x: {part:.0%}"
    yield _bar(name, wanted, text, part >= _OF_PREDICTED)


def _long(data: Data) -> Iterator[dict[str, Any]]:
    name = "Llama-2-7B, batch 32, context 4096, half the attentions dropped"
    wanted = f"at least {_LONG_RATIO:.2f}x"
    dense, half = (cell(data, "llama-2-7b", form, 32, 4096, "long") for form in ("dense", "half"))
    if dense is None or half is None:
        yield _bar(name, wanted)
        return
    reached = median(dense) / median(half)
    yield _bar(name, wanted, f"{reached:.2f}x", reached >= _LONG_RATIO)
