"""`pyruntime generate`: complete prompts."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer

from pyruntime.cli import options as o
from pyruntime.engine.params import SamplingParams
from pyruntime.engine.request import RequestOutput
from pyruntime.errors import UsageError
from pyruntime.llm import LLM


def generate(
    model: o.Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Texts to complete; - reads one from standard input."),
    ] = None,
    max_tokens: o.MaxTokens = None,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    seed: o.Seed = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End at this text; may be repeated.")] = None,
    n: Annotated[int, typer.Option("-n", help="Completions per prompt.")] = 1,
    logprobs: Annotated[int | None, typer.Option("--logprobs", help="With --json: the best k at each token.")] = None,
    drop_attn: o.DropAttn = None,
    drop_mlp: o.DropMlp = None,
    drop_block: o.DropBlock = None,
    drop_plan: o.DropPlanFile = None,
    dtype: o.Dtype = "auto",
    target: o.Target = "auto",
    device: o.Device = "auto",
    max_model_len: o.MaxModelLen = None,
    revision: o.Revision = None,
    prefer: o.Prefer = None,
    ignore_config_keys: o.IgnoreConfigKeys = None,
    check_weights: o.CheckWeights = None,
    as_json: o.Json = False,
) -> None:
    """Complete one prompt (streamed) or several, dense or with sublayers dropped."""
    texts = [_text(prompt) for prompt in prompts or []]
    if not texts:
        raise UsageError("PROMPT", 'no prompt was given; write one behind the model, such as "Once upon a time"')
    llm = LLM(
        model,
        drop_attn=drop_attn,
        drop_mlp=drop_mlp,
        drop_block=drop_block,
        drop_plan=drop_plan,
        dtype=dtype,
        target=target,
        device=device,
        max_model_len=max_model_len,
        revision=revision,
        prefer=prefer,
        ignore_config_keys=o.config_keys(ignore_config_keys),
        check_weights=check_weights,
    )
    said = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "max_tokens": max_tokens}
    params = o.sampling_params(llm, **said, stop=stop, n=n, logprobs=logprobs)
    if as_json:
        outputs = llm.generate(texts, params, use_tqdm=False)
        print(json.dumps([dataclasses.asdict(output) for output in outputs], ensure_ascii=False))
    elif len(texts) == 1 and n == 1:
        outputs = [_stream(llm, texts[0], params)]
    else:
        outputs = llm.generate(texts, params, use_tqdm=sys.stderr.isatty())
        for output in outputs:
            for completion in output.outputs:
                print(f"{output.prompt}{completion.text}", end="\n\n")
    raise typer.Exit(_exit_code(outputs))


def _text(prompt: str) -> str:
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            "TEXT", f"standard input is not valid {error.encoding} at byte {error.start}; expected text"
        ) from None


def _stream(llm: LLM, prompt: str, params: SamplingParams) -> RequestOutput:
    """Print the completion as it comes, after its prompt."""
    # not before the first output: of a prompt that is refused nothing is printed
    fresh, shown = prompt, 0
    for output in llm.stream(prompt, params):
        text = output.outputs[0].text
        print(fresh + text[shown:], end="", flush=True)
        fresh, shown = "", len(text)
    print()
    return output


def _exit_code(outputs: list[RequestOutput]) -> int:
    """0, 4 if a request ended with an error, 130 if Ctrl-C ended one."""
    reasons = {completion.finish_reason for output in outputs for completion in output.outputs}
    for output in outputs:
        for completion in output.outputs:
            if completion.finish_reason == "error":
                print(f"error[NUMERICS]: request {output.request_id}: {completion.stop_reason}", file=sys.stderr)
    return 4 if "error" in reasons else 130 if "abort" in reasons else 0
