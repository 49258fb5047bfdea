"""Ranges of each half of a guidance pair: the call (or half of a batch) with the prompt, and the one without."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from reelquant.clock import BOTH, FIRST, SECOND
from reelquant.observe.call import Call
from reelquant.observe.channel_range import ChannelRange
from reelquant.observe.rotated_range import RotatedRange
from reelquant.observe.statistic import Statistic, Watched, absorb_each, look_each, split

NAMES = "first", "second"


@dataclass(eq=False)
class HalfRange:
    """The ranges of one half.

    Attributes:
        range: of the channels.
        rotated: of the rotated channels; None if they were not wanted.
    """

    range: ChannelRange
    rotated: RotatedRange | None = None

    def __copy__(self) -> HalfRange:
        """A copy of an empty one is independent of it, as :class:`Statistic` promises."""
        return HalfRange(copy.copy(self.range), copy.copy(self.rotated))

    @property
    def members(self) -> dict[str, Statistic]:
        """The ranges by name."""
        return {"range": self.range} | ({} if self.rotated is None else {"rotated": self.rotated})


@dataclass(eq=False)
class HalfRanges(Statistic):
    """Ranges of the first and of the second half of guidance pairs; calls that are neither are left out.

    Attributes:
        halves: of the first and of the second half.
    """

    reads_half: ClassVar[bool] = True

    halves: tuple[HalfRange, HalfRange]

    @classmethod
    def for_input(cls, of: Watched) -> Self:
        """Ranges of any input, rotated ones if they are wanted too."""

        def half() -> HalfRange:
            rotated = RotatedRange.for_input(of) if "rotated" in of.wanted else None
            return HalfRange(ChannelRange.for_input(of), rotated)

        return cls((half(), half()))

    def __copy__(self) -> HalfRanges:
        first, second = self.halves
        return HalfRanges((copy.copy(first), copy.copy(second)))

    def __iter__(self) -> Iterator[HalfRange]:
        return iter(self.halves)

    def look(self, x: Tensor, call: Call) -> dict[str, Tensor]:
        """``first.range.low`` ...: a batch that holds both halves is cut in two."""
        found: dict[str, Tensor] = {}
        for name, rows in _halves_in(x, call.half).items():
            seen = look_each(self.halves[NAMES.index(name)].members, rows, call)
            found |= {f"{name}.{key}": value for key, value in seen.items()}
        return found

    def absorb(self, seen: Mapping[str, Tensor], call: Call) -> None:
        """Add one look."""
        for name, own in split(seen).items():
            absorb_each(self.halves[NAMES.index(name)].members, own, call)

    @property
    def _parts(self) -> dict[str, Statistic]:
        """All ranges: ``first.range``, ``second.rotated`` ..."""
        named = zip(NAMES, self.halves, strict=True)
        return {f"{name}.{key}": member for name, half in named for key, member in half.members.items()}

    @property
    def state(self) -> dict[str, Tensor]:
        """Everything that was absorbed."""
        return {f"{name}.{key}": value for name, part in self._parts.items() for key, value in part.state.items()}

    @state.setter
    def state(self, known: Mapping[str, Tensor]) -> None:
        for name, part in self._parts.items():
            own = {key.removeprefix(f"{name}."): value for key, value in known.items() if key.startswith(f"{name}.")}
            part.state = own

    def log_bytes(self, calls: int) -> int:
        """Both halves of every call, in case that a batch holds both."""
        return sum(part.log_bytes(calls) for part in self._parts.values())

    def memory_bytes(self) -> int:
        """All ranges."""
        return sum(part.memory_bytes() for part in self._parts.values())

    def serves(self, of: Watched) -> bool:
        """True if frames agree, and rotated ranges are here if they are wanted."""
        rotated = "rotated" not in of.wanted or all(half.rotated is not None for half in self.halves)
        return rotated and all(part.serves(of) for part in self._parts.values())


def _halves_in(x: Tensor, half: int) -> dict[str, Tensor]:
    """The rows of each half that a call computed, by name."""
    if half == BOTH and len(x) % 2 == 0:
        return dict(zip(NAMES, x.chunk(2), strict=True))
    return {NAMES[half - FIRST]: x} if half in (FIRST, SECOND) else {}
