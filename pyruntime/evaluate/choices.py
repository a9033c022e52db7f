"""Multiple choice by log-likelihood, with the figures and rules of lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import RunError, UsageError
from pyruntime.evaluate.items import Item
from pyruntime.evaluate.statistics import mean_of
from pyruntime.plan import Plan
from pyruntime.plan.likelihood import Progress, Window, logit_rows


@dataclass(frozen=True, slots=True)
class Continuation:
    """Log-likelihood of one continuation in nats, its number of tokens, and whether greedy decoding would give it."""

    log_likelihood: float
    num_tokens: int
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """For each item and way of counting whether the right choice was the likeliest; the first one wins a tie.

    `acc` compares sums, `acc_norm` sums per character (lm-eval's names), `acc_token` sums per token.
    """

    groups: tuple[str, ...]
    acc: tuple[bool, ...]
    acc_norm: tuple[bool, ...]
    acc_token: tuple[bool, ...]

    def to_json(self) -> dict[str, Any]:
        """Accuracies from 0 to 1 with standard errors; `acc` of each group where there are several."""
        figures: dict[str, Any] = {"num_items": len(self.acc)}
        for name in ("acc", "acc_norm", "acc_token"):
            found = mean_of([float(each) for each in getattr(self, name)])
            figures |= {name: found.mean, f"{name}_stderr": found.error}
        names = dict.fromkeys(self.groups)
        if len(names) > 1:
            pairs = list(zip(self.groups, self.acc, strict=True))
            own = {name: [float(right) for group, right in pairs if group == name] for name in names}
            figures["groups"] = {name: mean_of(values).mean for name, values in own.items()}
        return figures


def multiple_choice(
    plan: Plan, items: Sequence[Item], windows: Sequence[Window], progress: Progress | None = None
) -> ChoiceResult:
    """Choose among the continuations of each of `items`, whose `windows` (`pair_window`) come pair by pair.

    `progress` is called with the tokens of each window. Raises RunError NUMERICS for logits that are not finite.
    """
    scores = iter(continuations(plan, windows, progress))
    acc, acc_norm, acc_token = [], [], []
    for item in items:
        own = [next(scores) for _ in item.pairs]
        sums = [each.log_likelihood for each in own]
        acc.append(_best(sums) == item.gold)
        acc_norm.append(_best([s / length for s, length in zip(sums, item.lengths, strict=True)]) == item.gold)
        acc_token.append(_best([each.log_likelihood / each.num_tokens for each in own]) == item.gold)
    return ChoiceResult(tuple(item.group for item in items), tuple(acc), tuple(acc_norm), tuple(acc_token))


def pair_window(plan: Plan, tokenizer: Tokenizer, context: str, continuation: str) -> Window:
    """The tokens of both, those of `continuation` to be predicted, by the rule of lm-eval.

    White space at the end of the context belongs to the continuation; both are encoded together, and the continuation
    begins behind as many tokens as the context alone has. An empty context is the opening token, or the end token where
    the model has none. What does not fit is cut off at the front. Raises UsageError TASK where nothing is left to
    predict, or nothing to predict from.
    """
    context, continuation = _at_the_boundary(context, continuation)
    if context:
        first, whole = len(tokenizer.encode(context)), tokenizer.encode(context + continuation)
    else:
        ids = tokenizer.encode(continuation, add_special_tokens=False)
        prefix = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        first, whole = 1, ids if prefix is None or ids[:1] == [prefix] else [prefix, *ids]
    if len(whole) <= first or first < 1:
        raise UsageError(
            "TASK",
            f"behind {context[-40:]!r}, {continuation[:40]!r} adds no token ({first} and {len(whole)} tokens); "
            "expected one or more",
        )
    # the last token is predicted and never read
    cut = max(0, len(whole) - plan.max_position - 1)
    if first - cut < 1:
        raise UsageError(
            "TASK", f"{continuation[:40]!r} has {len(whole) - first} tokens; the model holds {plan.max_position}"
        )
    return Window(whole[cut:], first - cut)


def continuations(plan: Plan, windows: Sequence[Window], progress: Progress | None = None) -> list[Continuation]:
    """Log-likelihood of the predicted tokens of each window, in float64.

    `progress` is called with the tokens of each window. Raises as `token_losses`.
    """
    sums, greedy = [0.0] * len(windows), [True] * len(windows)
    for rows in logit_rows(plan, windows, progress):
        ids = windows[rows.window].token_ids[rows.begin : rows.begin + len(rows.logits)]
        targets = torch.tensor(ids, device=rows.logits.device)
        if not bool(rows.logits.isfinite().all()):
            raise RunError("NUMERICS", "the logits are not finite; check the weights, or use dtype float32")
        wide = rows.logits.double()
        sums[rows.window] -= float(torch.nn.functional.cross_entropy(wide, targets, reduction="sum"))
        greedy[rows.window] = greedy[rows.window] and bool((wide.argmax(-1) == targets).all())
    return [Continuation(s, w.num_predicted, g) for s, w, g in zip(sums, windows, greedy, strict=True)]


def _at_the_boundary(context: str, continuation: str) -> tuple[str, str]:
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
