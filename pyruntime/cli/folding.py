"""What `pyruntime fold` does between reading and writing: the rewrites in order, and the check of their logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.checkpoint import Model
from pyruntime.engine.memory import available_memory
from pyruntime.errors import RunError, UsageError
from pyruntime.graph import build
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.passes.fold import (
    cancel_norms,
    centre_layer_norms,
    drop_zero_sublayers,
    fold_biases,
    fold_mlp_prefix,
    fold_norms,
    shrink_values,
    slim,
    stored_as,
    tabulate_first_layer,
)
from pyruntime.plan import Plan, PlanStep, lower
from pyruntime.spec import Cached, ModelSpec

# NMSE of logits: of exact rewrites in float64, where only the order of sums differs
EXACT_LIMIT: Final = 1e-16
# models of which two copies in float64 and a forward pass take moments
_SMALL: Final = 50_000_000
_PAGE_SIZE: Final = 16
_TOKENS: Final = 48
# of these tokens, how many come one by one
_DECODED: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldOptions:
    """Which rewrites to make, for weights in `dtype`. `force` takes what a gate refuses."""

    zero: bool = False
    mlp_prefix: bool = False
    cancel_norms: bool = False
    first_layer: bool = False
    norms: bool = False
    biases: bool = False
    slim: Cached | None = None
    matshrink: bool = False
    dtype: str = "float32"
    force: bool = False

    @property
    def exact(self) -> bool:
        """Whether nothing but rounding may differ: a cancelled norm leaves its eps behind."""
        return not self.cancel_norms


@dataclass(frozen=True, slots=True)
class Check:
    """NMSE of the rewritten model's logits: computed unrounded in float64 where that fits, and with weights as stored.

    `dtype` is what the second one was computed in.
    """

    exact: float | None
    stored: float
    dtype: str


def rewrite(model: Model, options: FoldOptions, streams: Mapping[int, torch.Tensor]) -> Model:
    """`model` through the rewrites that `options` name; one that makes room for another one comes before it."""
    for apply in _passes(options, streams):
        model = apply(model)
    return model


def _passes(options: FoldOptions, streams: Mapping[int, torch.Tensor]) -> Iterator[Callable[[Model], Model]]:
    dtype, force, cached = options.dtype, options.force, options.slim
    if options.zero:
        yield drop_zero_sublayers
    if options.mlp_prefix:
        yield fold_mlp_prefix
    if options.cancel_norms:
        yield lambda model: cancel_norms(model, streams, dtype=dtype, force=force)
    if options.first_layer:
        yield tabulate_first_layer
    if options.norms:
        yield centre_layer_norms
        yield fold_norms
    # what norms leave in the biases of values goes on into the output
    if options.biases:
        yield fold_biases
    if cached is not None:
        yield lambda model: slim(model, cached, dtype=dtype, force=force)
    if options.matshrink:
        yield lambda model: shrink_values(model, dtype=dtype)


def attention_streams(model: Model, dtype: str) -> dict[int, torch.Tensor]:
    """What each attention with a pre-norm reads, [tokens, size], for the tokens of the check."""
    found: dict[int, torch.Tensor] = {}
    latest: dict[str, torch.Tensor] = {}

    def watch(each: PlanStep, outputs: tuple[torch.Tensor, ...]) -> None:
        node = each.node
        if node.name.endswith(".attention.pre"):
            found[int(node.name.split(".")[1])] = latest[node.inputs[0]]
        latest.update(zip(node.outputs, outputs, strict=True))

    plan = lower(build(model.spec), model, dtype=dtype)
    ids = _token_ids(model.spec)
    cache = plan.new_cache(-(-len(ids) // _PAGE_SIZE), _PAGE_SIZE)
    plan.run(make_step([SequenceSlice(ids, 0, range(cache.num_pages), [len(ids) - 1])], cache), watch)
    return found


def arithmetic(model: Model, dtype: str) -> str:
    """The dtype to check in: float64 for small models, else that of the weights."""
    available = available_memory()
    fits = available is None or 3 * 8 * model.num_values <= available
    return "float64" if model.num_values <= _SMALL and fits else dtype


def check(model: Model, options: FoldOptions, streams: Mapping[int, torch.Tensor], limit: float) -> Check:
    """Compare logits of `model` before and after the rewrites, on random tokens, by the reference.

    Raises RunError NUMERICS where the unrounded error is above that of float64, which would be a defect; or where the
    rounded one is above `limit`, unless `options` force it.
    """
    dtype = arithmetic(model, options.dtype)
    expected = _logits(model, dtype)
    exact = None
    if dtype == "float64":
        exact = _nmse(_logits(rewrite(stored_as(model, dtype), options, streams), dtype), expected)
        # written so that a NaN fails
        if not exact <= (EXACT_LIMIT if options.exact else limit):
            raise RunError("NUMERICS", f"the rewritten model's logits have an NMSE of {exact:.1e} in float64")
    stored = rewrite(stored_as(model, options.dtype), options, streams)
    nmse = _nmse(_logits(stored, dtype), expected)
    if not nmse <= limit and not options.force:
        raise RunError(
            "NUMERICS",
            f"with weights in {options.dtype} the rewritten model's logits have an NMSE of {nmse:.1e}, at most "
            f"{limit:.0e}; store a wider dtype (--dtype), rewrite less, or pass --force",
        )
    return Check(exact, nmse, dtype)


def cached_of(name: str | None) -> Cached | None:
    """What --slim names. Raises UsageError FOLD."""
    if name is None:
        return None
    if name not in (Cached.KEYS, Cached.INPUTS):
        raise UsageError("FOLD", f"--slim is {name!r}; expected {Cached.KEYS} or {Cached.INPUTS}")
    return Cached(name)


def _token_ids(spec: ModelSpec) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(spec.vocab_size, (min(_TOKENS, spec.max_position),), generator=generator).tolist()


def _logits(model: Model, dtype: str) -> torch.Tensor:
    """Logits of all tokens: a prompt, then one by one."""
    plan: Plan = lower(build(model.spec), model, dtype=dtype)
    ids = _token_ids(model.spec)
    cache = plan.new_cache(-(-len(ids) // _PAGE_SIZE), _PAGE_SIZE)
    whole = max(len(ids) - _DECODED, 1)
    ends: Sequence[int] = (whole, *range(whole + 1, len(ids) + 1))
    rows, start = [], 0
    for end in ends:
        part = SequenceSlice(ids[start:end], start, range(cache.num_pages), range(end - start))
        rows.append(plan.run(make_step([part], cache)))
        start = end
    return torch.cat(rows).double()


def _nmse(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).square().mean() / expected.square().mean())
