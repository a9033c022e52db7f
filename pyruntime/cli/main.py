"""The `pyruntime` command: sub-commands, and what becomes of errors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import pyruntime
from pyruntime import env
from pyruntime.cli.bench import bench_app
from pyruntime.cli.chat import chat
from pyruntime.cli.collect_env import collect_env
from pyruntime.cli.doctor import doctor
from pyruntime.cli.evaluate import evaluate
from pyruntime.cli.fold import fold
from pyruntime.cli.generate import generate
from pyruntime.cli.inspect import inspect
from pyruntime.cli.merge import merge
from pyruntime.cli.prune import prune
from pyruntime.cli.score import score
from pyruntime.cli.tradeoff import tradeoff
from pyruntime.cli.verify import verify
from pyruntime.errors import EXIT_BUG, PyruntimeError

_INTERRUPTED = 130

app = typer.Typer(
    name="pyruntime",
    help="Inference for pruned transformer language models: dropped sublayers do not exist.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(chat)
app.command()(inspect)
app.command()(verify)
app.command()(score)
app.command()(prune)
app.command()(fold)
app.command()(merge)
app.command("eval")(evaluate)
app.command()(tradeoff)
app.add_typer(bench_app)
app.command("collect-env")(collect_env)
app.command()(doctor)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(pyruntime.__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the sub-command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or the code of the error (reference: errors.py), or 130 after Ctrl-C."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        logging.basicConfig(level=env.logging_level() or "WARNING", format="%(levelname)s %(name)s: %(message)s")
        # HTTP libraries chat at info level; the level asked for is about us
        logging.getLogger("httpx").setLevel(logging.WARNING)
        result = app(arguments, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except PyruntimeError as error:
        print(error.one_line(), file=sys.stderr)
        return error.exit_code
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except MemoryError:
        print("error[MEMORY]: the machine is out of memory; use a smaller model, batch or context", file=sys.stderr)
        return 7
    except Exception as error:
        # typer's own usage errors: some releases bring click along, others contain it, so the class has no one home
        usage = getattr(error, "format_message", None)
        if usage is not None:
            # a command without its sub-command has shown its help and has nothing to add
            if message := usage():
                print(f"error[USAGE]: {message} (pyruntime --help shows what there is)", file=sys.stderr)
            return 2
        logging.getLogger("pyruntime").debug("traceback", exc_info=True)
        print(
            f"error[BUG]: {type(error).__name__}: {error}; this is a defect of pyruntime, please report it with the "
            "traceback that PYRUNTIME_LOGGING_LEVEL=debug shows",
            file=sys.stderr,
        )
        return EXIT_BUG
