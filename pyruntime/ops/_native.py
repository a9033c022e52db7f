"""The compiled CPU kernels: the extension, the path it takes on this CPU, and its threads."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Final

from pyruntime import env
from pyruntime.errors import UsageError

_LOGGER: Final = logging.getLogger("pyruntime")


@dataclass(frozen=True, slots=True)
class Native:
    """The compiled extension and how to run it: one CPU path and a number of threads."""

    module: ModuleType
    isa: str
    num_threads: int


def load() -> Native:
    """Import the compiled extension and choose the CPU path, from PYRUNTIME_CPU_ISA or the best this CPU has.

    Raises UsageError when the extension is not built, or when the path asked for cannot run here.
    """
    try:
        # by name, because a checkout that is not built yet must still import
        module = importlib.import_module("pyruntime._C")
    except ImportError as error:
        raise UsageError(
            "NATIVE", f"pyruntime._C cannot be imported ({error}); build it with `pip install -e .`"
        ) from error
    available = module.isa_available()
    isa = env.cpu_isa() or module.isa_detected()
    if isa not in available:
        raise UsageError(
            "ENV", f"PYRUNTIME_CPU_ISA is {isa!r}; this CPU has {', '.join(available)}; choose one of these or unset it"
        )
    wanted = env.num_threads() or module.num_threads()
    started = module.start_team(wanted)
    if started < wanted:
        _LOGGER.warning("%d of %d threads could be started; the C++ target runs with these", started, wanted)
    return Native(module, isa, started)
