"""The offline API: LLM and its asynchronous twin, with vLLM's names."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pyruntime.checkpoint import Model
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

Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A pruned model ready to generate.

    `model` is a folder or a Hub id. `drop_attn`, `drop_mlp` and `drop_block` take layer numbers or text such as
    "20-30", "last:8"; `drop_plan` takes a DropPlan or its file; what the checkpoint itself declares as dropped is
    dropped anyway. `dtype` is auto (the checkpoint's), float32, bfloat16, float16 or float64; `target` auto or
    reference. `max_model_len` defaults to the model's context. Raises UsageError, CheckpointError or RunError.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        drop_attn: Layers | None = None,
        drop_mlp: Layers | None = None,
        drop_block: Layers | None = None,
        drop_plan: DropPlan | str | Path | None = None,
        dtype: str = "auto",
        target: str = "auto",
        device: str = "cpu",
        revision: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        kv_cache_memory_bytes: int | None = None,
        seed: int = 0,
        skip_tokenizer_init: bool = False,
    ) -> None:
        drops = DropOptions(drop_attn=drop_attn, drop_mlp=drop_mlp, drop_block=drop_block, drop_plan=drop_plan)
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
                progress=lambda done, total: _advance(bar, done, total),
            )
        sizes = EngineSizes(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            seed=seed,
        )
        self._engine = make_engine(self._loaded, sizes)
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
        own defaults apply. Ctrl-C ends the requests that are not finished and returns everything, their
        finish_reason being "abort". Raises UsageError for a prompt that cannot run; then none is run.
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
        try:
            with _interrupt_waits():
                for request_id, (text, ids), own in zip(order, prompts, params, strict=True):
                    self._engine.add_request(request_id, ids, own, text)
            pending = set(order)
            with tqdm(total=len(order), desc="Prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
                while pending:
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
        return [finished[request_id] for request_id in order]


@contextlib.contextmanager
def _interrupt_waits() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block: half a step would leave sequences between two tokens."""
    handler = signal.getsignal(signal.SIGINT)
    # a handler that is not Python's own belongs to the host, and other threads are never interrupted
    if handler is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = False

    def note(*_: object) -> None:
        nonlocal caught
        caught = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught:
        raise KeyboardInterrupt


class AsyncLLM:
    """LLM for asyncio: the engine runs in a thread of its own, every `generate` is an asynchronous iterator.

    Takes the arguments of LLM. Close it with `shutdown()` or use it as a context manager.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self._llm = LLM(model, **options)
        self._lock = threading.Condition()
        self._commands: list[tuple[Any, Future[Any]]] = []
        self._listeners: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[RequestOutput | Exception]]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="pyruntime-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Stop the engine's thread; requests that run end with an error."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Complete one prompt; yields the output so far after every token. Leaving the loop early ends the request."""
        llm, loop = self._llm, asyncio.get_running_loop()
        params = sampling_params or llm.get_default_sampling_params()
        # tokenising a long text must not stop the event loop
        text, ids = await asyncio.to_thread(token_ids, prompt, llm._loaded.tokenizer)
        queue: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()

        request_id = llm._new_id()

        def add() -> None:
            llm.engine.add_request(request_id, ids, params, text)
            self._listeners[request_id] = (loop, queue)

        try:
            await asyncio.wrap_future(self._submit(add))
            while True:
                output = await queue.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.finished:
                    return
        finally:
            self._submit(lambda: self._forget(request_id))

    def _forget(self, request_id: str) -> None:
        self._listeners.pop(request_id, None)
        self._llm.engine.abort(request_id)

    def _submit(self, command: Any) -> Future[Any]:
        """Have the engine's thread run `command` between two steps."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closed or not self._thread.is_alive():
                future.set_exception(RunError("CLOSED", "the engine is shut down; create another AsyncLLM"))
            else:
                self._commands.append((command, future))
                self._lock.notify()
        return future

    def _loop(self) -> None:
        failure: Exception = RunError("CLOSED", "the engine was shut down")
        try:
            while not self._closed:
                with self._lock:
                    while not (self._closed or self._commands or self._llm.engine.has_unfinished):
                        self._lock.wait()
                    commands, self._commands = self._commands, []
                for command, future in commands:
                    _settle(future, command)
                for output in self._llm.engine.step():
                    if not self._tell(output.request_id, output):
                        self._forget(output.request_id)
        except Exception as error:
            # a broken step ends every request with its reason, then the thread
            failure = error
        with self._lock:
            self._closed = True
            commands, self._commands = self._commands, []
        for _, future in commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(failure)
        for request_id in list(self._listeners):
            self._tell(request_id, failure)

    def _tell(self, request_id: str, item: RequestOutput | Exception) -> bool:
        """Whether somebody listens."""
        loop, queue = self._listeners[request_id]
        try:
            loop.call_soon_threadsafe(queue.put_nowait, item)
        except RuntimeError:
            # the event loop was closed over an open request; the other requests have their own
            return False
        return True


def _advance(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _settle(future: Future[Any], command: Any) -> None:
    # whoever asked may be gone by now
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(command())
    except Exception as error:
        future.set_exception(error)
