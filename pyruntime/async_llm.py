"""AsyncLLM: the offline API for asyncio."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from pyruntime.checkpoint import Model
from pyruntime.engine.params import SamplingParams
from pyruntime.engine.prompt import Prompt, token_ids
from pyruntime.engine.request import RequestOutput
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import RunError
from pyruntime.llm import LLM, Messages
from pyruntime.plan import Plan


class AsyncLLM:
    """LLM for asyncio: the engine runs in a thread of its own, `generate` and `chat` are asynchronous iterators.

    Takes the arguments of LLM, and reads the model where it is made (`await asyncio.to_thread(AsyncLLM, model)` lets
    the event loop go on meanwhile). Close it with `shutdown()`, or use it in `with` or `async with`. Whatever ends the
    engine, down to a panic of a library, is raised in every caller: RunError ENGINE if it was no Exception.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self._llm = LLM(model, **options)
        self._lock = threading.Condition()
        self._commands: list[tuple[Any, Future[Any]]] = []
        self._listeners: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[RequestOutput | Exception]]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="pyruntime-engine", daemon=True)
        self._thread.start()
        # a thread that is inside torch when the interpreter ends would take the process down with it
        atexit.register(self.shutdown)

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        # the thread may be in a long step, and other tasks want to hear how it ends
        await asyncio.to_thread(self.shutdown)

    @property
    def model(self) -> Model:
        """Specification, lazy weights and notes."""
        return self._llm.model

    @property
    def plan(self) -> Plan:
        """What runs."""
        return self._llm.plan

    def get_tokenizer(self) -> Tokenizer:
        """As LLM's."""
        return self._llm.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """As LLM's."""
        return self._llm.get_default_sampling_params()

    def shutdown(self) -> None:
        """Stop the engine's thread and wait for its end; requests that run end with an error."""
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()
        atexit.unregister(self.shutdown)

    def generate(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> AsyncIterator[RequestOutput]:
        """Complete one prompt; yields the output so far after every token. Leaving the loop early ends the request."""
        return self._run(lambda: token_ids(prompt, self._llm._loaded.tokenizer), sampling_params)

    def chat(self, messages: Messages, sampling_params: SamplingParams | None = None) -> AsyncIterator[RequestOutput]:
        """Answer one conversation, rendered by the model's chat template; otherwise as `generate`."""
        return self._run(lambda: (None, self.get_tokenizer().apply_chat_template(messages)), sampling_params)

    async def _run(
        self, tokenise: Callable[[], tuple[str | None, Sequence[int]]], sampling_params: SamplingParams | None
    ) -> AsyncIterator[RequestOutput]:
        llm, loop = self._llm, asyncio.get_running_loop()
        params = sampling_params or llm.get_default_sampling_params()
        # tokenising a long text must not stop the event loop
        text, ids = await asyncio.to_thread(tokenise)
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
        except BaseException as error:
            # a broken step ends every request with its reason, then the thread
            failure = _as_exception(error)
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


def _settle(future: Future[Any], command: Any) -> None:
    # whoever asked may be gone by now
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(command())
    except BaseException as error:
        future.set_exception(_as_exception(error))


def _as_exception(error: BaseException) -> Exception:
    """`error`, or a RunError for what would end a thread silently: a Rust panic is no Exception."""
    if isinstance(error, Exception):
        return error
    failure = RunError("ENGINE", f"the engine ended with {type(error).__name__}: {error}; please report it")
    failure.__cause__ = error
    return failure
