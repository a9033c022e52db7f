"""What `pyruntime fold` does between reading and writing: the rewrites in order, and the check of their logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.checkpoint import Model
from pyruntime.checkpoint.computed import working_bytes
from pyruntime.engine.memory import available_memory, check_memory
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
    fold_reports,
    shrink_values,
    slim,
    stored_as,
    tabulate_first_layer,
)
from pyruntime.plan import DTYPES, Plan, PlanStep, lower
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
    """NMSE of logits, computed in `dtype`.

    `exact` is what the rewrites alone change, unrounded in float64, where that fits. `stored` is the rewritten model
    against one that is merely stored, both with weights in the wanted dtype. `narrowed` is the latter against the model
    as it was; None where the arithmetic is no wider than what is stored, so that it would not show.
    """

    exact: float | None
    stored: float
    narrowed: float | None
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
    """The dtype to check in: float64 for small models, else float32, or that of the weights where that has no room.

    The wider it is, the less the roundings of the two runs hide what the rewrites change.
    """
    available = available_memory()
    for wider in ("float64", "float32"):
        # the weights, and as much again for what computing them takes
        fits = available is None or 2 * DTYPES[wider].itemsize * model.num_values <= available
        if fits and (wider == "float32" or model.num_values <= _SMALL):
            return wider
    return dtype


def check_room(model: Model, dtype: str) -> None:
    """Raise RunError MEMORY unless there is room for the weights of `model` in `dtype` while the largest is made."""
    most = max(map(working_bytes, model.weights.values()), default=0)
    check_memory(model.num_values * DTYPES[dtype].itemsize + most, f"the check of the rewrites in {dtype}")


def check(model: Model, rewritten: Model, options: FoldOptions, limit: float) -> Check:
    """Compare logits of `model` before and after the rewrites, on random tokens, by the reference.

    Raises RunError NUMERICS where the unrounded error is above that of float64, which would be a defect; or where the
    rounded one is above `limit`, unless `options` force it.
    """
    dtype = arithmetic(model, options.dtype)
    plain = stored_as(model, options.dtype)
    merely = _logits(plain, dtype)
    original, narrowed = merely, None
    if dtype != options.dtype:
        if dict(plain.weights) != dict(model.weights):
            original = _logits(model, dtype)
        narrowed = _nmse(merely, original)
    exact = None
    if dtype == "float64":
        exact = _nmse(_logits(stored_as(rewritten, dtype), dtype), original)
        _check_exact(exact, rewritten, options, limit)
    stored = _nmse(_logits(rewritten, dtype), merely)
    # written so that a NaN fails
    if not stored <= limit and not options.force:
        raise RunError(
            "NUMERICS",
            f"with weights in {options.dtype} the rewritten model's logits have an NMSE of {stored:.1e}, at most "
            f"{limit:.0e}; store a wider dtype (--dtype), rewrite less, or pass --force",
        )
    return Check(exact, stored, narrowed, dtype)


def _check_exact(exact: float, rewritten: Model, options: FoldOptions, limit: float) -> None:
    """Raise RunError NUMERICS where `exact` is more than float64 loses, or what was let through may."""
    forced = any(report.forced for report in fold_reports(rewritten))
    most = EXACT_LIMIT if options.exact and not forced else limit
    # written so that a NaN fails
    if not exact <= most:
        way_out = (
            "leave out --force" if forced else "leave out --cancel-norms" if options.cancel_norms else "rewrite less"
        )
        raise RunError(
            "NUMERICS",
            f"the rewritten model's logits have an NMSE of {exact:.1e} in float64, at most {most:.0e}; {way_out}",
        )


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
