"""Clips that several processes make for one evaluation: each call of the pipeline is a unit, which the first process takes over."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelquant._sums import Sealed
from reelquant.evidence.store import Store, take_over
from reelquant.ranks import Meeting, Units, claimed, meeting

FOLDER = "ranks"


@dataclass(frozen=True)
class SharedClips:
    """What the processes make, in the eyes of one of them. A unit is a :class:`Store` of the clips of one call.

    Attributes:
        meeting: the processes.
        store: of the whole evaluation, which the first process fills.
        folder: of the units.
    """

    meeting: Meeting
    store: Store
    folder: Path

    def units(self, variant: str) -> Units:
        """The calls that make a variant."""
        return Units(self.meeting, self.folder / variant)

    def reference(self, number: int, name: str) -> Path:
        """Where the reference clip of a call lies, if it has been made."""
        there = Store(self.units("reference").place(number)).clip("reference", name)
        return there if there.is_file() else self.store.clip("reference", name)

    def take_over(self, variant: str, numbers: Iterable[int]) -> None:
        """Put calls into the evaluation's folder, in order, whichever process made them."""
        for number in numbers:
            unit = Store(self.units(variant).wait(number))
            for file in sorted(unit.root.rglob("*"), key=lambda file: (file.name != Sealed.LIST, file)):  # listed before it is there
                place = file.relative_to(unit.root)
                if file.is_file() and len(place.parts) > 1 and place.suffix != ".jsonl":
                    take_over(file, self.store.root / place)
            for row in unit.counted(variant):
                self.store.add_counts(variant, row)

    def end(self) -> None:
        """Remove the units, once the others need none of them."""
        self.meeting.all_left()
        shutil.rmtree(self.meeting.folder, ignore_errors=True)


@contextmanager
def sharing(store: Store, settings: Mapping[str, Any], begin: Callable[[], None], *, force: bool) -> Iterator[SharedClips]:
    """Meet the processes that were started together with this one, in a folder inside of the evaluation's.

    Args:
        store: of the evaluation.
        settings: what is evaluated; the same in all processes.
        begin: makes the folder of the evaluation ready, in the first process.
        force: give up units of another evaluation.

    Raises:
        RanksError: as :func:`reelquant.ranks.meeting`.
        CheckpointError: as :meth:`Store.begin`, in the first process.
    """
    folder = store.root / FOLDER
    with ExitStack() as stack:

        def claim() -> None:
            begin()
            stack.enter_context(claimed(folder, settings, force=force))

        yield SharedClips(stack.enter_context(meeting(folder, settings, claim)), store, folder)
