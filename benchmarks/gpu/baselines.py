"""What others make of the same weights: a compiled PyTorch decoder, and eager transformers as the papers timed it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from benchmarks.gpu import gate
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.record import Section
from benchmarks.gpu.runner import Decoder, prompt_step
from benchmarks.gpu.settings import variant
from benchmarks.gpu.torch_decoder import TorchDecoder
from benchmarks.peers.hf_twin import twin
from benchmarks.peers.sides import Theirs, greedy
from pyruntime.checkpoint import Model
from pyruntime.ops.cache import KvCache

_FORMS: Final = ("dense", "half")


def measure(bench: Bench, section: Section) -> None:
    """Time both, dense and with half the attentions dropped, at batch 1; their logits are held against ours."""
    context = bench.settings.contexts[0]
    for name in bench.settings.compiled_models:
        for form in _FORMS:
            if section.fits(f"compiled PyTorch, {name} {form}"):
                row = _compiled(bench, bench.model(variant(bench.settings.models[name], form)), context)
                section.add({"peer": "compiled", "model": name, "variant": form, "context": context, **row})
    name = bench.settings.eager_model
    for form in _FORMS:
        if section.fits(f"eager transformers, {name} {form}"):
            dense = bench.settings.models[name]
            row = _eager(bench, bench.model(variant(dense, form), dense), context)
            section.add({"peer": "transformers", "model": name, "variant": form, "context": context, **row})


def _compiled(bench: Bench, model: Model, context: int) -> dict[str, Any]:
    settings = bench.settings
    room = settings.warmup + settings.replays + 2
    plan = bench.plan(model)
    ours = Decoder(plan, 1, context, room)
    theirs = TorchDecoder(model, bench.torch_dtype, 1, context + room, settings.compile_backend)
    # capturing takes steps of its own, which write into the cache
    replay = theirs.captured()
    for slot, (index, _) in enumerate(model.spec.attentions()):
        theirs.load_cache(index, *_contiguous(ours.cache, slot, context))
    first = [0]
    ours.start()
    theirs.start(first, context)
    replay()
    nmse = gate.check("the compiled PyTorch decoder", theirs.logits, ours.logits(), gate.OTHERS_LIMIT)
    del ours, plan
    bench.tidy()
    passes = []
    for _ in range(settings.passes):
        theirs.start(first, context + 1)
        passes.append(list(bench.clock.samples(replay, settings.replays, settings.warmup).seconds))
    return {"nmse": nmse, "seconds": passes}


def _contiguous(cache: KvCache, slot: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [1, kv_heads, context, head_dim] of the first sequence."""
    keys, values = (pool.flatten(0, 1)[:context].transpose(0, 1)[None] for pool in cache.pools(slot))
    return keys, values


def _eager(bench: Bench, model: Model, context: int) -> dict[str, Any]:
    """transformers with its DynamicCache, which grows; each token waits for the one before it, as in its generate."""
    plan = bench.plan(model)
    step = prompt_step(plan, context)
    expected = plan.run(step)
    del plan
    bench.tidy()
    found = twin(model, bench.torch_dtype).to(bench.device)
    theirs = Theirs(found)
    ids = torch.tensor([list(step.slices[0].token_ids)], device=bench.device)
    logits = theirs.start(ids, bench.settings.eager_tokens)
    nmse = gate.check("eager transformers", logits, expected, gate.OTHERS_LIMIT)
    run = _waiting(bench, greedy(theirs, logits))
    samples = bench.clock.samples(run, bench.settings.eager_tokens, bench.settings.warmup)
    return {"nmse": nmse, "seconds": [list(samples.seconds)]}


def _waiting(bench: Bench, run: Callable[[], object]) -> Callable[[], None]:
    def timed() -> None:
        run()
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)

    return timed
