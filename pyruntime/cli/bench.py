"""`pyruntime bench`: latency and throughput of requests, and speed of bare steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pyruntime.bench import GateResult, RequestLoad, bench_forward, bench_latency, bench_throughput
from pyruntime.checkpoint.atomic import check_writable, write_text
from pyruntime.cli import options as o
from pyruntime.engine.load import load

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
    device: o.Device = "cpu",
    as_json: o.Json = False,
    output_json: OutputJson = None,
) -> None:
    """Seconds from a batch of prompts to its last token."""
    _check_output(output_json)
    drops = o.drop_options(drop_attn, drop_mlp, drop_block, drop_plan)
    loaded = load(model, drops=drops, dtype=dtype, target=target, device=device, skip_tokenizer_init=True)
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
    drop_attn: o.DropAttn = None,
    drop_mlp: o.DropMlp = None,
    drop_block: o.DropBlock = None,
    drop_plan: o.DropPlanFile = None,
    dtype: o.Dtype = "auto",
    target: o.Target = "auto",
    device: o.Device = "cpu",
    as_json: o.Json = False,
    output_json: OutputJson = None,
) -> None:
    """Requests and tokens per second with all prompts queued at once."""
    _check_output(output_json)
    drops = o.drop_options(drop_attn, drop_mlp, drop_block, drop_plan)
    loaded = load(model, drops=drops, dtype=dtype, target=target, device=device, skip_tokenizer_init=True)
    requests = RequestLoad(num_prompts=num_prompts, input_len=input_len, output_len=output_len)
    with _bar(num_prompts, as_json) as bar:
        result = bench_throughput(loaded, requests, bar.update)
    text = (
        f"{_gate(result)}\nThroughput: {result['requests_per_second']:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, {result['output_tokens_per_second']:.2f} output tokens/s\n"
        f"{_moved(result)}"
    )
    _report(result, text, as_json, output_json)


@bench_app.command()
def forward(
    model: o.Model,
    prompt_len: Annotated[
        list[int] | None, typer.Option("-p", "--prompt-len", help="Prefill length; may be repeated.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows of the decode step.", min=1)] = 1,
    context: Annotated[
        int, typer.Option("-d", "--depth", help="Tokens in the cache before the decode step.", min=0)
    ] = 128,
    repeats: Annotated[int, typer.Option("-r", "--repetitions", min=1)] = 20,
    drop_attn: o.DropAttn = None,
    drop_mlp: o.DropMlp = None,
    drop_block: o.DropBlock = None,
    drop_plan: o.DropPlanFile = None,
    dtype: o.Dtype = "auto",
    target: o.Target = "auto",
    device: o.Device = "cpu",
    as_json: o.Json = False,
    output_json: OutputJson = None,
) -> None:
    """Tokens per second of bare steps: prefill (pp) and decode (tg), beside the bytes they must move."""
    _check_output(output_json)
    drops = o.drop_options(drop_attn, drop_mlp, drop_block, drop_plan)
    loaded = load(model, drops=drops, dtype=dtype, target=target, device=device, skip_tokenizer_init=True)
    results = bench_forward(loaded, prompt_len or [128], batch_size, context, repeats)
    if not as_json:
        Console().print(_forward_table(results))
    _report(results, _gate(results[0]), as_json, output_json)


def _rate(per_second: float) -> str:
    # a digit behind the point says nothing at this size, and would not fit
    return f"{per_second:.0f}" if per_second >= 1000 else f"{per_second:.1f}"


def _forward_table(results: list[dict[str, Any]]) -> Table:
    first = results[0]
    table = Table(
        title=f"{first['model_type']} {first['dtype']} on {first['target']}, {first['device']}",
        caption=f"read bandwidth {first['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"matmul rate {first['matmul_flops_per_second'] / 1e9:.1f} GFLOP/s",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("test", "t/s", "p20-p80", "MB", "MFLOP", "of read", "of matmul"):
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


def _report(result: Any, text: str, as_json: bool, path: Path | None) -> None:
    print(json.dumps(result) if as_json else text)
    if path is not None:
        write_text(path, json.dumps(result, indent=2) + "\n")
