"""Mean and second moment of the rows that a layer multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from reelquant.kernels import Mix
from reelquant.observe.call import Call
from reelquant.observe.geometry import Geometry
from reelquant.observe.inverse_factor import inverse_factor
from reelquant.observe.sampled_calls import SampledCalls
from reelquant.observe.statistic import FLOAT, Statistic, Watched

LEAST_ROWS, ROWS_PER_COLUMN = 4096, 4  # rows over all calls, at least
PER_CALL = 128  # rows of a call, at least: with very many calls, only some are sampled
BUFFER = 256  # rows that are multiplied at a time: a product of fewer is limited by reading and writing the square
BLOCK = 256  # columns whose products are computed at a time, those below the diagonal left out


@dataclass(eq=False)
class Gram(Statistic):
    """Mean and covariance of patches: what solvers and bias correction need.

    Moments are taken around the mean of the first call, because a large mean would cost the covariance its precision. Rows are collected
    until there are enough for one product, and only blocks on and above the diagonal are computed.

    Attributes:
        geometry: of the layer.
        generator: draws positions.
        sampled: the calls that rows are taken from.
        per_call: rows of a sampled call.
        count: rows so far.
    """

    compacts: ClassVar[bool] = True

    geometry: Geometry
    generator: torch.Generator
    sampled: SampledCalls = SampledCalls(1, 1, 1)  # noqa: RUF009 - frozen
    per_call: int = LEAST_ROWS
    count: int = 0
    _origin: Tensor | None = None  # [width]
    _sum: Tensor | None = None  # [width], of multiplied rows around the origin
    _square: Tensor | None = None  # [width, width], of multiplied rows around the origin; below the diagonal blocks 0
    _waiting: Tensor | None = None  # [BUFFER, width], rows around the origin that are to be multiplied
    _factor: tuple[tuple[float, tuple[int, ...]], Tensor] | None = None
    _mixed: tuple[tuple[Mix, ...], Gram] | None = None

    @classmethod
    def for_input(cls, of: Watched) -> Self:
        """Moments of any input."""
        rows = max(LEAST_ROWS, ROWS_PER_COLUMN * of.geometry.width)
        sampled = SampledCalls(max(of.steps, 1), max(of.parts, 1), rows // PER_CALL)
        return cls(of.geometry, of.generator, sampled, -(-rows // len(sampled)))

    def look(self, x: Tensor, call: Call) -> dict[str, Tensor]:
        """Rows of a sampled call; nothing of others."""
        if self.sampled.place(call) is None:
            return {}
        return {"rows": self.geometry.rows(x.detach(), self.per_call, self.generator)}

    def absorb(self, seen: Mapping[str, Tensor], call: Call) -> None:
        """Add the rows of one call."""
        rows = seen["rows"].float()
        if self._origin is None:
            self._origin, width = rows.mean(0), rows.shape[1]
            self._sum, self._square = rows.new_zeros(width), rows.new_zeros(width, width)
            self._waiting = rows.new_zeros(BUFFER, width)
        assert self._sum is not None and self._square is not None and self._waiting is not None
        while len(rows):
            start = self.count % BUFFER
            taken = rows[: BUFFER - start]
            torch.sub(taken, self._origin, out=self._waiting[start : start + len(taken)])
            self.count += len(taken)
            rows = rows[len(taken) :]
            if self.count % BUFFER == 0:
                _multiply(self._waiting, self._sum, self._square)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Sum and second moment around the origin, of all rows."""
        assert self._sum is not None and self._square is not None and self._waiting is not None
        total, square = self._sum.clone(), self._square.clone()
        _multiply(self._waiting[: self.count % BUFFER], total, square)
        square.triu_()
        return total, square.add_(square.triu(1).T)

    @property
    def state(self) -> dict[str, Tensor]:
        """Everything that was absorbed; empty before the first look."""
        if self._origin is None or self._sum is None or self._square is None or self._waiting is None:
            return {}
        moments = {"origin": self._origin, "sum": self._sum, "square": self._square}
        return moments | {"waiting": self._waiting[: self.count % BUFFER], "count": torch.tensor(self.count)}

    @state.setter
    def state(self, known: Mapping[str, Tensor]) -> None:
        self._origin, self._sum, self._square = (known.get(name) for name in ("origin", "sum", "square"))
        self.count = int(known["count"]) if known else 0
        self._waiting = None
        if known:
            waiting = known["waiting"]
            self._waiting = waiting.new_zeros(BUFFER, waiting.shape[1])
            self._waiting[: len(waiting)] = waiting

    @property
    def mean(self) -> Tensor:
        """``[channels * taps]``."""
        assert self._origin is not None and self._sum is not None and self._waiting is not None
        return self._origin + (self._sum + self._waiting[: self.count % BUFFER].sum(0)) / self.count

    @property
    def covariance(self) -> Tensor:
        """``[channels * taps, channels * taps]``, around the mean: a bias absorbs what the mean contributes."""
        total, square = self._moments()
        mean = total / self.count
        return square.div_(self.count).addr_(mean, mean, alpha=-1)

    def mixed(self, mixes: tuple[Mix, ...]) -> Gram:
        """The same moments of the input after linear operations on its channels; the last answer is kept, for layers that share one."""
        if self._mixed is None or not _same(self._mixed[0], mixes):
            self._mixed = mixes, self._after(mixes)
        return self._mixed[1]

    def _after(self, mixes: tuple[Mix, ...]) -> Gram:
        assert self._origin is not None
        total, square = self._moments()
        found = Gram(self.geometry, self.generator)
        found.state = {
            "origin": self._mix(self._origin, mixes),
            "sum": self._mix(total, mixes),
            "square": self._mix(self._mix(square, mixes).T, mixes),
            "waiting": total.new_zeros(0, len(total)),
            "count": torch.tensor(self.count),
        }
        return found

    def _mix(self, rows: Tensor, mixes: tuple[Mix, ...]) -> Tensor:
        """Mix the channels of rows whose last axis is channels times taps."""
        rows = rows.unflatten(-1, (-1, self.geometry.taps))
        for mix in mixes:
            rows = mix(rows, -2)
        return rows.flatten(-2)

    def inverse_factor(self, damping: float, order: Tensor) -> Tensor:
        """:func:`inverse_factor` of the covariance; the last one is kept, because layers that share an input ask for the same."""
        key = (damping, tuple(order.tolist()))
        if self._factor is None or self._factor[0] != key:
            self._factor = key, inverse_factor(self.covariance, damping, order)
        return self._factor[1]

    def log_bytes(self, calls: int) -> int:
        """Rows of the sampled share of the calls."""
        return FLOAT * self.sampled.of(calls) * self.per_call * self.geometry.width

    def memory_bytes(self) -> int:
        """The second moment, rows that wait, and two vectors."""
        return FLOAT * self.geometry.width * (self.geometry.width + BUFFER + 2)

    def serves(self, of: Watched) -> bool:
        """Moments serve every wish for them."""
        return True


def _same(first: tuple[Mix, ...], second: tuple[Mix, ...]) -> bool:
    """Whether two chains of operations do the same."""
    vectors = [[mix.vector for mix in chain if mix.vector is not None] for chain in (first, second)]
    names = [[mix.name for mix in chain] for chain in (first, second)]
    return names[0] == names[1] and all(map(torch.equal, *vectors))


def _multiply(rows: Tensor, total: Tensor, square: Tensor) -> None:
    """Add rows to their sum, and their products to the blocks of ``square`` on and above the diagonal."""
    total += rows.sum(0)
    for start in range(0, rows.shape[1], BLOCK):
        own = slice(start, start + BLOCK)
        square[own, start:].addmm_(rows[:, own].T, rows[:, start:])
