"""Pairs of clips with the votes of blind tests: a folder for each, with a PNG for every frame of both sides."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelquant._errors import CheckpointError
from reelquant.serve.commands import NUMBER, checked
from reelquant.serve.files import read_object, write_object
from reelquant.serve.folder import Folder

SIDES, SAME = ("float", "quantized"), "same"
CHOICES = (*SIDES, SAME)
ABOUT, VOTES = "comparison.json", "votes.json"
FPS = 8
FRAME = re.compile(r"float-(\d{3,})\.png")


@dataclass(frozen=True)
class Comparisons:
    """The comparisons of a served folder."""

    folder: Folder

    @property
    def root(self) -> Path:
        """Where they lie."""
        return self.folder.own("comparisons")

    def begin(self, number: str, form: Mapping[str, Any]) -> None:
        """Note what a comparison shows, before its clips are made."""
        told = {key: form.get(key) for key in ("float", "quantized", "prompt", "seed", "steps")}
        write_object(self._place(number) / ABOUT, told)

    def all(self) -> dict[str, dict[str, Any]]:
        """What each comparison shows, by its number, newest first."""
        folders = sorted(self.root.iterdir(), reverse=True) if self.root.is_dir() else []
        found = {one.name: read_object(one / ABOUT) for one in folders if NUMBER.fullmatch(one.name) and not one.is_symlink()}
        return {name: about for name, about in found.items() if about}

    def shown(self, number: str) -> dict[str, Any]:
        """What the page shows of one, apart from how far its job is.

        Raises:
            CheckpointError: if there is none.
        """
        folder = self._place(number)
        about = read_object(folder / ABOUT)
        if not about:
            raise CheckpointError(f"no comparison '{number:.60}'; refresh the page")
        frames = len([one for one in folder.iterdir() if FRAME.fullmatch(one.name)])
        return about | {"number": number, "frames": frames, "fps": FPS, "tally": self.tally(about)}

    def frame(self, number: str, side: str, position: int) -> Path:
        """The picture of a frame.

        Raises:
            CheckpointError: if there is none.
        """
        if side not in SIDES or position < 0:
            raise CheckpointError(f"a comparison has the sides {' and '.join(SIDES)}, got '{side:.60}'")
        path = self._place(number) / f"{side}-{position:03d}.png"
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"no frame {position} of the {side} clip; make the clips again")
        return path

    def vote(self, number: str, picked: Any) -> dict[str, Any]:
        """Add a vote; the tally with it.

        Raises:
            CheckpointError: if there is no such comparison, or no such choice.
        """
        about = self.shown(number)
        if picked not in CHOICES:
            raise CheckpointError(f"a vote is one of {', '.join(CHOICES)}, got {picked!r:.60}")
        file = self._place(number) / VOTES
        write_object(file, {"votes": [*_votes(file), picked]})
        return self.tally(about)

    def tally(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """The votes on all clips of the same two models, and how often chance alone splits them so unevenly."""
        pair = [about.get(side) for side in SIDES]
        alike = [number for number, other in self.all().items() if [other.get(side) for side in SIDES] == pair]
        votes = [vote for number in alike for vote in _votes(self.root / number / VOTES)]
        counts = {choice: votes.count(choice) for choice in CHOICES}
        return counts | {"chance": sign_test(*(counts[side] for side in SIDES))}

    def _place(self, number: str) -> Path:
        return self.folder.own(f"comparisons/{checked(number)}")


def _votes(file: Path) -> list[str]:
    found = read_object(file).get("votes")
    return [one for one in found if one in CHOICES] if isinstance(found, list) else []


def sign_test(one: int, other: int) -> float | None:
    """The two-sided sign test: how often a fair coin splits ``one + other`` throws at least as unevenly; None without a throw.

    Example:
        >>> sign_test(5, 0), sign_test(3, 3)
        (0.0625, 1.0)
    """
    throws = one + other
    if not throws:
        return None
    tail = sum(math.comb(throws, k) for k in range(min(one, other) + 1))
    return min(1.0, 2 * tail / 2**throws)
