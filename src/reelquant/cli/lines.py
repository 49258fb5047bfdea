"""Progress as lines of JSON on stderr, for programs that run a verb."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import Any

PAUSE = 0.2  # seconds between two lines of one bar, at least


@dataclass
class Bar:
    """One bar.

    Attributes:
        words: what is done.
        total: steps.
        completed: of these.
        began: when, on the monotonic clock.
        told: when a line was last written.
    """

    words: str
    total: float
    completed: float = 0
    began: float = 0.0
    told: float = 0.0


class Lines:
    """Takes the calls that :class:`rich.progress.Progress` takes from a lane, and writes a line for a new phase, for its last step, and at
    most every :data:`PAUSE` seconds in between::

        {"progress": {"bar": 0, "phase": "sampling calibration clips", "done": 3, "total": 24, "seconds": 1.5}}

    ``bar`` numbers lines of work that run beside each other; ``seconds`` have passed since the phase began.
    """

    def __init__(self) -> None:
        self.tasks: list[Bar] = []

    def add_task(self, description: str, total: float) -> Any:
        """A new bar; its number."""
        self.tasks.append(Bar("", 1))
        self.reset(len(self.tasks) - 1, total, description)
        return len(self.tasks) - 1

    def reset(self, task: Any, total: float, description: str) -> None:
        """A bar starts again with another phase."""
        from rich.text import Text

        self.tasks[task] = Bar(Text.from_markup(description).plain, total, began=time.monotonic())
        self._tell(task)

    def advance(self, task: Any) -> None:
        """One step."""
        bar = self.tasks[task]
        bar.completed += 1
        if bar.completed >= bar.total or time.monotonic() - bar.told >= PAUSE:
            self._tell(task)

    def update(self, task: Any, completed: float) -> None:
        """So many steps are done."""
        if self.tasks[task].completed != completed:
            self.tasks[task].completed = completed
            self._tell(task)

    def start(self) -> None:
        """Nothing is drawn."""

    def stop(self) -> None:
        """Nothing was drawn."""

    def _tell(self, task: int) -> None:
        bar = self.tasks[task]
        bar.told = time.monotonic()
        said = {"bar": task, "phase": bar.words, "done": bar.completed, "total": bar.total, "seconds": round(bar.told - bar.began, 2)}
        sys.stderr.write(json.dumps({"progress": said}) + "\n")
        sys.stderr.flush()
