"""The report of `pyruntime eval` for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = tuple[str, str, str, str]
_ACCURACIES = ("acc", "acc_norm", "acc_token")


def print_report(report: Mapping[str, Any]) -> None:
    """Print what was measured, on what, and beside the dense model what changed."""
    console = Console(highlight=False)
    for name in ("dense", "model"):
        if name in report:
            console.print(_headline(name, report[name]), markup=False, soft_wrap=True)
    if "text" in report:
        console.print(_text_line(report["text"], report["model"]), markup=False, soft_wrap=True)
    rows = [*_text_rows(report), *_task_rows(report), *_copy_rows(report)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("measure", "model", "dense", "change")
    shown = columns if "dense" in report else columns[:2]
    for column in shown:
        # a figure is never cut, whatever the width
        table.add_column(column, justify="left" if column == "measure" else "right", overflow="fold")
    for row in rows:
        table.add_row(*row[: len(shown)])
    console.print(table)
    if "divergence" in report["model"]:
        console.print(
            "dense: its divergence is that of rounding alone, the noise floor; all against the dense model in float32",
            markup=False,
            soft_wrap=True,
        )


def _headline(name: str, found: Mapping[str, Any]) -> str:
    dropped = [
        f"{kind} {', '.join(map(str, found[key]))}"
        for kind, key in (("attention", "drop_attn_list"), ("MLP", "drop_mlp_list"))
        if found[key]
    ]
    gone = f"; dropped: {'; '.join(dropped)}" if dropped else ""
    return f"{name:<5} {found['model']}, {found['dtype']} on {found['target']}{gone}"


def _text_line(text: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    bos = "none" if text["bos_token_id"] is None else str(text["bos_token_id"])
    line = (
        f"text  {text['text']}: {text['num_tokens']} tokens ({text['num_bytes']} bytes), {text['num_windows']} windows "
        f"of {text['window']}, stride {text['stride']}, opening token {bos}; errors over {found['stderr_over']}s"
    )
    return line if text["round_trip"] else f"{line}; the tokens do not give back the text (unknown characters)"


def _text_rows(report: Mapping[str, Any]) -> list[Row]:
    found, dense, change = report["model"], report.get("dense", {}), report.get("change", {})
    if "perplexity" not in found:
        return []
    ratio = _signed(change.get("perplexity_change"), change.get("perplexity_change_stderr"))
    rows = [
        ("perplexity", _with_error(found, "perplexity"), _with_error(dense, "perplexity"), ratio),
        ("bits per byte", _number(found["bits_per_byte"]), _number(dense.get("bits_per_byte")), ""),
    ]
    if "divergence" in found:
        own, floor = found["divergence"], dense["divergence"]
        rows += [
            (f"KL from dense, {name}", _small(own[key]), _small(floor[key]), "")
            for name, key in (("mean", "kl_mean"), ("median", "kl_median"), ("p99", "kl_p99"))
        ]
        rows.append(("top-1 agreement", _share(own, "top1_agreement"), _share(floor, "top1_agreement"), ""))
    # half of the question that the copying probe asks
    for before, after in _zipped(dense.get("by_position"), found["by_position"] if "copying" in found else []):
        name = f"nats, behind {after['begin']}-{after['end'] - 1} tokens"
        key = "nats_per_token"
        own_change = f"{after[key] - before[key]:+.3f}" if before else ""
        rows.append((name, _number(after[key]), _number(before.get(key)), own_change))
    return rows


def _task_rows(report: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for name, found in report["model"].get("tasks", {}).items():
        dense = report.get("dense", {}).get("tasks", {}).get(name, {})
        change = report.get("change", {}).get("tasks", {}).get(name, {})
        for key in _ACCURACIES:
            points = _signed(change.get(f"{key}_change"), change.get(f"{key}_change_stderr"), unit="points")
            rows.append((f"{name}, {key}", _share(found, key), _share(dense, key), points))
    for name, found in report["model"].get("lm_eval", {}).items():
        dense = report.get("dense", {}).get("lm_eval", {}).get(name, {})
        for key, value in found.items():
            if isinstance(value, float) and "stderr" not in key:
                metric = key.removesuffix(",none")
                rows.append((f"{name}, {metric}", _number(value), _number(dense.get(key)), ""))
    return rows


def _copy_rows(report: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    dense = report.get("dense", {}).get("copying")
    kept = {each["distance"]: each["gain_kept"] for each in report.get("change", {}).get("copying", [])}
    for before, after in _zipped(dense, report["model"].get("copying", [])):
        name = f"copy gain (nats), {after['distance']} back"
        share = kept.get(after["distance"])
        left = "" if share is None else f"{share:.1%} kept"
        rows.append((name, _with_error(after, "gain_nats"), _with_error(before, "gain_nats"), left))
    return rows


def _zipped(before: Sequence[Any] | None, after: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [({}, each) for each in after] if before is None else list(zip(before, after, strict=False))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    # what was dropped too far gives figures of any size
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


def _small(value: float) -> str:
    return f"{value:.2g}" if value < 1e-3 else f"{value:.4f}"


def _with_error(found: Mapping[str, Any], key: str) -> str:
    if found.get(key) is None:
        return ""
    error = found.get(f"{key}_stderr")
    return _number(found[key]) if error is None else f"{_number(found[key])} ± {_number(error)}"


def _share(found: Mapping[str, Any], key: str) -> str:
    if found.get(key) is None:
        return ""
    error = found.get(f"{key}_stderr")
    return f"{found[key]:.1%}" if error is None else f"{found[key]:.1%} ± {100 * error:.1f}"


def _signed(value: float | None, error: float | None, unit: str = "%") -> str:
    if value is None:
        return ""
    return f"{100 * value:+.2f} {unit}" if error is None else f"{100 * value:+.2f} ± {100 * error:.2f} {unit}"
