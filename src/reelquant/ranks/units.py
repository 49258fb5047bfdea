"""Units of work as folders: each is made by one process, appears complete or not at all, and is read by all of them."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from reelquant._sums import Sealed, whole_sum
from reelquant.ranks.meeting import Meeting

T = TypeVar("T")
UNFINISHED = ".unfinished-"  # in the hidden name of a unit that is being made


@dataclass(frozen=True)
class Units:
    """Units of one phase of the work. Who makes a unit depends on how many processes there are; its name and content do not.

    Attributes:
        meeting: the processes.
        folder: of the phase.
        turn: whose turn the first unit is: units of phases that follow each other are dealt out evenly.
    """

    meeting: Meeting
    folder: Path
    turn: int = 0

    def place(self, number: int) -> Path:
        """Where a unit lies once it is complete."""
        return self.folder / f"{number:06}"

    def done(self, number: int) -> bool:
        """Whether a unit is complete. The folder is listed: network file systems remember for a while that a name was not there."""
        return self.place(number).name in (os.listdir(self.folder) if self.folder.is_dir() else ())

    def due(self, number: int) -> bool:
        """Whether this process has to make a unit: it is its own, and no earlier run made it."""
        return self.meeting.owns(self.turn + number) and not self.done(number)

    def wait(self, number: int) -> Path:
        """Where a unit lies, once another process has made it."""
        self.meeting.wait(lambda: self.done(number), f"part {number} of '{self.folder.name}'")
        return self.place(number)

    @contextmanager
    def making(self, number: int) -> Iterator[Path]:
        """A folder to write the files of a unit into; it becomes the unit at the end, and goes if that is not reached."""
        unfinished = self.folder / f"{UNFINISHED}{number:06}-{uuid.uuid4().hex[:8]}"
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            for file in sorted(unfinished.rglob("*")):
                if file.is_file() and file.name != Sealed.LIST:
                    Sealed(unfinished).seal(str(file.relative_to(unfinished)), whole_sum(file))
            try:
                unfinished.rename(self.place(number))
            except OSError:
                if not self.done(number):  # else a process of an earlier run that had not ended yet made the same
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def each(self, count: int, make: Callable[[int, Path], None], read: Callable[[Path], T]) -> Sequence[T]:
        """Make this process's share of so many units, then read all of them in order.

        Args:
            count: of the units.
            make: writes the files of a unit into a folder.
            read: reads them.
        """
        for number in range(count):
            if self.due(number):
                with self.making(number) as folder:
                    make(number, folder)
        return [read(self.wait(number)) for number in range(count)]
