"""A result file as tables: title, columns and rows of text. The README shows those that are not `detail`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from benchmarks.gpu.bars import Data, cell, peer, rate, rows_of, speedup
from benchmarks.gpu.decode import median, spread
from benchmarks.gpu.record import DONE
from benchmarks.gpu.settings import VARIANTS

Table = dict[str, Any]
_MET: Final = {True: "met", False: "missed", None: "not measured"}


def tables(data: Data) -> list[Table]:
    """Everything that was measured, bars first."""
    makers = (_bars, _ceilings, _decode, _long, _baselines, _prefill, _tail, _kernels)
    return [made for make in makers for made in make(data) if made["rows"]]


def printed(made: Sequence[Table]) -> str:
    """Tables in columns, for a terminal."""
    parts = []
    for each in made:
        lines = [each["columns"], *each["rows"]]
        widths = [max(len(line[i]) for line in lines) for i in range(len(each["columns"]))]
        text = ["  ".join(f"{part:<{width}}" for part, width in zip(line, widths, strict=True)) for line in lines]
        parts.append("\n".join([each["title"], *(line.rstrip() for line in text)]))
    return "\n\n".join(parts)


def state(data: Data) -> list[str]:
    """A line for each section that is not whole: how it ended, and what it left out."""
    lines = [note] if (note := data.get("build", {}).get("note")) else []
    for name, section in data["sections"].items():
        cut = f": no time for {', '.join(section['cut'])}" if section["cut"] else ""
        error = f": {section['error']}" if "error" in section else ""
        if section["status"] != DONE:
            lines.append(f"{name} {section['status']}{cut}{error}")
    return lines


def _table(title: str, columns: str, rows: Iterator[list[str]] | list[list[str]], *, detail: bool = False) -> Table:
    return {"title": title, "columns": columns.split("|"), "rows": list(rows), "detail": detail}


def _bars(data: Data) -> Iterator[Table]:
    rows = [[each["bar"], each["wanted"], each["measured"] or "", _MET[each["met"]]] for each in data.get("bars", [])]
    yield _table("Bars", "bar|wanted|measured|", rows)


def _ceilings(data: Data) -> Iterator[Table]:
    rows = []
    for row in rows_of(data, "ceilings"):
        if "bytes_per_second" in row:
            text = f"{row['bytes_per_second'] / 1e12:.3g} TB/s"
        elif "flops_per_second" in row:
            text = f"{row['flops_per_second'] / 1e12:.4g} TFLOP/s"
        else:
            text = row["why"] if row["seconds"] is None else f"{row['seconds'] * 1e6:.3g} us"
        rows.append([row["name"], text])
    yield _table("Ceilings", "what|measured", rows)


def _decode(data: Data) -> Iterator[Table]:
    columns = "model|batch|context|dense ms (p20-p80)|of the floor|half the attentions|Q and P merged|both"
    yield _table("Decode steps: ms, and the speed-up over dense beside what the bytes allow", columns, _cells(data))


def _cells(data: Data, section: str = "decode") -> Iterator[list[str]]:
    for row in rows_of(data, section):
        if row["variant"] != "dense":
            continue
        where = (row["model"], row["batch"], row["context"])
        part = row["floor_seconds"] / median(row)
        others = [_faster(row, cell(data, where[0], form, *where[1:], section)) for form in VARIANTS[1:]]
        yield [where[0], str(where[1]), str(where[2]), _times(row), f"{part:.0%}", *others]


def _faster(dense: Mapping[str, Any], other: Any) -> str:
    if other is None:
        return ""
    measured, allowed = speedup(dense, other)
    return f"{median(other) * 1e3:.3g}, {measured:.2f}x of {allowed:.2f}x"


def _times(row: Mapping[str, Any]) -> str:
    low, high = spread(row)
    return f"{median(row) * 1e3:.3g} ({low * 1e3:.3g}-{high * 1e3:.3g})"


def _long(data: Data) -> Iterator[Table]:
    columns = "model|batch|context|dense ms (p20-p80)|of the floor|half the attentions|Q and P merged|both"
    made = _table("A large batch over a long context", columns, _cells(data, "long"))
    # these two were not run
    yield {**made, "columns": made["columns"][:-2], "rows": [row[:-2] for row in made["rows"]]}


def _baselines(data: Data) -> Iterator[Table]:
    rows = []
    for row in rows_of(data, "baselines"):
        ours = cell(data, row["model"], row["variant"], 1, row["context"])
        dense = peer(data, row["peer"], row["model"], "dense")
        own = "" if row["variant"] == "dense" or dense is None else f"{median(dense) / median(row):.2f}x"
        beside = "" if ours is None else f"{median(ours) * 1e3:.3g}"
        ratio = "" if ours is None else f"{median(row) / median(ours):.2f}x"
        name = {"compiled": "PyTorch, compiled", "transformers": "transformers, eager"}[row["peer"]]
        rows.append([name, row["model"], row["variant"], _times(row), own, beside, ratio])
    yield _table(
        "Others, the same weights, batch 1",
        "what|model|attentions|ms a token (p20-p80)|over its own dense|ours ms|ours is faster by",
        rows,
    )


def _prefill(data: Data) -> Iterator[Table]:
    peak = rate(data, "multiply", "flops_per_second")
    rows = []
    for row in rows_of(data, "prefill"):
        ours, theirs = (statistics.median(row[name]) for name in ("seconds", "torch_seconds"))
        reached = row["flops"] / ours
        part = f"{reached / peak:.0%}" if peak else ""
        figures = [f"{ours * 1e3:.3g}", f"{reached / 1e12:.4g}", part, f"{theirs * 1e3:.3g}", f"{theirs / ours:.2f}x"]
        rows.append([row["model"], str(row["length"]), *figures])
    yield _table("Prompts", "model|tokens|ms|TFLOP/s|of the GEMM peak|cuBLAS and SDPA ms|ratio", rows)


def _tail(data: Data) -> Iterator[Table]:
    found = data["sections"].get("tail", {})
    rows = []
    if "measured" in found:
        dense, dropped = (f"{statistics.median(row['seconds']) * 1e3:.3g}" for row in found["rows"])
        gain = [f"{found['measured']:.2f}x", f"{found['predicted']:.2f}x"]
        rows = [[str(found["layers"]), str(found["layers"] - found["kept"]), dense, dropped, *gain]]
    yield _table("The tail", "layers|last attentions dropped|dense ms|dropped ms|measured|predicted", rows)


def _kernels(data: Data) -> Iterator[Table]:
    read = rate(data, "read", "bytes_per_second")
    rows = []
    for row in rows_of(data, "kernels"):
        seconds = {name: f"{each * 1e6:.1f}" for name, each in row["seconds"].items()}
        ours = min(each for name, each in row["seconds"].items() if name != "torch")
        reached = row["bytes"] / ours
        part = f"{reached / read:.0%}" if read else ""
        times = [seconds.get(name, "") for name in ("triton", "cuda", "vendor", "torch")]
        sizes = [str(row["rows"]), str(row["context"]), f"{row['bytes'] / 1e6:.3g}"]
        rows.append([row["shape"], row["label"], *sizes, *times, f"{reached / 1e12:.3g}", part])
    columns = "shape|node|rows|context|MB|triton us|cuda us|vendor us|torch us|best TB/s|of read"
    yield _table("Nodes by themselves", columns, rows, detail=True)
