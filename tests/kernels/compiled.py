"""Compile recorded launches for GPUs that need not be here, as a launch on them would, and read what came out."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import queue
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.kernels.facts import CACHE, Facts, read_cubin
from tests.kernels.record import Recorded

# facts of objects are kept as files under this name; a change of what they say changes it
_KEPT: Final = CACHE / "facts-1"
# characters of a compiler's complaint
_MOST_SAID: Final = 1000


class AbsentDevice:
    """Stands for a GPU of one architecture: Triton specialises and compiles for it, and cannot launch."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        """A number that is this architecture's own: Triton keeps what it compiled by device."""
        return self._capability

    def get_current_stream(self, device: int) -> int:
        """None is there."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """The architecture; warps of 32."""
        return GPUTarget("cuda", self._capability, 32)


@contextlib.contextmanager
def absent_device(capability: int) -> Iterator[None]:
    """Make Triton compile for sm_`capability` and keep its objects in build/kernel-cache."""
    # versions of Triton differ in what they do without the second
    settings = {"TRITON_CACHE_DIR": str(CACHE / "triton"), "TRITON_DEFAULT_FP_FUSION": "1"}
    driver.set_active(AbsentDevice(capability))
    try:
        with mock.patch.dict(os.environ, settings):
            yield
    finally:
        # whoever is next looks for a device again
        driver.set_active(None)


def unique(launches: Sequence[Recorded], capability: int) -> dict[str, Recorded]:
    """One launch for each kernel that has to be compiled, by what tells it apart; in an `absent_device`."""
    found: dict[str, Recorded] = {}
    for launch in launches:
        found.setdefault(_key(launch, capability), launch)
    return found


def _key(launch: Recorded, capability: int) -> str:
    """Name, constants, warps, stages, and a digest of the other arguments' types.

    Triton makes a kernel of its own for each set of types of pointers, addresses and integers that 16 divides, and
    integers that are 1: its own code says which, so that this is what a launch on a GPU compiles.
    """
    bind = launch.kernel.device_caches[capability][-1]
    _, specialization, _ = bind(*launch.arguments, **_options(launch))
    pairs = zip(launch.kernel.arg_names, specialization, strict=True)
    types = " ".join(f"{name}={kind}" for name, kind in pairs if name not in launch.constants)
    digest = hashlib.sha256(types.encode()).hexdigest()[:8]
    constants = [f"{name}={_short(value)}" for name, value in launch.constants.items() if name != "PDL"]
    sizes = (f"warps={launch.num_warps}", f"stages={launch.num_stages}")
    return " ".join((launch.kernel.__name__, *constants, *sizes, digest))


def _short(value: Any) -> str:
    return str(int(value) if isinstance(value, bool) else value)


def _options(launch: Recorded) -> dict[str, Any]:
    """Constants and options as frame.launch passes them."""
    options = {**launch.constants, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return options | ({"launch_pdl": True} if launch.early else {})


def facts_of(launch: Recorded) -> Facts:
    """Compile a launch, or find it compiled; in an `absent_device`."""
    compiled = launch.kernel.warmup(*launch.arguments, grid=(1,), **_options(launch))
    # Triton's hash covers the source, the types, the options, the architecture and its own version
    kept = _KEPT / f"{compiled.hash}.json"
    if not kept.exists():
        _write(kept, read_cubin(compiled.asm["cubin"], compiled.metadata.shared).to_json())
    return Facts.from_json(kept.read_text())


def _write(path: Path, text: str) -> None:
    """Whole or not at all: two processes may write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)


def facts_of_all(launches: Mapping[str, Recorded], num_processes: int) -> dict[str, Facts | str]:
    """Facts of every launch, or why it does not compile; in an `absent_device`.

    Processes are forked, so that they know the launches, and take the next one when they have done one.
    """
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    taken = context.Value("i", 0)
    workers = [context.Process(target=_work, args=(launches, taken, results)) for _ in range(num_processes)]
    for worker in workers:
        worker.start()
    found: dict[str, Facts | str] = {}
    while len(found) < len(launches):
        try:
            key, result = results.get(timeout=1)
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers) and results.empty():
                break
        else:
            found[key] = result
    for worker in workers:
        worker.join()
    return {key: found.get(key, "the compiler crashed") for key in launches}


def _work(launches: Mapping[str, Recorded], taken: Any, results: Any) -> None:
    # compilers print a whole program when they fail, past Python
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    keys = list(launches)
    while True:
        with taken.get_lock():
            mine, taken.value = taken.value, taken.value + 1
        if mine >= len(keys):
            return
        try:
            result: Facts | str = facts_of(launches[keys[mine]])
        except Exception as error:
            result = f"does not compile: {str(error)[:_MOST_SAID]}"
        results.put((keys[mine], result))
