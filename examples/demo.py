"""The main job on the model that ships with the project: inspect, generate, time and judge it, dense and pruned.

Run it with `make demo`, or `python examples/demo.py [--drop-attn 1,8,10,11] [--drop-mlp ...] [--model FOLDER]`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from pyruntime import LLM, PyruntimeError, RequestOutput, SamplingParams
from pyruntime.bench import check_plan, compare_plans, decode_case, describe, prefill_case, summary
from pyruntime.evaluate import Perplexity, perplexity, windows

HERE = Path(__file__).parent
MODEL = HERE / "novels-5m"
HELD_OUT = HERE / "held_out.txt"
PROMPT = "The captain looked at the boy and said,"
# the attentions that change the stream least, by cosine similarity (see the model card)
DROP_ATTN = "1,8,10,11"
NEW_TOKENS = 60
SEED = 7
ROUNDS = 5
REPEATS = 15
CONTEXT = 256
# of the held-out text, so that the demo stays short
NUM_CHARACTERS = 24_000


def main() -> int:
    """Run the demo; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--text", type=Path, default=HELD_OUT, help="held-out text for the perplexity")
    parser.add_argument("--drop-attn", default=DROP_ATTN, help="attentions to drop, such as 9,10 or last:4")
    parser.add_argument("--drop-mlp", default=None)
    arguments = parser.parse_args()
    # torch only checks the results here; its threads would go on spinning beside those that are timed
    torch.set_num_threads(1)
    try:
        show(arguments.model, arguments.text, arguments.drop_attn or None, arguments.drop_mlp)
    except PyruntimeError as error:
        print(error.one_line(), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error[IO]: cannot read {error.filename}: {error.strerror}", file=sys.stderr)
        return 5
    return 0


def show(model: Path, text: Path, drop_attn: str | None, drop_mlp: str | None) -> None:
    """Everything the demo prints."""
    dense = LLM(model)
    pruned = LLM(model, drop_attn=drop_attn, drop_mlp=drop_mlp)
    title("1. What is kept, what is gone (pyruntime inspect)")
    itemsize = pruned.plan.dtype.itemsize
    print("\n".join(describe(pruned.model, summary(pruned.model, itemsize, batch=1, context=CONTEXT))))

    title("2. The same prompt, dense and pruned")
    both = {"dense": dense, "pruned": pruned}
    gates = {name: check_plan(llm.plan, llm.model) for name, llm in both.items()}
    outputs = generate_in_turn(both)
    for name, rounds in outputs.items():
        print(f"[{name}] {PROMPT}{rounds[-1].outputs[0].text}\n")

    title("3. Speed and price")
    for name, gate in gates.items():
        print(f"{name:<8} {gate.line()}")
    print(f"\n{'':<8} {'tokens/s':>9} {'first token':>12} {'perplexity':>11} {'bits/byte':>10}")
    sample = text.read_text(encoding="utf-8")[:NUM_CHARACTERS]
    for name, rounds in outputs.items():
        quality = held_out_perplexity(both[name], sample, name)
        print(
            f"{name:<8} {statistics.median(map(tokens_per_second, rounds)):>9.1f} "
            f"{statistics.median(map(first_token_ms, rounds)):>9.1f} ms "
            f"{quality.value:>11.2f} {quality.bits_per_byte(len(sample.encode())):>10.3f}"
        )
    print(f"perplexity: of the first {len(sample):,} characters of {text.name}")
    print()
    print_speedups(dense, pruned)
    title("Try next")
    print('pyruntime generate examples/novels-5m "It was a dark night" --drop-attn last:2 --temperature 0.8 --seed 1')
    print("pyruntime inspect examples/novels-5m --drop-block 9-11 --graph")
    print("pyruntime bench latency examples/novels-5m --drop-attn last:4 --batch-size 4 --output-len 32 --num-iters 3")


def generate_in_turn(llms: dict[str, LLM]) -> dict[str, list[RequestOutput]]:
    """Complete the prompt with each model in turn: what disturbs one disturbs both. The first round is not kept."""
    params = SamplingParams(temperature=0.7, top_p=0.95, seed=SEED, max_tokens=NEW_TOKENS, ignore_eos=True)
    rounds: dict[str, list[RequestOutput]] = {name: [] for name in llms}
    for _ in range(1 + ROUNDS):
        for name, llm in llms.items():
            rounds[name] += llm.generate(PROMPT, params, use_tqdm=False)
    return {name: outputs[1:] for name, outputs in rounds.items()}


def first_token_ms(output: RequestOutput) -> float:
    """Milliseconds from arrival to the first token."""
    assert output.metrics.first_token_time is not None
    return (output.metrics.first_token_time - output.metrics.arrival_time) * 1e3


def tokens_per_second(output: RequestOutput) -> float:
    """Tokens after the first per second."""
    times = output.metrics
    assert times.first_token_time is not None
    assert times.finished_time is not None
    return (len(output.outputs[0].token_ids) - 1) / (times.finished_time - times.first_token_time)


def held_out_perplexity(llm: LLM, text: str, name: str) -> Perplexity:
    """Perplexity of the text, in windows of the model's context."""
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    # a model that was trained with an opening token is lost without it in every window
    pieces = windows(ids, llm.model.spec.max_position, bos=tokenizer.bos_id)
    with tqdm(total=sum(map(len, pieces)), desc=f"perplexity, {name}", unit="tok", leave=False, disable=None) as bar:
        return perplexity(llm.plan, pieces, bar.update)


def print_speedups(dense: LLM, pruned: LLM) -> None:
    """Predicted beside measured, medians of interleaved steps with their spread."""
    cases = [decode_case(1, CONTEXT), decode_case(8, CONTEXT), prefill_case(CONTEXT)]
    print(f"{'speed-up of pruned over dense':<34} {'predicted':>9} {'measured':>9}   p20-p80 dense, pruned")
    for each in compare_plans(dense.plan, pruned.plan, cases, REPEATS):
        spread = f"{each.dense.spread()}, {each.pruned.spread()}"
        print(f"{each.case.name:<34} {each.predicted:>8.2f}x {each.measured:>8.2f}x   {spread}")
    print(
        "predicted: bytes moved (decode), operations (prefill). A model this small lives in the caches, where steps "
        "are\nbound by more than bytes; on models of a gigabyte the two agree (README, Speed)."
    )


def title(text: str) -> None:
    """A heading."""
    print(f"\n== {text}\n")


if __name__ == "__main__":
    sys.exit(main())
