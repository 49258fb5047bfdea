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


@dataclass(eq=False)
class ChannelRange(Statistic):
    """Extremes of every channel at every step and over all steps, and the mean at every step.

    A *part* is one run of the sampler. Parts are independent samples of what the model may see later, which :meth:`envelope` uses. It
    needs no more than the two largest extremes over parts, so memory does not grow with the number of parts. Probes are no samples of what
    comes later: ranges cover them, and neither means nor the estimate for unseen clips know of them.

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
    _running: Tensor = EMPTY  # [-low high, steps, frames, channels] of the part that is running; -inf for steps it has not reached
    _first: Tensor = EMPTY  # [-low high, all and every step, frames, channels], the largest over the parts before it
    _second: Tensor = EMPTY  # the same, the second largest
    _probes: Tensor = EMPTY  # [-low high, steps, frames, channels] of all probes
    _sum: Tensor = EMPTY  # [steps, frames, channels]
    _count: list[int] = field(default_factory=list)  # values of a channel in the sum of every step
    _part: int = -1  # the part that is running
    _reached: list[bool] = field(default_factory=list)  # steps that it has reached
    _parts: list[int] = field(default_factory=list)  # parts before it, in all and by step

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
        step = call.step
        if step >= len(self._count):
            self._allocate(max(2 * len(self._count), self.steps, step + 1), seen["sum"])
        if call.probe:
            _widen(self._probes[:, step], seen)
            return
        if call.part != self._part:
            self._close_part()
            self._part = call.part
        _widen(self._running[:, step], seen)
        self._sum[step] += seen["sum"]
        self._count[step] += int(seen["count"])
        self._reached[step] = True

    def _allocate(self, steps: int, like: Tensor) -> None:
        """Make room for this many steps and keep what is known."""
        known, old = (self._running, self._probes, self._first, self._second, self._sum), len(self._count)
        self._running, self._probes = (like.new_full((2, steps, *like.shape), -torch.inf) for _ in range(2))
        self._first, self._second = (like.new_full((2, 1 + steps, *like.shape), -torch.inf) for _ in range(2))
        self._sum = like.new_zeros((steps, *like.shape))
        if old:
            self._running[:, :old], self._probes[:, :old], self._first[:, : 1 + old], self._second[:, : 1 + old], self._sum[:old] = known
        more = steps - old
        self._count, self._reached = self._count + [0] * more, self._reached + [False] * more
        self._parts = (self._parts or [0]) + [0] * more

    def _close_part(self) -> None:
        """Take the extremes of the part that was running into the two largest over parts."""
        if not any(self._reached):
            return
        ends = _with_all(self._running)
        torch.maximum(self._second, torch.minimum(self._first, ends), out=self._second)
        torch.maximum(self._first, ends, out=self._first)
        self._parts = self._parts_with_running()
        self._running.fill_(-torch.inf)
        self._reached = [False] * len(self._reached)

    def _parts_with_running(self) -> list[int]:
        """Parts that reached any step, and each step, the running one included."""
        return [count + reached for count, reached in zip(self._parts, [any(self._reached), *self._reached], strict=True)]

    @property
    def state(self) -> dict[str, Tensor]:
        """Everything that was absorbed; empty before the first look."""
        if not self._count:
            return {}
        tensors = {"running": self._running, "probes": self._probes, "first": self._first, "second": self._second, "sum": self._sum}
        numbers = {"count": self._count, "part": self._part, "reached": self._reached, "parts": self._parts}
        return tensors | {name: torch.tensor(values) for name, values in numbers.items()}

    @state.setter
    def state(self, known: Mapping[str, Tensor]) -> None:
        names = ("running", "probes", "first", "second", "sum")
        self._running, self._probes, self._first, self._second, self._sum = (known.get(name, EMPTY) for name in names)
        self._count, self._reached, self._parts = (known[name].tolist() if known else [] for name in ("count", "reached", "parts"))
        self._part = int(known["part"]) if known else -1

    @property
    def seen(self) -> list[int]:
        """The steps at which the layer ran."""
        return [step for step, count in enumerate(self._count) if count]

    @property
    def mean(self) -> Tensor:
        """``[steps, frames, channels]``."""
        return torch.stack([self._sum[step] / self._count[step] for step in self.seen])

    def envelope(self, *, per_step: bool = False, unseen: bool = False) -> tuple[Tensor, Tensor]:
        """Range of every channel, ``(low, high)``, each ``[slots, frames, channels]``; one slot unless ``per_step``.

        Args:
            per_step: a slot for every step that was seen.
            unseen: extend what was seen to what later clips may reach, by the jackknife estimate of an endpoint: with the two largest
                values ``a >= b`` over parts, ``2 a - b``. Steady channels keep their range, erratic ones get headroom. With one part
                nothing is known of others, and the range is what was seen.

        Paper: Robson and Whitlock, "Estimation of a truncation point", Biometrika 51 (1964).
        """
        slots = [1 + step for step in self.seen] if per_step else [0]
        running, first, second = (ends[:, slots] for ends in (_with_all(self._running), self._first, self._second))
        ends = torch.maximum(first, running)
        if unseen:
            estimate = 2 * ends - torch.maximum(second, torch.minimum(first, running))
            several = torch.tensor(self._parts_with_running())[slots] > 1
            ends = torch.where(several.to(ends.device)[:, None, None], estimate, ends)
        ends = torch.maximum(ends, _with_all(self._probes)[:, slots])
        return -ends[0], ends[1]

    def bad_from(self) -> float:
        """The first step at which a value was NaN or infinite; infinity if none was."""
        if not self.seen:
            return float("inf")
        low, high = self.envelope(per_step=True)
        good = (low.isfinite() & high.isfinite()).flatten(1).all(1)
        return min((step for step, fine in zip(self.seen, good.tolist(), strict=True) if not fine), default=float("inf"))

    def log_bytes(self, calls: int) -> int:
        """Lowest, highest and summed values of every call."""
        return FLOAT * calls * 3 * self.frames * self.geometry.channels

    def memory_bytes(self) -> int:
        """Eight extremes and a sum of every step, and four extremes of all steps together."""
        return FLOAT * (9 * self.steps + 4) * self.frames * self.geometry.channels

    def serves(self, of: Watched) -> bool:
        """Ranges of frames also give those over all frames."""
        return of.frames in (1, self.frames)


def _widen(ends: Tensor, seen: Mapping[str, Tensor]) -> None:
    """Extend ``[-low high, frames, channels]`` in place."""
    low, high = ends
    torch.maximum(low, seen["low"].neg(), out=low)
    torch.maximum(high, seen["high"], out=high)


def _with_all(ends: Tensor) -> Tensor:
    """``[-low high, all and every step, frames, channels]``: those of all steps together in front of those of every step."""
    return torch.cat([ends.amax(1, keepdim=True), ends], 1)
