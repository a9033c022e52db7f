"""Run pytest with another build of the C++ extension: python tests/sanitize.py EXTENSION [pytest's arguments]."""

from __future__ import annotations

import importlib.util
import sys

import pytest

import pyruntime


def main() -> int:
    """The exit status of pytest."""
    path, *arguments = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("pyruntime._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pyruntime._C"] = module
    spec.loader.exec_module(module)
    # a test that imports the ordinary build would prove nothing
    pyruntime._C = module  # type: ignore[attr-defined]
    assert module.__file__ == path, f"{module.__file__} was loaded, not {path}"
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
