"""How a command ends after an error: one line on stderr and an exit code."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from reelquant._errors import ReelQuantError

FAILED, INTERRUPTED, TERMINATED = 1, 130, 143
_USAGE: Any = typer.BadParameter.__mro__[2]  # errors of usage, which typer itself explains


def one_line(error: BaseException) -> str:
    """The line on stderr: the message of a ReelQuantError; for other errors the class too."""
    text = " ".join(str(error).split())
    if isinstance(error, ReelQuantError):
        return f"reelquant: {text}"
    return f"reelquant: unexpected {type(error).__name__}: {text or 'no message'} (`reelquant --debug ...` shows where)"


@contextmanager
def left_in(folder: Path | None) -> Iterator[None]:
    """Inside, Ctrl-C names the folder that holds the finished work, if that folder exists."""
    try:
        yield
    except KeyboardInterrupt:
        exists = folder is not None and folder.is_dir()
        raise KeyboardInterrupt(*([f"finished work is in '{folder}': continue with --resume"] if exists else [])) from None


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack like Ctrl-C, so that half-written files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Verbs(TyperGroup):
    """The group of all verbs: errors become one line and a code, unless ``--debug`` asks for tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        debug = bool(ctx.params.get("debug"))
        try:
            with terminable():
                from reelquant.cli.console import quiet_libraries, take_any_text

                take_any_text()
                if not debug:
                    quiet_libraries()
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, _USAGE):
            raise
        except KeyboardInterrupt as error:
            typer.echo(f"reelquant: interrupted, {error or 'nothing is left behind'}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if debug:
                raise
            typer.echo(one_line(error), err=True)
            raise typer.Exit(FAILED) from None
