"""How a command ends after an error: one line on stderr and an exit code; with ``--json`` also one document on stdout."""

from __future__ import annotations

import errno
import math
import os
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from reelquant._errors import RanksError, RecipeError, ReelQuantError, SiteError, UnsupportedError, printable
from reelquant.cli.signals import TERMINATED, Terminated, asked_to_stop, terminable, told
from reelquant.ranks import Rank, this_rank

FAILED, INTERRUPTED, UNREAD = 1, 130, 141  # as shells have them: 128 and the number of the signal
ASKED = (RecipeError.__name__, SiteError.__name__, UnsupportedError.__name__)  # about what was asked for
NOTHING = "nothing is left behind: run the same command again"
LIMITS = {
    errno.EMFILE: "let processes open more files (ulimit -n)",
    errno.ENFILE: "close other programs: all of them together have too many files open",
    errno.ENOSPC: "free space on the disk",
    errno.EDQUOT: "free space: your share of the disk is used up",
    errno.EFBIG: "let processes write larger files (ulimit -f)",
}
"""What a system may run out of, and what helps."""
_USAGE: Any = typer.BadParameter.__mro__[2]  # errors of usage, which typer itself explains
_INSTEAD = {"-r": "--reference"}  # what verbs without a recipe once called their reference


def one_line(error: BaseException) -> str:
    """The line on stderr: the message of a ReelQuantError; for other errors the class too."""
    text = printable(" ".join(str(error).split()))
    if isinstance(error, ReelQuantError):
        return f"reelquant: {text}"
    if isinstance(error, OSError) and error.filename is not None:  # a disk, a permission, a name: nothing unexpected
        return printable(f"reelquant: cannot use '{error.filename!s:.300}': {error.strerror}")
    for code, advice in LIMITS.items():  # libraries raise errors of other kinds that end in these words
        if os.strerror(code) in text:
            return f"reelquant: {text}; {advice}"
    return f"reelquant: unexpected {type(error).__name__}: {text or 'no message'} (`reelquant --debug ...` shows where)"


class Verb(TyperCommand):
    """A verb, whose numbers are finite."""

    def invoke(self, ctx: Any) -> Any:
        """Run it.

        Raises:
            typer.BadParameter: for an option that is NaN or infinite.
        """
        for option in self.params:
            value = ctx.params.get(option.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"give a finite number, got {value}", ctx=ctx, param=option)
        return super().invoke(ctx)


class Verbs(TyperGroup):
    """The group of all verbs: errors become one line and a code, unless ``--debug`` asks for tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        debug = bool(ctx.params.get("debug"))
        json = "--json" in (*ctx._protected_args, *ctx.args)
        try:
            with terminable():
                try:
                    from reelquant.cli.console import quiet_libraries, take_any_text

                    take_any_text()
                    if not debug:
                        quiet_libraries()
                    return super().invoke(ctx)
                except Exception as error:
                    if (stop := asked_to_stop()) is not None:  # what an import or a library made of it
                        raise stop from error
                    raise
        except (typer.Exit, typer.Abort):
            raise
        except _USAGE as error:
            if (instead := _INSTEAD.get(getattr(error, "option_name", ""))) is not None:
                error.possibilities = [instead]
            if not _own().first:
                raise typer.Exit(error.exit_code) from None
            if json:
                _document("UsageError", error.format_message(), error.exit_code)
            raise
        except RanksError as error:
            if error.consequence and not _own().first:  # the first process, or the one that failed, tells it
                raise typer.Exit(FAILED) from None
            _end(type(error).__name__, one_line(error), FAILED, json)
        except KeyboardInterrupt as error:
            _end("interrupted", f"reelquant: interrupted, {told(error) or NOTHING}", INTERRUPTED, json)
        except Terminated as error:
            _end("terminated", f"reelquant: terminated, {told(error) or NOTHING}", TERMINATED, json)
        except BrokenPipeError:  # the reader of the output has seen enough, as `| head` has
            from reelquant.cli.console import to_nowhere

            to_nowhere()
            raise typer.Exit(UNREAD) from None
        except Exception as error:
            if debug:
                raise
            _end(type(error).__name__, one_line(error), FAILED, json)


def _end(kind: str, line: str, code: int, json: bool) -> NoReturn:
    """End the command: the line on stderr, and with ``json`` a document on stdout.

    Raises:
        typer.Exit: with the code.
    """
    rank = _own()
    if not rank.first:
        if code in (INTERRUPTED, TERMINATED) or kind in ASKED:  # as in all processes, and the first one says so
            raise typer.Exit(code) from None
        line = line.replace("reelquant: ", f"reelquant: process {rank.number} of {rank.count}: ", 1)
    if json:
        _document(kind, line.removeprefix("reelquant: "), code)
    typer.echo(printable(line), err=True)
    raise typer.Exit(code) from None


def _own() -> Rank:
    """Which process this is; the first, if what its launcher says is what went wrong."""
    try:
        return this_rank()
    except RanksError:
        return Rank()


def _document(kind: str, message: str, code: int) -> None:
    """What went wrong, as data: the only thing on stdout."""
    from reelquant.cli.console import emit

    emit({"error": {"kind": kind, "message": message, "exit_code": code}})
