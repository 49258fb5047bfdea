"""A sample of the rows that a layer multiplies."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from reelquant.observe.call import Call
from reelquant.observe.geometry import Geometry
from reelquant.observe.statistic import FLOAT, Statistic, Watched

ROWS = 1024  # rows of every input, over all calls
PER_CALL = 8  # rows of a call, at least: with more calls than ROWS / PER_CALL, only some are sampled
GOLDEN = (5**0.5 - 1) / 2
EMPTY = -1  # step of a place without a row


@dataclass(eq=False)
class Rows(Statistic):
    """At most ``total`` patches, evenly from all calls: ``[rows, channels * taps]`` float32 on the CPU.

    The expected calls, those of the first step before those of the second, are cut into equal stretches, at most ``total / 8``, and one
    call of each is sampled. Its place in the stretch follows the golden ratio, so sampled calls spread over sampler runs, too. Calls of
    one step of one run (a pipeline may make two for guidance) share the same places, and so do calls beyond the expected ones.

    Attributes:
        geometry: of the layer.
        generator: draws positions.
        steps_per_part: expected steps of a sampler run.
        parts: expected sampler runs.
        total: rows in all, at most.
    """

    geometry: Geometry
    generator: torch.Generator
    steps_per_part: int = 1
    parts: int = 1
    total: int = ROWS
    _rows: Tensor | None = None  # [places, width]
    _steps: Tensor | None = None  # [places] int64
    _visits: Tensor | None = None  # [sampled calls] int64: looks that went to the places of each

    @classmethod
    def for_input(cls, of: Watched) -> Self:
        """A sample of any input."""
        return cls(of.geometry, of.generator, max(of.steps, 1), max(of.parts, 1))

    @property
    def calls(self) -> int:
        """Expected calls, those of one step of one run counted once."""
        return self.steps_per_part * self.parts

    @cached_property
    def sampled(self) -> dict[int, int]:
        """Number of a call, step by step -> its number among the sampled ones."""
        stretches = min(self.calls, max(self.total // PER_CALL, 1))
        edges = [self.calls * index // stretches for index in range(stretches + 1)]
        places = [low + int(index * GOLDEN % 1 * (high - low)) for index, (low, high) in enumerate(itertools.pairwise(edges))]
        return {place: index for index, place in enumerate(places)}

    @property
    def per_call(self) -> int:
        """Rows of a sampled call, at most."""
        return max(self.total // len(self.sampled), 1)

    def _place(self, call: Call) -> int | None:
        """Number of a call among the sampled ones; None if it is not sampled."""
        return self.sampled.get((call.step % self.steps_per_part) * self.parts + call.part % self.parts)

    def look(self, x: Tensor, call: Call) -> dict[str, Tensor]:
        if self._place(call) is None:
            return {}
        return {"rows": self.geometry.rows(x.detach(), self.per_call, self.generator).cpu()}

    def absorb(self, seen: Mapping[str, Tensor], call: Call) -> None:
        """Add the rows of one call. The n-th call that shares places replaces every n-th row, so all have equal shares."""
        rows, place = seen["rows"].float(), self._place(call)
        if self._rows is None:
            self._allocate(rows.shape[1])
        assert place is not None and self._rows is not None and self._steps is not None and self._visits is not None
        visits = int(self._visits[place])
        taken = slice(visits, len(rows), visits + 1)
        own = slice(place * self.per_call, (place + 1) * self.per_call)
        self._rows[own][taken] = rows[taken]
        self._steps[own][taken] = call.step
        self._visits[place] += 1

    def _allocate(self, width: int) -> None:
        places = len(self.sampled) * self.per_call
        self._rows = torch.zeros(places, width)
        self._steps = torch.full((places,), EMPTY)
        self._visits = torch.zeros(len(self.sampled), dtype=torch.int64)

    @property
    def state(self) -> dict[str, Tensor]:
        """Everything that was absorbed; empty before the first look."""
        if self._rows is None or self._steps is None or self._visits is None:
            return {}
        return {"rows": self._rows, "steps": self._steps, "visits": self._visits}

    @state.setter
    def state(self, known: Mapping[str, Tensor]) -> None:
        self._rows, self._steps, self._visits = (known.get(name) for name in ("rows", "steps", "visits"))

    @property
    def _filled(self) -> Tensor:
        return self._steps != EMPTY

    @property
    def steps(self) -> Tensor:
        """The step that each row was seen at."""
        return self._steps[self._filled]

    @property
    def rows(self) -> Tensor:
        """``[rows, channels * taps]``, in the order of their steps."""
        return self._rows[self._filled]

    def log_bytes(self, calls: int) -> int:
        """Rows of the sampled share of the calls."""
        share = -(-calls * len(self.sampled) // self.calls)
        return FLOAT * share * self.per_call * self.geometry.width

    def memory_bytes(self) -> int:
        """All places."""
        return FLOAT * len(self.sampled) * self.per_call * self.geometry.width

    def serves(self, of: Watched) -> bool:
        """A sample serves every wish for one."""
        return True
