"""Output: two consoles, progress bars, readable sizes. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from reelquant._errors import UnsupportedError, nearest, printable
from reelquant._progress import PHASES
from reelquant.cli.lines import Lines
from reelquant.cli.signals import stop_if_asked

PIPED = 120  # columns if the output is not a terminal and COLUMNS is not set


def to_nowhere() -> None:
    """From now on the standard output is thrown away; else the interpreter would complain about its reader while it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Screen(Console):
    """A console that does not decide how a command ends."""

    def on_broken_pipe(self) -> None:
        """Who reads the output has gone (``| head``): what is written goes on, and what is said about it goes nowhere."""
        self.quiet = True
        to_nowhere()


out = Screen(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED)
err = Screen(stderr=True, highlight=False)


def take_any_text() -> None:
    """Let both streams take every character; a code page that lacks one (a check mark, a prompt in another script) gets ``?`` for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


QUIET = {  # read when the libraries are imported
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_LOGS": "-all",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


class _Remarks(logging.Handler):
    """What the library remarks, a line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(printable(f"reelquant: {' '.join(record.getMessage().split())}"), err=True)


def only_errors() -> None:
    """Another process of the same command talks to the user: of this one nothing is heard but why it failed."""
    to_nowhere()
    err.quiet = True
    for one in logging.getLogger("reelquant").handlers:
        if isinstance(one, _Remarks):
            one.setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Keep the bars and remarks of libraries off the screen; must run before they are imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    told = logging.getLogger("reelquant")
    if not any(isinstance(one, _Remarks) for one in told.handlers):
        told.addHandler(_Remarks(logging.WARNING))
    if logging.lastResort is not None:  # what libraries log without a handler, torchao among them
        logging.lastResort.setLevel(logging.ERROR)
    for category in (FutureWarning, UserWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)


def quiet_loading() -> None:
    """Switch off the loading bars; diffusers and transformers are imported by now or will be."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


class Lane:
    """One line of work: its phases follow each other. A :class:`reelquant.engine.run.Progress`.

    Args:
        bars: where they are drawn.
        keep: finished phases stay on the screen; else they share one line.
    """

    def __init__(self, bars: Progress | Lines, keep: bool = True) -> None:
        self._bars, self._keep = bars, keep
        self._task: TaskID | None = None
        self._subject = ""

    def about(self, subject: str) -> None:
        """What the following phases are about; written before their names."""
        self._subject = f"{subject}: " if subject else ""

    def phase(self, name: str, total: int) -> None:
        """Start the next bar; the last one is complete."""
        stop_if_asked()
        words = safe(self._subject + PHASES.get(name, name))
        self.finish()
        if self._task is None or self._keep:
            self._task = self._bars.add_task(words, total=max(total, 1))
        else:
            self._bars.reset(self._task, total=max(total, 1), description=words)

    def advance(self) -> None:
        """One step of the present bar is done."""
        stop_if_asked()
        if self._task is not None:
            self._bars.advance(self._task)

    def finish(self) -> None:
        """Fill the present bar."""
        if self._task is not None:
            self._bars.update(self._task, completed=self._bars.tasks[self._task].total)


def _drawn() -> Progress:
    words = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
    )
    times = (TimeElapsedColumn(), TextColumn("[dim]left"), TimeRemainingColumn())
    return Progress(*words, *times, console=err, disable=not err.is_terminal)


PROGRESS: dict[str, Callable[[], Progress | Lines]] = {"bars": _drawn, "json": Lines}
_chosen = {"progress": "bars"}


def show_progress_as(style: str) -> None:
    """How bars are shown from now on: one of :data:`PROGRESS`.

    Raises:
        UnsupportedError: for another word.
    """
    if style not in PROGRESS:
        raise UnsupportedError(f"--progress: no '{style}'; {nearest(style, PROGRESS)}")
    _chosen["progress"] = style


class Bars(Lane):
    """Progress bars with the time left, on stderr; nothing is drawn if stderr is not a terminal, and ``--progress json`` writes lines."""

    def __init__(self) -> None:
        super().__init__(PROGRESS[_chosen["progress"]]())

    def lane(self) -> Lane:
        """Another line of work beside this one, whose phases share one line of the screen."""
        return Lane(self._bars, keep=False)

    def tell(self, sentence: str) -> None:
        """A line above the bars; also where stderr is not a terminal."""
        err.print(f"[dim]reelquant:[/dim] {safe(sentence)}", soft_wrap=True)

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self.finish()
        self._bars.stop()


def safe(text: object) -> str:
    """Text of others inside of markup of ours: its brackets are no markup, its escape sequences are spelled out."""
    return escape(printable(str(text)))


def marked(markup: str) -> Text:
    """Markup of ours, for a cell of a table; what comes from elsewhere goes through :func:`safe` first."""
    return Text.from_markup(markup)


def done(path: object, more: str = "") -> None:
    """The last line: what was written."""
    out.print(f"[green]✓[/green] {safe(path)}{f'  [dim]{safe(more)}[/dim]' if more else ''}", soft_wrap=True)


def whole(name: str, words: object) -> None:
    """Something to paste, in one line of its own: terminals break it on the screen only."""
    out.print(f"[dim]{safe(name)}[/dim]  {safe(words)}", soft_wrap=True)


def emit(data: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(plain(data), indent=2))


def plain(value: Any) -> Any:
    """The value in types that JSON has: lists for tuples, null for NaN and infinities, text for other objects."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool) or value is None else str(value)


def size(count: float) -> str:
    """Bytes in decimal units, three digits: ``1.50 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def figure(value: float | None, pattern: str = "{:.3f}") -> str:
    """A figure; a dash for None, NaN and infinities."""
    return "-" if value is None or not math.isfinite(value) else pattern.format(value)
