"""The smallest, largest and mean value of every channel of an input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from reelquant._errors import CalibrationError
from reelquant.observe.call import Call
from reelquant.observe.geometry import Geometry
from reelquant.observe.statistic import FLOAT, Statistic, Watched

EMPTY = torch.empty(0)
ALL = 0  # row of the extremes of all steps together; step s is row 1 + s
RUNNING, FIRST, SECOND = range(3)  # extreme of the sampler run so far; the two largest over the runs before it
NEVER = -1  # part of a row that nothing was seen of


@dataclass(eq=False)
class ChannelRange(Statistic):
    """Extremes of every channel at every step and over all steps, and the mean at every step.

    A *part* is one run of the sampler. Parts are independent samples of what the model may see later, which :meth:`envelope` uses. It
    needs no more than the two largest extremes over parts, so memory does not grow with the number of parts.

    Attributes:
        geometry: of the layer; the range of a padded convolution includes zero.
        channel_axis: axis of the channels; -1, or not the last one.
        frames: frames with ranges of their own; the leading axis of the input is then ``batch * frames``.
        steps: expected steps; memory doubles when more come.
    """

    geometry: Geometry
    channel_axis: int = -1
    frames: int = 1
    steps: int = 1
    _ends: Tensor = EMPTY  # [rows, RUNNING FIRST SECOND, -low high, frames, channels]
    _sum: Tensor = EMPTY  # [rows, frames, channels]
    _count: list[int] = field(default_factory=list)  # values of a channel in the sum, of each row
    _part: list[int] = field(default_factory=list)  # the part that is running, of each row
    _closed: list[int] = field(default_factory=list)  # parts before it, of each row

    @classmethod
    def for_input(cls, of: Watched) -> Self:
        """The range of any input."""
        return cls(of.geometry, of.channel_axis, of.frames, max(of.steps, 1))

    def look(self, x: Tensor, call: Call) -> dict[str, Tensor]:
        """``low``, ``high`` and ``sum``, each ``[frames, channels]`` float32, and how many values of a channel were summed.

        Raises:
            CalibrationError: if frames do not divide the leading axis.
        """
        x = self._by_frame(x.detach())
        if self._channels_last:
            low, high, total = x.amin((0, 2)), x.amax((0, 2)), x.sum((0, 2), dtype=torch.float32)
        else:  # reducing the last axis first is several times as fast
            low, high, total = x.amin(-1).amin(0), x.amax(-1).amax(0), x.sum(-1, dtype=torch.float32).sum(0)
        return self._found(low.float(), high.float(), total, x.numel() // total.numel())

    @property
    def _channels_last(self) -> bool:
        return self.channel_axis == -1

    def _by_frame(self, x: Tensor) -> Tensor:
        """``[clips, frames, positions, channels]``; ``[clips, frames, channels, positions]`` if channels are not the last axis."""
        if x.shape[0] % self.frames:
            raise CalibrationError(
                f"frame-{self.frames} needs inputs with a leading axis of batch * {self.frames}, got {tuple(x.shape)}; "
                "choose the granularity of this input by the number of frames that the pipeline samples, or tensor"
            )
        if self._channels_last:
            return x.reshape(-1, self.frames, math.prod(x.shape[1:-1]), x.shape[-1])
        x = x.movedim(self.channel_axis, 1)
        return x.reshape(-1, self.frames, x.shape[1], math.prod(x.shape[2:]))

    def _found(self, low: Tensor, high: Tensor, total: Tensor, count: int) -> dict[str, Tensor]:
        if self.geometry.padded:
            low, high = low.clamp(max=0), high.clamp(min=0)
        return {"low": low, "high": high, "sum": total, "count": torch.tensor(count)}

    def absorb(self, seen: Mapping[str, Tensor], call: Call) -> None:
        """Add one look."""
        own = 1 + call.step
        if own >= len(self._part):
            steps = max(2 * (len(self._part) - 1), self.steps, own)
            self._allocate(1 + steps, seen["sum"])
        ends = torch.stack([-seen["low"], seen["high"]])
        for row in (ALL, own):
            self._extend(row, ends, call.part)
            self._count[row] += int(seen["count"])
            self._sum[row] += seen["sum"]

    def _allocate(self, rows: int, like: Tensor) -> None:
        """Make room for this many rows and keep what is known."""
        known, old = (self._ends, self._sum), len(self._part)
        self._ends = like.new_full((rows, 3, 2, *like.shape), -torch.inf)
        self._sum = like.new_zeros((rows, *like.shape))
        if old:
            self._ends[:old], self._sum[:old] = known
        self._count = self._count + [0] * (rows - old)
        self._part = self._part + [NEVER] * (rows - old)
        self._closed = self._closed + [0] * (rows - old)

    def _extend(self, row: int, ends: Tensor, part: int) -> None:
        """Take the extremes of one call into a row."""
        running, first, second = self._ends[row]
        if self._part[row] not in (part, NEVER):  # the run before is complete
            torch.maximum(second, torch.minimum(first, running), out=second)
            torch.maximum(first, running, out=first)
            running.fill_(-torch.inf)
            self._closed[row] += 1
        self._part[row] = part
        torch.maximum(running, ends, out=running)

    @property
    def state(self) -> dict[str, Tensor]:
        """Everything that was absorbed."""
        counts = {"count": self._count, "part": self._part, "closed": self._closed}
        return {"ends": self._ends, "sum": self._sum} | {name: torch.tensor(values) for name, values in counts.items()}

    @state.setter
    def state(self, known: Mapping[str, Tensor]) -> None:
        self._ends, self._sum = known["ends"], known["sum"]
        self._count, self._part, self._closed = (known[name].tolist() for name in ("count", "part", "closed"))

    @property
    def seen(self) -> list[int]:
        """The steps at which the layer ran."""
        return [row - 1 for row, part in enumerate(self._part) if row != ALL and part != NEVER]

    @property
    def mean(self) -> Tensor:
        """``[steps, frames, channels]``."""
        return torch.stack([self._sum[1 + step] / self._count[1 + step] for step in self.seen])

    def envelope(self, *, per_step: bool = False, unseen: bool = False) -> tuple[Tensor, Tensor]:
        """Range of every channel, ``(low, high)``, each ``[slots, frames, channels]``; one slot unless ``per_step``.

        Args:
            per_step: a slot for every step that was seen.
            unseen: extend what was seen to what later clips may reach, by the jackknife estimate of an endpoint: with the two largest
                values ``a >= b`` over parts, ``2 a - b``. Steady channels keep their range, erratic ones get headroom.

        Paper: Robson and Whitlock, "Estimation of a truncation point", Biometrika 51 (1964).
        """
        rows = [1 + step for step in self.seen] if per_step else [ALL]
        ends = torch.stack([self._endpoint(row, unseen=unseen) for row in rows])
        return -ends[:, 0], ends[:, 1]

    def _endpoint(self, row: int, *, unseen: bool) -> Tensor:
        """``[-low high, frames, channels]``; the jackknife estimate if ``unseen`` and there is more than one part."""
        running, first, second = self._ends[row]
        largest = torch.maximum(first, running)
        if not unseen or not self._closed[row]:
            return largest
        return 2 * largest - torch.maximum(second, torch.minimum(first, running))

    def bad_from(self) -> float:
        """The first step at which a value was NaN or infinite; infinity if none was."""
        for step in self.seen:
            if not bool(self._endpoint(1 + step, unseen=False).isfinite().all()):
                return step
        return float("inf")

    def log_bytes(self, calls: int) -> int:
        """Lowest, highest and summed values of every call."""
        return FLOAT * calls * 3 * self.frames * self.geometry.channels

    def memory_bytes(self) -> int:
        """Six extremes and a sum, of every step and of all steps together."""
        return FLOAT * (1 + self.steps) * (3 * 2 + 1) * self.frames * self.geometry.channels

    def serves(self, of: Watched) -> bool:
        """Ranges of frames also give those over all frames."""
        return of.frames in (1, self.frames)
