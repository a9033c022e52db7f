"""The offline API: LLM, with vLLM's names."""

from __future__ import annotations

import contextlib
import itertools
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from pyruntime.checkpoint import Model, ReadOptions
from pyruntime.engine.engine import Engine
from pyruntime.engine.load import DropOptions, EngineSizes, Loaded, load, make_engine
from pyruntime.engine.params import SamplingParams
from pyruntime.engine.prompt import Prompt, as_list, token_ids
from pyruntime.engine.request import RequestOutput
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import RunError, UsageError
from pyruntime.passes.drop import Layers
from pyruntime.plan import Plan
from pyruntime.spec import DropPlan

_LOGGER: Final = logging.getLogger("pyruntime")
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A pruned model ready to generate.

    `model` is a folder or a Hub id. `drop_attn`, `drop_mlp` and `drop_block` take layer numbers or text such as
    "20-30", "last:8"; `drop_plan` takes a DropPlan or its file; what the checkpoint itself declares as dropped is
    dropped anyway. `dtype` is auto (the checkpoint's), float32, bfloat16, float16 or float64; `target` auto, cuda, cpu
    or reference; `device` auto, cpu, cuda or cuda:n. `max_model_len` defaults to the model's context. On a GPU weights,
    buffers and cache may take the share `gpu_memory_utilization` of its memory. `prefer` is single or index, for a
    folder that holds both; `ignore_config_keys` names keys of config.json that pyruntime does not know and that change
    no logits; `check_weights` looks for NaN and infinity (None: in models of up to 4 GB). Raises UsageError,
    CheckpointError or RunError.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        drop_attn: Layers | None = None,
        drop_mlp: Layers | None = None,
        drop_block: Layers | None = None,
        drop_plan: DropPlan | Mapping[str, Any] | str | Path | None = None,
        dtype: str = "auto",
        target: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        seed: int = 0,
        skip_tokenizer_init: bool = False,
        prefer: str | None = None,
        ignore_config_keys: Sequence[str] = (),
        check_weights: bool | None = None,
    ) -> None:
        drops = DropOptions(drop_attn=drop_attn, drop_mlp=drop_mlp, drop_block=drop_block, drop_plan=drop_plan)
        options = ReadOptions(prefer, ignore_config_keys)
        # checked before the minutes that loading may take
        sizes = EngineSizes(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            seed=seed,
        )
        # shown only on a terminal, and only when loading takes longer than a moment
        with tqdm(desc="Loading", unit="B", unit_scale=True, disable=None, delay=1.0, leave=False) as bar:
            self._loaded: Loaded = load(
                model,
                drops=drops,
                dtype=dtype,
                target=target,
                device=device,
                revision=revision,
                skip_tokenizer_init=skip_tokenizer_init,
                options=options,
                check_weights=check_weights,
                progress=lambda done, total: _advance(bar, done, total),
            )
        with tqdm(desc="Capturing decode graphs", disable=None, delay=1.0, leave=False) as bar:
            self._engine = make_engine(self._loaded, sizes, lambda done, total: _advance(bar, done, total), _say)
        self._ids = itertools.count()
        self._latest: dict[str, RequestOutput] = {}

    @property
    def model(self) -> Model:
        """Specification, lazy weights and notes."""
        return self._loaded.model

    @property
    def plan(self) -> Plan:
        """What runs; `print(llm.plan.explain())` shows it."""
        return self._loaded.plan

    @property
    def engine(self) -> Engine:
        """The engine, for those who drive it step by step."""
        return self._engine

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer; its `hf()` gives transformers' object. Raises UsageError if none was loaded."""
        if self._loaded.tokenizer is None:
            raise UsageError("TOKENIZER", "no tokenizer was loaded; create LLM without skip_tokenizer_init")
        return self._loaded.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return SamplingParams.defaults_from(self._loaded.generation_config)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete `prompts`; one output per prompt, in order.

        A prompt is text, a list of token ids, or {"prompt_token_ids": [...]}. Without `sampling_params` the model's
        own defaults apply. A sequence that reaches the end of the context ends there, with finish_reason "length".
        Ctrl-C ends the requests that are not finished and returns everything, their finish_reason being "abort"; a
        second Ctrl-C raises KeyboardInterrupt. Raises UsageError for a prompt that cannot run; then none is run.
        """
        each = as_list(prompts)
        params = self._params(sampling_params, len(each))
        tokenized = [token_ids(prompt, self._loaded.tokenizer) for prompt in each]
        return self._run(tokenized, params, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, rendered by the model's chat template; otherwise as `generate`."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if one else messages
        tokenizer = self.get_tokenizer()
        tokenized = [(None, tokenizer.apply_chat_template(each)) for each in conversations]
        return self._run(tokenized, self._params(sampling_params, len(tokenized)), use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt; yields the output so far after every token. Closing the iterator ends the request."""
        text, ids = token_ids(prompt, self._loaded.tokenizer)
        request_id = self._new_id()
        try:
            with _interrupt_waits():
                self._engine.add_request(request_id, ids, sampling_params or self.get_default_sampling_params(), text)
            while True:
                output = self._latest.pop(request_id, None)
                if output is None:
                    if request_id not in self._engine.unfinished():
                        raise RunError("ENDED", "the request was ended elsewhere, so its last output is not here")
                    self._step()
                    continue
                yield output
                if output.finished:
                    return
        finally:
            self._end(request_id)

    def _step(self) -> None:
        """One engine step; outputs wait in `_latest` for whoever asked, since several streams may be open."""
        with _interrupt_waits():
            self._latest.update({output.request_id: output for output in self._engine.step()})

    def _end(self, request_id: str) -> RequestOutput | None:
        """Forget a request; what nobody has fetched of it, aborted if it was not finished."""
        with _interrupt_waits():
            latest = self._latest.pop(request_id, None)
            return self._engine.abort(request_id) or latest

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or self.get_default_sampling_params()] * count
        if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
            raise UsageError(
                "PARAMS", f"sampling params are {type(given).__name__}; expected SamplingParams, or a list"
            )
        if len(given) != count:
            raise UsageError("PARAMS", f"{len(given)} sampling params for {count} prompts; expected one each, or one")
        return given

    def _new_id(self) -> str:
        return str(next(self._ids))

    def _run(
        self,
        prompts: Sequence[tuple[str | None, Sequence[int]]],
        params: Sequence[SamplingParams],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        order = [self._new_id() for _ in prompts]
        finished: dict[str, RequestOutput] = {}
        with _Interrupts() as interrupts:
            try:
                for request_id, (text, ids), own in zip(order, prompts, params, strict=True):
                    self._engine.add_request(request_id, ids, own, text)
                pending = set(order)
                with tqdm(total=len(order), desc="Prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
                    while pending and interrupts.count == 0:
                        with interrupts.second_raises():
                            self._step()
                        for request_id in pending & self._latest.keys():
                            output = self._latest.pop(request_id)
                            if output.finished:
                                finished[request_id] = output
                                pending.remove(request_id)
                                bar.update()
            except KeyboardInterrupt:
                # what was computed is worth more than a traceback
                pass
            finally:
                ended = {request_id: self._end(request_id) for request_id in order}
        finished.update({request_id: output for request_id, output in ended.items() if output is not None})
        # without an output for each prompt, a handler of the host's own broke in before all were added
        if interrupts.count > 1 or len(finished) < len(order):
            raise KeyboardInterrupt
        return [finished[request_id] for request_id in order]


class _Interrupts:
    """Ctrl-C inside the block is counted, not raised, so that nothing is torn.

    A second one raises KeyboardInterrupt in the midst of what stands under `second_raises`. A handler that is not
    Python's own belongs to the host and stays; threads other than the main one are never interrupted.
    """

    def __init__(self) -> None:
        self.count = 0
        self._raises = False
        self._previous: Any = None

    def __enter__(self) -> _Interrupts:
        handler = signal.getsignal(signal.SIGINT)
        if handler is signal.default_int_handler and threading.current_thread() is threading.main_thread():
            self._previous = handler
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    @contextlib.contextmanager
    def second_raises(self) -> Iterator[None]:
        """The block may be left in its midst: it takes long, and whoever asks twice does not want to wait."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _note(self, *_: object) -> None:
        self.count += 1
        if self.count > 1 and self._raises:
            # once: what has to be tidied up now is not to be torn by a third
            self._raises = False
            raise KeyboardInterrupt


@contextlib.contextmanager
def _interrupt_waits() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block: half a step would leave sequences between two tokens."""
    with _Interrupts() as interrupts:
        yield
    if interrupts.count:
        raise KeyboardInterrupt


def _say(line: str) -> None:
    """To whoever sits before a terminal, else to the log."""
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)
    else:
        _LOGGER.info("%s", line)


def _advance(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
