"""Log-likelihood of token sequences under a plan: what every measure of quality is made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from pyruntime.errors import RunError, UsageError
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan.plan import Plan

_PAGE_SIZE: Final = 64
# rows of logits in memory at a time: 256 rows of a vocabulary of 128k in float32 are 128 MB
_CHUNK: Final = 256
# beginnings shorter than this are computed again, in one step with others
_MIN_SHARED: Final = 32

Progress = Callable[[int], None]


class Likelihood(NamedTuple):
    """Sum of the negative log-likelihoods in nats, and the number of predicted tokens behind it."""

    nll: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Window:
    """A sequence of token ids of which those from index `first` on are predicted; the ones before are context."""

    token_ids: Sequence[int]
    first: int = 1

    @property
    def num_predicted(self) -> int:
        """Number of predicted tokens."""
        return max(0, len(self.token_ids) - self.first)


class LogitRows(NamedTuple):
    """`logits` [rows, vocab] that predict the tokens `begin`, `begin` + 1, ... of the window with number `window`."""

    window: int
    begin: int
    logits: torch.Tensor


def negative_log_likelihood(
    plan: Plan, sequences: Sequence[Sequence[int]], progress: Progress | None = None
) -> Likelihood:
    """Negative log-likelihood of `sequences` of token ids; the first token of each is context only.

    Summed in float64. `progress` is called with the tokens of each sequence. Raises UsageError TEXT for sequences
    without anything to predict, ids outside the vocabulary and sequences longer than the context, RunError NUMERICS for
    logits that are not finite.
    """
    losses = token_losses(plan, [Window(sequence) for sequence in sequences], progress)
    return Likelihood(math.fsum(float(each.sum()) for each in losses), sum(len(each) for each in losses))


def token_losses(plan: Plan, windows: Sequence[Window], progress: Progress | None = None) -> list[torch.Tensor]:
    """Negative log-likelihood in nats of each predicted token: per window a float64 tensor [num_predicted] on the CPU.

    `progress` is called with the tokens of each window. Raises as `negative_log_likelihood`.
    """
    found: list[list[torch.Tensor]] = [[] for _ in windows]
    for rows in logit_rows(plan, windows, progress):
        ids = windows[rows.window].token_ids[rows.begin : rows.begin + len(rows.logits)]
        targets = torch.tensor(ids, device=rows.logits.device)
        losses = torch.nn.functional.cross_entropy(rows.logits.double(), targets, reduction="none").cpu()
        if not bool(losses.isfinite().all()):
            raise RunError("NUMERICS", "the logits are not finite; check the weights, or use dtype float32")
        found[rows.window].append(losses)
    return [torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64) for parts in found]


def logit_rows(plan: Plan, windows: Sequence[Window], progress: Progress | None = None) -> Iterator[LogitRows]:
    """The logits that predict each token of `windows`, window by window in order, at most 256 rows at a time.

    Short windows share a step, and a window that begins like the one before it is computed from where they part. The
    rows are the same for every plan. Raises UsageError TEXT as `negative_log_likelihood`.
    """
    _check(plan, windows)
    groups = _groups(windows)
    num_pages = max(sum(_num_pages(windows[i]) for i in group.members) for group in groups)
    cache = plan.new_cache(num_pages, _PAGE_SIZE)
    for group in groups:
        # a window without anything to predict is not run
        done = {i: group.known if windows[i].num_predicted else len(windows[i].token_ids) for i in group.members}
        ends = list(itertools.accumulate(_num_pages(windows[i]) for i in group.members))
        pages = {i: range(end - _num_pages(windows[i]), end) for i, end in zip(group.members, ends, strict=True)}
        # a group of several fits one step; only one that is alone takes more
        while moving := [i for i in group.members if done[i] < len(windows[i].token_ids) - 1]:
            slices = [_slice(windows[i], done[i], pages[i]) for i in moving]
            logits = plan.run(make_step(slices, cache, plan.device))
            for i, each, rows in zip(moving, slices, logits.split([len(s.wanted) for s in slices]), strict=True):
                if len(rows):
                    yield LogitRows(i, each.start + each.wanted[0] + 1, rows)
                done[i] += len(each.token_ids)
        for i in group.members:
            if progress is not None:
                progress(len(windows[i].token_ids))


def windows(token_ids: Sequence[int], length: int, bos: int | None = None) -> list[list[int]]:
    """`token_ids` cut into pieces of at most `length` tokens, each opened by `bos` if there is one."""
    head = [] if bos is None else [bos]
    size = length - len(head)
    if size < 1:
        raise UsageError("TEXT", f"windows of {length} tokens hold nothing; expected at least {len(head) + 1}")
    return [[*head, *token_ids[start : start + size]] for start in range(0, len(token_ids), size)]


def strided_windows(token_ids: Sequence[int], length: int, stride: int, bos: int | None = None) -> list[Window]:
    """Windows of at most `length` tokens that predict every token once, each `stride` tokens further than the last.

    A token behind the first window has at least `length` - `stride` tokens before it, `bos` among them, which opens
    every window if there is one; without it the first token of the text is context only. This is the sliding window
    of the Hugging Face guide on perplexity. Raises UsageError TEXT for a stride outside 1 to `length` - 1.
    """
    if not 1 <= stride < length:
        raise UsageError("TEXT", f"stride is {stride}; expected 1 to {length - 1}, below the window")
    head = [] if bos is None else [bos]
    size, end = length - len(head), 0
    found: list[Window] = []
    while end < len(token_ids):
        start, previous = len(found) * stride, end
        end = min(start + size, len(token_ids))
        ids = [*head, *token_ids[start:end]]
        found.append(Window(ids, max(1, len(ids) - (end - previous))))
    return found


def _slice(window: Window, start: int, pages: range) -> SequenceSlice:
    ids = window.token_ids[start : min(start + _CHUNK, len(window.token_ids) - 1)]
    # the token at i is predicted by the row of i - 1
    return SequenceSlice(ids, start, pages, range(max(0, min(window.first - 1 - start, len(ids))), len(ids)))


class _Group(NamedTuple):
    """Numbers of windows that one step holds together, or of one alone whose first `known` tokens are in the cache."""

    members: list[int]
    known: int = 0


def _groups(windows: Sequence[Window]) -> list[_Group]:
    shared = [0, *(_num_shared(one, other) for one, other in itertools.pairwise(windows)), 0]
    found: list[_Group] = []
    members: list[int] = []
    rows = 0
    for i, window in enumerate(windows):
        alone = shared[i] > 0 or shared[i + 1] > 0
        if members and (alone or rows + len(window.token_ids) > _CHUNK):
            found.append(_Group(members))
            members, rows = [], 0
        if alone:
            found.append(_Group([i], shared[i]))
        else:
            members.append(i)
            rows += len(window.token_ids)
    return [*found, _Group(members)] if members else found


def _num_shared(one: Window, other: Window) -> int:
    """Tokens at the beginning of `other` that need not be computed behind `one`; 0 where that saves little."""
    if not one.num_predicted:
        return 0
    # the row before the first predicted token must be computed, and the last token of a window never was
    most = min(len(one.token_ids) - 1, other.first - 1)
    pairs = zip(one.token_ids[:most], other.token_ids[:most], strict=False)
    count = next((i for i, (a, b) in enumerate(pairs) if a != b), min(most, len(other.token_ids)))
    return count if count >= _MIN_SHARED else 0


def _num_pages(window: Window) -> int:
    return -(-len(window.token_ids) // _PAGE_SIZE)


def _check(plan: Plan, windows: Sequence[Window]) -> None:
    if not any(window.num_predicted for window in windows):
        raise UsageError("TEXT", "the text has no token to predict; expected at least two tokens")
    for token_id in {token_id for window in windows for token_id in window.token_ids}:
        # a negative id would silently index from the end
        if not 0 <= token_id < plan.vocab_size:
            raise UsageError(
                "TEXT", f"the text holds token {token_id}; the model has tokens 0 to {plan.vocab_size - 1}"
            )
    longest = max(len(window.token_ids) for window in windows)
    # the last token of a sequence is predicted and never read
    if longest > plan.max_position + 1:
        raise UsageError(
            "TEXT",
            f"a sequence has {longest} tokens; the model holds {plan.max_position} and predicts one more: cut it with "
            "windows()",
        )
