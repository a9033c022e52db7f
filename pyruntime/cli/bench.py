"""`pyruntime bench`: latency and throughput of requests, speed of bare steps, and the shapes that can be measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pyruntime.bench import (
    ForwardLoad,
    GateResult,
    RequestLoad,
    bench_forward,
    bench_latency,
    bench_throughput,
    load_shape,
    num_weights,
    shape_names,
    shape_spec,
)
from pyruntime.checkpoint.atomic import check_writable, write_text
from pyruntime.cli import options as o
from pyruntime.engine.load import Loaded, load
from pyruntime.errors import UsageError

bench_app = typer.Typer(
    name="bench", help="Measure speed; results are checked against the reference first.", no_args_is_help=True
)

InputLen = Annotated[int, typer.Option("--input-len", help="Tokens per prompt.", min=1)]
OutputLen = Annotated[int, typer.Option("--output-len", help="New tokens per prompt.", min=1)]
OutputJson = Annotated[
    Path | None, typer.Option("--output-json", help="Also write the JSON to this file.", dir_okay=False)
]


@bench_app.command()
def latency(
    model: o.Model,
    input_len: InputLen = 32,
    output_len: OutputLen = 128,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    num_iters: Annotated[int, typer.Option("--num-iters", min=1)] = 10,
    num_iters_warmup: Annotated[int, typer.Option("--num-iters-warmup", min=0)] = 2,
    drop_attn: o.DropAttn = None,
    drop_mlp: o.DropMlp = None,
    drop_block: o.DropBlock = None,
    drop_plan: o.DropPlanFile = None,
    dtype: o.Dtype = "auto",
    target: o.Target = "auto",
    device: o.Device = "auto",
    revision: o.Revision = None,
    prefer: o.Prefer = None,
    ignore_config_keys: o.IgnoreConfigKeys = None,
    check_weights: o.CheckWeights = None,
    as_json: o.Json = False,
    output_json: OutputJson = None,
) -> None:
    """Seconds from a batch of prompts to its last token."""
    _check_output(output_json)
    drops = o.drop_options(drop_attn, drop_mlp, drop_block, drop_plan)
    reading = o.reading(revision, prefer, ignore_config_keys, check_weights)
    loaded = _load(model, drops=drops, dtype=dtype, target=target, device=device, **reading)
    requests = RequestLoad(num_prompts=batch_size, input_len=input_len, output_len=output_len)
    with _bar((num_iters + num_iters_warmup) * batch_size, as_json) as bar:
        result = bench_latency(loaded, requests, num_iters, num_iters_warmup, bar.update)
    text = "\n".join(
        [
            _gate(result),
            f"Avg latency: {result['avg_latency']:.4f} seconds",
            *(
                f"{percent}% percentile latency: {value:.4f} seconds"
                for percent, value in result["percentiles"].items()
            ),
            f"Latency p20 / p50 / p80: {_three(result, 'latency')} seconds",
            _moved(result),
        ]
    )
    _report(result, text, as_json, output_json)


@bench_app.command()
def throughput(
    model: o.Model,
    input_len: InputLen = 32,
    output_len: OutputLen = 128,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1)] = 32,
    num_iters: Annotated[int, typer.Option("--num-iters", help="Rounds; the median counts.", min=1)] = 1,
    drop_attn: o.DropAttn = None,
    drop_mlp: o.DropMlp = None,
    drop_block: o.DropBlock = None,
    drop_plan: o.DropPlanFile = None,
    dtype: o.Dtype = "auto",
    target: o.Target = "auto",
    device: o.Device = "auto",
    revision: o.Revision = None,
    prefer: o.Prefer = None,
    ignore_config_keys: o.IgnoreConfigKeys = None,
    check_weights: o.CheckWeights = None,
    as_json: o.Json = False,
    output_json: OutputJson = None,
) -> None:
    """Requests and tokens per second with all prompts queued at once."""
    _check_output(output_json)
    drops = o.drop_options(drop_attn, drop_mlp, drop_block, drop_plan)
    reading = o.reading(revision, prefer, ignore_config_keys, check_weights)
    loaded = _load(model, drops=drops, dtype=dtype, target=target, device=device, **reading)
    requests = RequestLoad(num_prompts=num_prompts, input_len=input_len, output_len=output_len)
    with _bar(num_prompts * num_iters, as_json) as bar:
        result = bench_throughput(loaded, requests, num_iters, bar.update)
    text = (
        f"{_gate(result)}\nThroughput: {result['requests_per_second']:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, {result['output_tokens_per_second']:.2f} output tokens/s\n"
        + (f"Seconds p20 / p50 / p80: {_three(result, 'elapsed_time')}\n" if num_iters > 1 else "")
        + _moved(result)
    )
    _report(result, text, as_json, output_json)


class Output(StrEnum):
    """How `forward` prints: llama-bench's table, one as wide as a terminal, or JSON."""

    MD = "md"
    TABLE = "table"
    JSON = "json"


@bench_app.command()
def forward(
    model: Annotated[str | None, typer.Argument(help="Folder of the model, or a Hub id.", show_default=False)] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape", help="Random weights of a published shape instead of MODEL; `bench shapes` lists them."
        ),
    ] = None,
    prompt_len: Annotated[
        list[str] | None,
        typer.Option(
            "-p", "--n-prompt", "--prompt-len", help="Prefill lengths: 128,512; 0 leaves it out (default: 128)"
        ),
    ] = None,
    num_new: Annotated[int, typer.Option("-n", "--n-gen", help="Decode steps in a row; 0 leaves them out.")] = 16,
    batch_size: Annotated[
        list[str] | None, typer.Option("-b", "--batch-size", help="Rows of a decode step: 1,8 (default: 1)")
    ] = None,
    context: Annotated[
        int, typer.Option("-d", "--n-depth", "--depth", help="Tokens in the cache before decoding.")
    ] = 0,
    repeats: Annotated[int, typer.Option("-r", "--repetitions", min=1)] = 10,
    drop_attn: o.DropAttn = None,
    drop_mlp: o.DropMlp = None,
    drop_block: o.DropBlock = None,
    drop_plan: o.DropPlanFile = None,
    dtype: o.Dtype = "auto",
    target: o.Target = "auto",
    device: o.Device = "auto",
    revision: o.Revision = None,
    prefer: o.Prefer = None,
    ignore_config_keys: o.IgnoreConfigKeys = None,
    check_weights: o.CheckWeights = None,
    output: Annotated[Output, typer.Option("-o", "--output", help="md is llama-bench's table.")] = Output.MD,
    as_json: o.Json = False,
    output_json: OutputJson = None,
) -> None:
    """Tokens per second of bare steps: prefill (pp) and decode (tg), beside bytes, operations and ceilings."""
    _check_output(output_json)
    tests = ForwardLoad(
        prompt_lens=_numbers("--prompt-len", prompt_len, 128),
        num_new=num_new,
        batch_sizes=_numbers("--batch-size", batch_size, 1),
        depth=context,
    )
    drops = o.drop_options(drop_attn, drop_mlp, drop_block, drop_plan)
    reading = o.reading(revision, prefer, ignore_config_keys, check_weights)
    how = {"drops": drops, "dtype": dtype, "target": target, "device": device}
    loaded = _load(model, **how, **reading) if shape is None else _shaped(model, shape, **how)
    results = bench_forward(loaded, tests, repeats, shape)
    as_json = as_json or output is Output.JSON
    if output is Output.TABLE and not as_json:
        Console().print(_forward_table(results))
    lines = [] if output is Output.TABLE else [*_markdown(results), ""]
    _report(results, "\n".join([*lines, _gate(results[0]), _ceilings(results)]), as_json, output_json)


@bench_app.command()
def shapes(as_json: o.Json = False) -> None:
    """List the published shapes that `forward --shape` knows."""
    facts: list[dict[str, Any]] = []
    for name in shape_names():
        spec = shape_spec(name)
        facts.append(
            {
                "name": name,
                "n_layer": len(spec.layers),
                "n_params": num_weights(spec),
                "max_position": spec.max_position,
            }
        )
    if as_json:
        print(json.dumps(facts))
        return
    for each in facts:
        size, params = _gibibytes(2 * each["n_params"]), _count(each["n_params"])
        print(f"{each['name']:<16} {params:>9} {size:>11} in bfloat16  {each['n_layer']} layers")


def _numbers(option: str, texts: Sequence[str] | None, default: int) -> tuple[int, ...]:
    """What an option says, which may be repeated and hold several numbers between commas."""
    if not texts:
        return (default,)
    parts = [part.strip() for text in texts for part in text.split(",")]
    for part in parts:
        if not part.removeprefix("-").isdecimal():
            raise UsageError("BENCH", f"{option} has {part!r}; expected whole numbers, such as 128 or 128,512")
    return tuple(int(part) for part in parts)


def _markdown(results: Sequence[dict[str, Any]]) -> list[str]:
    """llama-bench's columns, then ours; columns are padded, and never cut."""
    rows = [_row(result) for result in results]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    left = ("model", "backend")

    def line(row: dict[str, str]) -> str:
        cells = (row[name].ljust(width) if name in left else row[name].rjust(width) for name, width in widths.items())
        return f"| {' | '.join(cells)} |"

    rule = "|".join("-" * (width + 2) if name in left else "-" * (width + 1) + ":" for name, width in widths.items())
    return [line({name: name for name in widths}), f"|{rule}|", *map(line, rows)]


def _row(result: dict[str, Any]) -> dict[str, str]:
    """One line of the table, by column."""
    return {
        "model": f"{result['model_type']} {Path(result['model_filename']).name} {result['dtype']}",
        "size": _gibibytes(result["model_size"]),
        "params": _count(result["model_n_params"]),
        "backend": result["target"] if result["device"] == "cpu" else f"{result['target']} {result['device']}",
        "threads": str(result["n_threads"]),
        "test": result["test"],
        "t/s": f"{result['avg_ts']:.2f} ± {result['stddev_ts']:.2f}",
        "p20 / p50 / p80": " / ".join(_rate(result[f"{name}_ts"]) for name in ("p20", "median", "p80")),
        "dropped": f"{len(result['drop_attn_list'])} attn, {len(result['drop_mlp_list'])} mlp",
        "KV B/token": str(result["kv_bytes_per_token"]),
        "MB": f"{result['bytes'] / 1e6:.1f}",
        "GFLOP": f"{result['flops'] / 1e9:.2f}",
        "of ceiling": _of_ceiling(result),
    }


def _of_ceiling(result: dict[str, Any]) -> str:
    """A prompt is bound by multiplying, new tokens by reading."""
    if result["n_prompt"]:
        return f"{result['fraction_of_matmul_rate']:.1%} multiply"
    return f"{result['fraction_of_read_bandwidth']:.1%} read"


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _count(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _ceilings(results: Sequence[dict[str, Any]]) -> str:
    """The ceilings around all samples, and what measured them."""
    first = results[0]
    ranges = []
    for name, unit in (("read_bandwidth", "GB/s"), ("multiply_rate", "GFLOP/s")):
        values = [value / 1e9 for result in results for value in result[f"samples_{name}"]]
        ranges.append(f"{min(values):.1f}-{max(values):.1f} {unit}")
    return f"ceilings: read {ranges[0]} ({first['read_probe']}), multiply {ranges[1]} ({first['multiply_probe']})"


def _rate(per_second: float) -> str:
    # a digit behind the point says nothing at this size, and would not fit
    return f"{per_second:.0f}" if per_second >= 1000 else f"{per_second:.1f}"


def _forward_table(results: Sequence[dict[str, Any]]) -> Table:
    first = results[0]
    table = Table(
        title=f"{first['model_type']} {first['dtype']} on {first['target']}, {first['device']}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("test", "t/s", "p20-p80", "MB", "MFLOP", "of read", "of multiply"):
        # a figure is never cut, whatever the width
        table.add_column(column, justify="left" if column == "test" else "right", overflow="fold")
    for result in results:
        table.add_row(
            result["test"],
            _rate(result["median_ts"]),
            f"{_rate(result['p20_ts'])}-{_rate(result['p80_ts'])}",
            f"{result['bytes'] / 1e6:.2f}",
            f"{result['flops'] / 1e6:.1f}",
            f"{result['fraction_of_read_bandwidth']:.1%}",
            f"{result['fraction_of_matmul_rate']:.1%}",
        )
    return table


def _bar(total: int, as_json: bool) -> Any:
    return tqdm(total=total, desc="Requests", disable=as_json or not sys.stderr.isatty(), dynamic_ncols=True)


def _gate(result: dict[str, Any]) -> str:
    return GateResult(result["gate_nmse"], result["gate_limit"], result["gate_oracle"]).line()


def _three(result: dict[str, Any], name: str) -> str:
    return " / ".join(f"{result[f'p{percent}_{name}']:.4f}" for percent in (20, 50, 80))


def _moved(result: dict[str, Any]) -> str:
    return (
        f"Must move {result['bytes'] / 1e6:.2f} MB and compute {result['flops'] / 1e6:.1f} MFLOP: "
        f"{result['fraction_of_read_bandwidth']:.1%} of the read bandwidth, "
        f"{result['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s"
    )


def _check_output(path: Path | None) -> None:
    """Raise RunError IO now rather than after minutes of measuring."""
    if path is not None:
        check_writable(path)


def _load(model: str | None, **how: Any) -> Loaded:
    if model is None:
        raise UsageError("MODEL", "neither MODEL nor --shape was given; expected one of them")
    return load(model, skip_tokenizer_init=True, **how)


def _shaped(model: str | None, shape: str, **how: Any) -> Loaded:
    if model is not None:
        raise UsageError("MODEL", "both MODEL and --shape were given; expected one of them")
    return load_shape(shape, **how)


def _report(result: Any, text: str, as_json: bool, path: Path | None) -> None:
    print(json.dumps(result) if as_json else text)
    if path is not None:
        write_text(path, json.dumps(result, indent=2) + "\n")
