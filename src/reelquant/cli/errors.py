"""How a command ends after an error: one line on stderr and an exit code."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from reelquant._errors import ReelQuantError, printable
from reelquant.cli.signals import TERMINATED, Terminated, asked_to_stop, terminable

FAILED, INTERRUPTED, UNREAD = 1, 130, 141  # as shells have them: 128 and the number of the signal
_USAGE: Any = typer.BadParameter.__mro__[2]  # errors of usage, which typer itself explains


def one_line(error: BaseException) -> str:
    """The line on stderr: the message of a ReelQuantError; for other errors the class too."""
    text = printable(" ".join(str(error).split()))
    if isinstance(error, ReelQuantError):
        return f"reelquant: {text}"
    if isinstance(error, OSError) and error.filename is not None:  # a disk, a permission, a name: nothing unexpected
        return printable(f"reelquant: cannot use '{error.filename!s:.300}': {error.strerror}")
    return f"reelquant: unexpected {type(error).__name__}: {text or 'no message'} (`reelquant --debug ...` shows where)"


class Verbs(TyperGroup):
    """The group of all verbs: errors become one line and a code, unless ``--debug`` asks for tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        debug = bool(ctx.params.get("debug"))
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
        except (typer.Exit, typer.Abort, _USAGE):
            raise
        except KeyboardInterrupt as error:
            typer.echo(printable(f"reelquant: interrupted, {str(error) or 'nothing is left behind'}"), err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Terminated as error:
            typer.echo(printable(f"reelquant: terminated, {error.where or 'nothing is left behind'}"), err=True)
            raise typer.Exit(TERMINATED) from None
        except BrokenPipeError:  # whoever read the output has seen enough, as `| head` has
            from reelquant.cli.console import to_nowhere

            to_nowhere()
            raise typer.Exit(UNREAD) from None
        except Exception as error:
            if debug:
                raise
            typer.echo(one_line(error), err=True)
            raise typer.Exit(FAILED) from None
