"""`pyruntime collect-env`: what a bug report needs."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from pyruntime import env
from pyruntime.bench import environment, extensions, machine
from pyruntime.cli import options as o


def collect_env(as_json: o.Json = False) -> None:
    """Versions, machine, compiled parts and environment variables, for a bug report."""
    parts = {"machine": machine(), "extensions": extensions(), "environment": environment()}
    if as_json:
        print(json.dumps(parts))
        return
    table = Table(show_header=False, box=None)
    for title, values in parts.items():
        table.add_row(f"[bold]{title}")
        for name, value in values.items():
            shown = value or ("" if title == "machine" else f"(not set: {env.VARIABLES.get(name, '')})")
            table.add_row(f"  {name}", str(shown))
    Console().print(table)
