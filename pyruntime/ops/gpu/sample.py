"""ops.sample on a GPU: the tokens that `sample.reference` chooses, for requests without masks, penalties and logprobs.

Everything is computed in float64 from the float32 logits, as in the reference, but summed in another order, so sums
differ in their last bits: about 1e-13 of the whole. A token differs only where a random number, `top_p` or `min_p` is
that close to a border, or two probabilities to each other there. Other rows change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
import triton

from pyruntime.kernels import sample as kernels
from pyruntime.ops.sample import SampleConfig, SampleResult

# token codes below 0, with the reference's texts
ERRORS: Final = {
    kernels.NAN_FOUND.value: "logits contain NaN",
    kernels.INFINITY_FOUND.value: "logits contain +inf",
    kernels.NOTHING_FINITE.value: "logits have no finite entry",
}
# logits per program of the first launch: small, so that one row is spread over the chip
_TILE: Final = 512
# logits per turn of the program that finishes a row: 16 a thread; with more warps the compiler runs out of registers
_BLOCK: Final = 4096
_ROW_WARPS: Final = 8
# candidates that a row copies out before it searches for a threshold; with more it searches all its logits
_ROOM: Final = 16384


class Launching(Protocol):
    """Where launches and scratch memory come from: a Frame, or what runs without a node."""

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *arguments: Any,
        num_warps: int = 4,
        num_stages: int = 3,
        **constants: Any,
    ) -> None:
        """Launch a Triton kernel."""
        ...

    def scratch(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory with undefined values until the last launch."""
        ...


@dataclass(frozen=True, slots=True)
class SamplerParams:
    """What each row asks for, in static memory on the device. `step` counts up by itself with each token.

    Floats may be float32 or float64; the reference's are float64.
    """

    temperature: torch.Tensor  # [rows] float, 0 is greedy
    top_k: torch.Tensor  # [rows] int32, 0 or less is off
    top_p: torch.Tensor  # [rows] float
    min_p: torch.Tensor  # [rows] float
    seed: torch.Tensor  # [rows] int64
    step: torch.Tensor  # [rows] int32, the output position that the next random number belongs to


@dataclass(frozen=True, slots=True)
class Feedback:
    """Inputs of the next decode step, one entry per row: the view's static tensors."""

    token_ids: torch.Tensor  # [rows] int32
    positions: torch.Tensor  # [rows] int32
    contexts: torch.Tensor  # [rows] int32


def on_device(config: SampleConfig) -> bool:
    """Whether `launch_sample` serves the request; the others need `sample.reference` on their logits."""
    if config.temperature == 0.0:
        return config.plain_greedy
    masked = config.logit_bias or config.banned_token_ids or config.allowed_token_ids is not None
    return config.num_logprobs is None and not config.penalised and not masked


def result(token: int) -> SampleResult:
    """What a row's entry of `out` says: a token, or why there is none."""
    return SampleResult(token) if token >= 0 else SampleResult(None, error=ERRORS[token])


def launch_sample(
    where: Launching,
    logits: torch.Tensor,  # [rows, vocab] float32, rows contiguous
    params: SamplerParams,  # of at least as many rows
    out: torch.Tensor,  # [rows] int32
    feedback: Feedback | None = None,
) -> None:
    """Write a token per row, or a code of ERRORS, and advance `params.step`; two launches, no value read on the host.

    With `feedback` each row's token goes to `token_ids`, unless there is none, and its position and context grow by
    one. Rows that are padding get tokens too, within the vocabulary.
    """
    num_rows, vocab = logits.shape
    num_tiles = triton.cdiv(vocab, _TILE)
    highest = where.scratch((num_rows, num_tiles), torch.float32)
    first = where.scratch((num_rows, num_tiles), torch.int32)
    sums = where.scratch((num_rows, num_tiles), torch.float64)
    values = where.scratch((num_rows, _ROOM), torch.float32)
    ids = where.scratch((num_rows, _ROOM), torch.int32)
    weights = where.scratch((num_rows, _ROOM), torch.float64)
    stride = logits.stride(0)
    where.launch(
        kernels.sample_tiles_kernel,
        (num_rows, num_tiles),
        *(logits, params.temperature, highest, first, sums, vocab, num_tiles, stride),
        TILE=_TILE,
    )
    fed = (out, out, out) if feedback is None else (feedback.token_ids, feedback.positions, feedback.contexts)
    where.launch(
        kernels.sample_rows_kernel,
        (num_rows,),
        *(logits, params.temperature, params.top_k, params.top_p, params.min_p, params.seed, params.step),
        *(highest, first, sums, values, ids, weights, out, *fed, vocab, num_tiles, stride),
        num_warps=_ROW_WARPS,
        TILE=_TILE,
        TILES=triton.next_power_of_2(num_tiles),
        BLOCK=min(_BLOCK, max(triton.next_power_of_2(vocab), _TILE)),
        ROOM=_ROOM,
        FEEDBACK=feedback is not None,
    )
