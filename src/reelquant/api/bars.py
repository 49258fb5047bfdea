"""The progress that a verb shows if its caller listens to none: bars in a terminal and in a notebook, nothing elsewhere."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from reelquant._errors import printable
from reelquant._progress import PHASES, Progress, Silent

PAUSE = 0.2  # seconds between two drawings in a notebook, at least: each is a message to the browser


@contextmanager
def shown() -> Iterator[Progress]:
    """A progress that suits what this process writes to, for as long as the ``with`` block."""
    if in_notebook():
        yield NotebookBar()
    elif sys.stdout.isatty() and sys.stderr.isatty():
        with TerminalBars() as bars:
            yield bars
    else:
        yield Silent()


def in_notebook() -> bool:
    """Whether cells of a notebook run this process; a shell of IPython in a terminal has no kernel."""
    ask = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return hasattr(ask() if ask is not None else None, "kernel")


class TerminalBars:
    """A bar for each phase, on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Drawn

        words = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=28), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._drawn = Drawn(*words, *times, console=Console(stderr=True))
        self._task: Any = None

    def phase(self, name: str, total: int) -> None:
        """Start the next bar; the last one is complete."""
        self._finish()
        self._task = self._drawn.add_task(printable(PHASES.get(name, name)), total=max(total, 1))

    def advance(self) -> None:
        """One step of the present bar is done."""
        if self._task is not None:
            self._drawn.advance(self._task)

    def tell(self, sentence: str) -> None:
        """A line above the bars."""
        self._drawn.console.print(printable(sentence), markup=False, highlight=False)

    def _finish(self) -> None:
        if self._task is not None:
            self._drawn.update(self._task, completed=self._drawn.tasks[self._task].total)

    def __enter__(self) -> TerminalBars:
        self._drawn.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self._finish()
        self._drawn.stop()


class NotebookBar:
    """One line below the cell, drawn by the browser: no widgets are needed."""

    def __init__(self) -> None:
        self._place: Any = None
        self._words, self._done, self._total, self._drawn_at = "", 0, 1, 0.0

    def phase(self, name: str, total: int) -> None:
        """Start again at zero, under another name."""
        self._words, self._done, self._total = PHASES.get(name, name), 0, max(total, 1)
        self._draw()

    def advance(self) -> None:
        """One step further; what is drawn lags behind by :data:`PAUSE` at most, and the last step is always drawn."""
        self._done += 1
        if self._done >= self._total or time.monotonic() - self._drawn_at >= PAUSE:
            self._draw()

    def tell(self, sentence: str) -> None:
        """A line above the bar."""
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]  (every notebook has it)

        display(HTML(html.escape(sentence)))

    def _draw(self) -> None:
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]  (every notebook has it)

        bar = f'<progress value="{self._done}" max="{self._total}"></progress> {self._done}/{self._total} {html.escape(self._words)}'
        self._drawn_at = time.monotonic()
        if self._place is None:
            self._place = display(HTML(bar), display_id=True)
        else:
            self._place.update(HTML(bar))
