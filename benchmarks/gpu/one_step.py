"""A prompt and a few decode steps in a process of their own: for a sanitizer, or to compile kernels ahead of use.

python -m benchmarks.gpu.one_step --tiny
python -m benchmarks.gpu.one_step --model llama-3-8b
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch

from benchmarks.gpu import gate
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.kernels import CONTEXT, groups
from benchmarks.gpu.nodes import distinct_runs
from benchmarks.gpu.runner import Decoder, prompt_step
from benchmarks.gpu.settings import VARIANTS, full, tiny, variant
from benchmarks.gpu.torch_decoder import TorchDecoder
from pyruntime import PyruntimeError
from pyruntime.spec import ModelSpec


def main() -> int:
    """The exit code: that of the error where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, checked")
    parser.add_argument("--model", help="a model of the full run: two of its layers, every variant, batch and context")
    arguments = parser.parse_args()
    settings = tiny() if arguments.tiny else full()
    bench = Bench.of(torch.device(arguments.device), settings)
    try:
        if arguments.model is None:
            for spec in settings.models.values():
                checked(bench, spec)
        else:
            compiled_ahead(bench, settings.models[arguments.model])
            if arguments.model in settings.compiled_models:
                peer_ahead(bench, settings.models[arguments.model])
            if arguments.model in settings.kernel_models:
                nodes_ahead(bench, arguments.model)
    except PyruntimeError as error:
        print(error.one_line(), file=sys.stderr)
        return error.exit_code
    return 0


def checked(bench: Bench, spec: ModelSpec) -> None:
    """Run every variant of a small model against the reference."""
    for name in VARIANTS:
        model = bench.model(variant(spec, name))
        gate.check_plan(name, bench.plan(model), model, bench.settings.gate_lengths)


def peer_ahead(bench: Bench, spec: ModelSpec) -> None:
    """Compile a layer of PyTorch's decoder: what was compiled is found on disk by the section that times it."""
    settings = bench.settings
    model = bench.model(replace(spec, layers=spec.layers[:2]))
    length = settings.contexts[0] + settings.warmup + settings.replays + 2
    TorchDecoder(model, bench.torch_dtype, 1, length, settings.compile_backend).captured()


def nodes_ahead(bench: Bench, name: str) -> None:
    """Launch every node that will be checked and timed by itself once, by every backend."""
    for group in groups(bench, name):
        for rows in bench.settings.kernel_rows:
            for node in distinct_runs(group.plan, group.steps[:1], rows, CONTEXT):
                node.run()


def compiled_ahead(bench: Bench, spec: ModelSpec) -> None:
    """Run what the sections will run, with two layers: kernels are compiled for widths and batches, not for depth."""
    settings = bench.settings
    shallow = replace(spec, layers=spec.layers[:2])
    for name in VARIANTS:
        plan = bench.plan(bench.model(variant(shallow, name)))
        for batch in settings.batches:
            for context in settings.contexts:
                Decoder(plan, batch, context, settings.warmup + settings.replays + 2).start()
        plan.run(prompt_step(plan, min(settings.prefill_lengths)))


if __name__ == "__main__":
    sys.exit(main())
