"""What several processes share while they find a schedule: errors of single steps, and clips of trials. Times are those of the first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelquant.evidence.shared import SharedClips
from reelquant.evidence.store import Store
from reelquant.ranks import Meeting, Units, claimed, meeting

FOLDER, VALUE = "ranks", "value.json"


@dataclass(frozen=True)
class Together:
    """The processes, in the eyes of one of them.

    Attributes:
        meeting: None for a process that works alone.
    """

    meeting: Meeting | None = None

    @property
    def first(self) -> bool:
        """Whether this process measures, decides what others are told, and writes."""
        return self.meeting is None or self.meeting.rank.first

    def each(self, name: str, count: int, make: Callable[[int], Any]) -> list[Any]:
        """Plain data that does not depend on each other, in order; every process makes its share."""
        if self.meeting is None:
            return [make(number) for number in range(count)]

        def written(number: int, folder: Path) -> None:
            (folder / VALUE).write_text(json.dumps(make(number)), encoding="utf-8")

        return list(Units(self.meeting, self.meeting.folder / name).each(count, written, _value))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Plain data that the first process makes and all get: what is measured, or judged, is the same for all."""
        return self.each(name, 1, lambda number: make())[0]

    def clips(self, store: Store, name: str) -> SharedClips | None:
        """The clips of a trial; None where this process makes all."""
        return None if self.meeting is None else SharedClips(self.meeting, store, self.meeting.folder / "clips" / name)


def _value(unit: Path) -> Any:
    return json.loads((unit / VALUE).read_text(encoding="utf-8"))


@contextmanager
def together(work: Path, facts: Mapping[str, Any], *, shared: bool) -> Iterator[Together]:
    """Meet the processes that were started together with this one.

    Args:
        work: the folder of what is tried.
        facts: what they were asked for, as plain data.
        shared: whether there are others, or were.

    Raises:
        RanksError: as :func:`reelquant.ranks.meeting`.
    """
    if not shared:
        yield Together()
        return
    folder = work / FOLDER
    with ExitStack() as stack:

        def claim() -> None:
            stack.enter_context(claimed(folder, facts, force=True))

        here = stack.enter_context(meeting(folder, facts, claim))
        yield Together(here)
        if here.rank.first:
            here.all_left()
            shutil.rmtree(folder, ignore_errors=True)
