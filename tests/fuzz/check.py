"""The one property of all three untrusted inputs: a coherent result or one clear refusal, cheap and in the folder."""

from __future__ import annotations

import builtins
import gc
import io
import json
import math
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import safetensors

from pyruntime.checkpoint import InMemory, Model, TensorRef, read_model
from pyruntime.checkpoint.header import TensorInfo, read_header
from pyruntime.errors import EXIT_BUG, PyruntimeError
from pyruntime.graph import build, fuse, verify
from pyruntime.passes.drop import load_drop_plan
from pyruntime.spec import DropPlan, weight_shapes
from tests.checkpoint.craft import SINGLE
from tests.fuzz.cases import PLAN, Case, Content, WeightFile
from tests.specs import ATTENTION, PLAIN_MLP, model_of

ACCEPTED: Final = "ok"
# seconds of processor time
_MAX_SECONDS: Final = 1.0
_MAX_GROWTH_KIB: Final = 64 << 10
_MAX_MESSAGE: Final = 2100
# the model that drop plans are read for
_PLANNED: Final = model_of([(ATTENTION, PLAIN_MLP, False)] * 4)
_DTYPE_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}


class Violation(Exception):
    """The property does not hold."""


class _TooSlow(BaseException):
    """Raised in the middle of a call; no `except Exception` may swallow it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`code` of the refusal or "ok"; `site` names the branch: where the error was raised, and those behind it."""

    code: str
    site: str
    message: str


class Bench:
    """Runs cases in folders of its own below `root`, watching files, memory and time. Use `open_bench`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._written: dict[str, dict[str, Content]] = {}
        self._opened: list[str] = []
        self._read_too_far: list[str] = []
        # specifications whose graph was checked already
        self._built: set[int] = set()

    def run(self, case: Case) -> Outcome:
        """What becomes of `case`. Raises Violation."""
        folder = self.write(case)
        self._opened.clear()
        self._read_too_far.clear()
        free, peak = _lowest_free_fd(), _peak_kib()
        try:
            outcome = self._call(case, folder)
        except _TooSlow:
            raise Violation(f"took more than {_MAX_SECONDS} s") from None
        if _lowest_free_fd() != free:
            gc.collect()
            _demand(_lowest_free_fd() == free, "left a file open")
        _demand(_peak_kib() - peak < _MAX_GROWTH_KIB, f"took {(_peak_kib() - peak) >> 10} MiB")
        _demand(not self._read_too_far, "read bytes of a tensor")
        outside = [path for path in self._opened if str(folder) not in (path, os.path.dirname(path))]
        _demand(not outside, f"opened {outside[:3]}, not in its folder")
        return outcome

    def _call(self, case: Case, folder: Path) -> Outcome:
        signal.setitimer(signal.ITIMER_PROF, _MAX_SECONDS)
        try:
            result = read(case, folder)
        except PyruntimeError as error:
            return _refused(error)
        except Exception as error:
            raise Violation(f"raised {type(error).__name__}: {str(error)[:200]} at {_site(error)}") from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            self.check_result(case, result)
        except (PyruntimeError, LookupError, ArithmeticError, TypeError, ValueError) as error:
            raise Violation(f"gave a result that raises {type(error).__name__}: {error} at {_site(error)}") from error
        return Outcome(ACCEPTED, "", "")

    def check_result(self, case: Case, result: Model | DropPlan | dict[str, TensorInfo]) -> None:
        """Raise Violation unless `result` is coherent."""
        match result:
            case Model():
                self.check_model(case, result)
            case DropPlan():
                _demand(DropPlan.from_json(json.loads(json.dumps(result.to_json()))) == result, "no round trip")
            case _:
                _check_header(case, result)

    def check_model(self, case: Case, model: Model) -> None:
        """Raise Violation unless `model` is one and holds what the files of `case` hold."""
        _demand(model.bytes_read == 0, "bytes_read is not 0")
        _demand(all(note.isprintable() and len(note) < _MAX_MESSAGE for note in model.notes), "a note is not one line")
        shapes = weight_shapes(model.spec)
        _demand(
            {name: weight.shape for name, weight in model.weights.items()} == shapes, "weights are not those of spec"
        )
        headers: dict[str, Any] = {}
        for weight in model.weights.values():
            for ref in weight.refs():
                if isinstance(ref, InMemory):
                    # gains that no file holds
                    _demand(len(ref.shape) == 1, "a matrix came from nowhere")
                    continue
                assert isinstance(ref, TensorRef)
                file = ref.shard.path.name
                content = case.files[file]
                assert isinstance(content, WeightFile)
                headers[file] = headers.get(file) or json.loads(content.header)
                _check_ref(ref, content, headers[file][ref.name])
        if hash(model.spec) not in self._built:
            graph = build(model.spec)
            verify(graph)
            verify(fuse(graph))
            self._built.add(hash(model.spec))

    def write(self, case: Case) -> Path:
        """The folder that holds the files of `case`."""
        folder = self._root / case.place
        there = self._written.get(case.place)
        if there is None:
            folder.mkdir()
            there = self._written[case.place] = {}
        if case.target == "header":
            # read from memory
            return folder
        for name in there.keys() - case.files.keys():
            (folder / name).unlink()
            del there[name]
        for name, content in case.files.items():
            if there.get(name) != content:
                _write_file(folder / name, content)
                there[name] = content
        return folder

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Spy on everything that opens or reads files."""
        os_open, pread, preadv, any_open = os.open, os.pread, os.preadv, builtins.open

        def spy_os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            base = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            self._opened.append(os.path.normpath(os.path.join(base, path)))
            return os_open(path, flags, mode, dir_fd=dir_fd)

        def spy_open(file: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(file, int):
                self._opened.append(os.path.normpath(file))
            return any_open(file, *args, **kwargs)

        def spy_pread(fd: int, count: int, start: int) -> bytes:
            if start + count > 8 + int.from_bytes(pread(fd, 8, 0), "little"):
                self._read_too_far.append(f"{start}+{count}")
            return pread(fd, count, start)

        def spy_preadv(fd: int, buffers: Any, start: int, *flags: int) -> int:
            self._read_too_far.append(f"{start}")
            return preadv(fd, buffers, start, *flags)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", spy_os_open)
            patch.setattr(os, "pread", spy_pread)
            patch.setattr(os, "preadv", spy_preadv)
            patch.setattr(builtins, "open", spy_open)
            patch.setattr(io, "open", spy_open)
            yield


@contextmanager
def open_bench() -> Iterator[Bench]:
    """A Bench with folders in memory where there are such; they are gone afterwards."""
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    before = signal.signal(signal.SIGPROF, _stop)
    # the peak starts anew, so that what this process did before does not hide what a case takes
    Path("/proc/self/clear_refs").write_text("5")
    bench = Bench(root)
    try:
        with bench.watched():
            yield bench
    finally:
        signal.signal(signal.SIGPROF, before)
        shutil.rmtree(root)


def _stop(*_: object) -> None:
    raise _TooSlow


def read(case: Case, folder: Path) -> Model | DropPlan | dict[str, TensorInfo]:
    """The call that is fuzzed."""
    match case.target:
        case "drop-plan":
            return load_drop_plan(folder / PLAN, _PLANNED)
        case "header":
            fd = os.memfd_create("header")
            try:
                _fill(fd, case.files[SINGLE])
                return read_header(fd, SINGLE)
            finally:
                os.close(fd)
    return read_model(folder)


def _refused(error: PyruntimeError) -> Outcome:
    line, site = error.one_line(), _site(error)
    _demand(error.code.isupper() and error.code.replace("_", "").isalpha(), f"its code is {error.code!r}")
    _demand(error.exit_code != EXIT_BUG, f"{error.code} counts as our own mistake (exit {EXIT_BUG})")
    _demand(str(error).isprintable(), f"the message is not one printable line: {line[:200]!a} at {site}")
    _demand(0 < len(str(error)) < _MAX_MESSAGE, f"the message has {len(line)} characters")
    line.encode()
    return Outcome(error.code, site, line)


def _site(error: BaseException | None) -> str:
    """Files, functions and lines of our code that raised `error` and what it came from."""
    places = []
    while error is not None:
        trace, last = error.__traceback__, ""
        while trace is not None:
            code = trace.tb_frame.f_code
            if f"{os.sep}pyruntime{os.sep}" in code.co_filename:
                last = f"{os.path.basename(code.co_filename)}:{code.co_name}:{trace.tb_lineno}"
            trace = trace.tb_next
        places.append(last)
        error = error.__cause__ or error.__context__
    return " < ".join(places)


def _check_header(case: Case, found: dict[str, TensorInfo]) -> None:
    """The safetensors library must accept what we accept, and see the same."""
    content = case.files[SINGLE]
    assert isinstance(content, WeightFile)
    if content.num_bytes > 1 << 20:
        # the library wants it in memory
        return
    file = content.start().ljust(content.num_bytes, b"\0")
    library: Any = safetensors
    theirs = {
        name: (each["dtype"], tuple(each["shape"]), len(each["data"])) for name, each in library.deserialize(file)
    }
    ours = {name: (info.dtype, info.shape, info.num_bytes) for name, info in found.items()}
    _demand(ours == theirs, "the library differs")


def _check_ref(ref: TensorRef, content: WeightFile, entry: dict[str, Any]) -> None:
    """`ref` is the stored tensor, or whole rows or columns of it."""
    begin, end = (8 + len(content.header) + offset for offset in entry["data_offsets"])
    if ref.stride is not None:
        item = _DTYPE_BYTES[ref.dtype]
        (num_rows, width), skipped = entry["shape"], ref.start - begin
        _demand((ref.dtype, ref.shape[0], ref.stride) == (entry["dtype"], num_rows, width * item), "another matrix")
        _demand(ref.num_bytes == math.prod(ref.shape) * item, f"{ref.name} has another size")
        _demand(skipped % item == 0 and 0 <= skipped <= (width - ref.shape[1]) * item, f"{ref.name} lies elsewhere")
        _demand(end <= content.num_bytes, f"{ref.name} ends behind its file")
        return
    row = math.prod(ref.shape[1:]) * _DTYPE_BYTES[ref.dtype]
    _demand((ref.dtype, list(ref.shape[1:])) == (entry["dtype"], entry["shape"][1:]), f"{ref.name} is another tensor")
    _demand(ref.num_bytes == ref.shape[0] * row, f"{ref.name} has another size")
    _demand(ref.shape[0] != entry["shape"][0] or ref.start == begin, f"{ref.name} begins elsewhere")
    _demand((ref.start - begin) % row == 0, f"{ref.name} begins within a row")
    _demand(begin <= ref.start and ref.start + ref.num_bytes <= end, f"{ref.name} lies elsewhere")
    _demand(end <= content.num_bytes, f"{ref.name} ends behind its file")


def _write_file(path: Path, content: Content) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        _fill(fd, content)
    finally:
        os.close(fd)


def _fill(fd: int, content: Content) -> None:
    os.write(fd, content if isinstance(content, bytes) else content.start())
    if isinstance(content, WeightFile):
        # the data is a hole: it takes no space
        os.ftruncate(fd, content.num_bytes)


def _lowest_free_fd() -> int:
    fd = os.dup(2)
    os.close(fd)
    return fd


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)
