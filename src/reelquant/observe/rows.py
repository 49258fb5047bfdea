"""A sample of the rows that a layer multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from reelquant.observe.call import Call
from reelquant.observe.geometry import Geometry
from reelquant.observe.sampled_calls import SampledCalls
from reelquant.observe.statistic import FLOAT, Statistic, Watched

ROWS = 1024  # rows of every input, over all calls
PER_CALL = 32  # rows of a call, at least: with more calls than ROWS / PER_CALL, only some are sampled
EMPTY = -1  # step of a place without a row


@dataclass(eq=False)
class Rows(Statistic):
    """At most ``total`` patches, evenly from all calls: ``[rows, channels * taps]`` float32 on the CPU.

    Every call has places of its own if there are few; of many, some are sampled. Calls of one step of one sampler run (a pipeline may
    make two for guidance) share the same places, and so do calls beyond the expected ones.

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
    _visits: list[int] = field(default_factory=list)  # looks that went to the places of each sampled call

    @classmethod
    def for_input(cls, of: Watched) -> Self:
        """A sample of any input."""
        return cls(of.geometry, of.generator, max(of.steps, 1), max(of.parts, 1))

    @cached_property
    def sampled(self) -> SampledCalls:
        """The calls that rows are taken from."""
        return SampledCalls(self.steps_per_part, self.parts, max(self.total // PER_CALL, 1))

    @property
    def per_call(self) -> int:
        """Rows of a sampled call, at most."""
        return max(self.total // len(self.sampled), 1)

    def look(self, x: Tensor, call: Call) -> dict[str, Tensor]:
        """Rows of a sampled call; nothing of others."""
        if self.sampled.place(call) is None:
            return {}
        return {"rows": self.geometry.rows(x.detach(), self.per_call, self.generator).cpu()}

    def absorb(self, seen: Mapping[str, Tensor], call: Call) -> None:
        """Add the rows of one call. The n-th call that shares places replaces every n-th row, so all have equal shares."""
        rows, place = seen["rows"].float(), self.sampled.place(call)
        if self._rows is None:
            self._allocate(rows.shape[1])
        assert place is not None and self._rows is not None and self._steps is not None
        visits, first = self._visits[place], place * self.per_call
        own = slice(first + visits, first + len(rows), visits + 1)
        self._rows[own] = rows[visits :: visits + 1]
        self._steps[own] = call.step
        self._visits[place] += 1

    def _allocate(self, width: int) -> None:
        places = len(self.sampled) * self.per_call
        self._rows = torch.zeros(places, width)
        self._steps = torch.full((places,), EMPTY)
        self._visits = [0] * len(self.sampled)

    @property
    def state(self) -> dict[str, Tensor]:
        """Everything that was absorbed; empty before the first look."""
        if self._rows is None or self._steps is None:
            return {}
        return {"rows": self._rows, "steps": self._steps, "visits": torch.tensor(self._visits)}

    @state.setter
    def state(self, known: Mapping[str, Tensor]) -> None:
        self._rows, self._steps = known.get("rows"), known.get("steps")
        self._visits = known["visits"].tolist() if known else []

    @property
    def steps(self) -> Tensor:
        """The step that each row was seen at."""
        assert self._steps is not None
        return self._steps[self._steps != EMPTY]

    @property
    def rows(self) -> Tensor:
        """``[rows, channels * taps]``, in the order of their steps."""
        assert self._rows is not None and self._steps is not None
        return self._rows[self._steps != EMPTY]

    def log_bytes(self, calls: int) -> int:
        """Rows of the sampled share of the calls."""
        return FLOAT * self.sampled.of(calls) * self.per_call * self.geometry.width

    def memory_bytes(self) -> int:
        """All places."""
        return FLOAT * len(self.sampled) * self.per_call * self.geometry.width

    def serves(self, of: Watched) -> bool:
        """A sample serves every wish for one."""
        return True
