"""The device's sampler as the runner of a plan calls it: behind the logits of a decode step, on its static memory."""

from __future__ import annotations

import torch

from pyruntime.ops.gpu.batch import StaticBatch
from pyruntime.ops.gpu.frame import Frame
from pyruntime.ops.gpu.sample import Feedback, SamplerParams, launch_sample, on_device, result
from pyruntime.ops.sample import SampleConfig, SampleResult


class DeviceSampler:
    """Samples on the GPU and feeds the tokens back."""

    def launch(self, logits: torch.Tensor, batch: StaticBatch, tokens: torch.Tensor, frame: Frame) -> None:
        """`tokens` [rows] of `logits` [rows, vocab]; the batch's rows stand at the next position afterwards."""
        fields = ("temperature", "top_k", "top_p", "min_p", "seed", "step")
        params = SamplerParams(**{name: batch.tensor(name) for name in fields})
        feedback = Feedback(**{name: batch.tensor(name) for name in ("token_ids", "positions", "contexts")})
        launch_sample(frame, logits, params, tokens, feedback)

    def serves(self, config: SampleConfig) -> bool:
        """Whether a request can be sampled here; the reference does it otherwise."""
        return on_device(config)

    def result(self, token: int) -> SampleResult:
        """What an entry of `tokens` says."""
        return result(token)
