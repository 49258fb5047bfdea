"""The interface of a statistic, and what it may know of an input before the first call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from reelquant.observe.call import Call
from reelquant.observe.geometry import Geometry

FLOAT = 4  # bytes of a float32 number


@dataclass(frozen=True, eq=False)
class Watched:
    """An input that will be observed, as far as it is known before sampling.

    Attributes:
        name: the layer that reads it.
        geometry: how that layer reads it.
        channel_axis: axis of its channels, -1 or 1.
        frames: frames with scales of their own; 1 if frames share them. The leading axis of the input is then ``batch * frames``.
        role: role of the layer, see :mod:`reelquant.sites`.
        calls: expected calls of the denoiser.
        generator: draws sampled rows; all inputs share it.
        wanted: names in :data:`reelquant.observe.STATISTICS`.
        steps: expected denoising steps; more may come.
        parts: expected sampler runs; more may come.
    """

    name: str
    geometry: Geometry
    channel_axis: int
    frames: int
    role: str
    calls: int
    generator: torch.Generator
    wanted: frozenset[str]
    steps: int
    parts: int


class Statistic(ABC):
    """Sees every input of a layer, with the denoiser call it belongs to.

    Work is split in two, so that the result of :meth:`look` can be kept on disk until it is absorbed. Equal looks that are absorbed in
    equal order give equal bits. Tensors that last are allocated at the first look and then changed in place: many small tensors that
    last, allocated between large temporary ones, would fragment the heap.

    Until the first :meth:`absorb` a statistic holds no tensors, so ``copy.copy`` of an empty one is an independent empty one.

    Attributes:
        reads_half: it needs to know which half of a guidance pair a call computes.
        compacts: its state can be smaller than the looks it absorbed, so a log of looks on disk should be replaced by the state when
            the log is the larger of the two.
    """

    reads_half: ClassVar[bool] = False
    compacts: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def for_input(cls, of: Watched) -> Self | None:
        """An empty statistic of an input; None if it makes no sense for this input."""

    @abstractmethod
    def look(self, x: Tensor, call: Call) -> dict[str, Tensor]:
        """What is to be remembered of one input; the statistic itself does not change. Empty if this call adds nothing."""

    @abstractmethod
    def absorb(self, seen: Mapping[str, Tensor], call: Call) -> None:
        """Add one look that is not empty."""

    @property
    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that was absorbed, as tensors. An empty statistic with this state set continues with the same bits."""

    @state.setter
    @abstractmethod
    def state(self, known: Mapping[str, Tensor]) -> None: ...

    @abstractmethod
    def log_bytes(self, calls: int) -> int:
        """Bytes of the looks of so many calls, before any of them is replaced by the state."""

    @abstractmethod
    def memory_bytes(self) -> int:
        """Bytes of the statistic once all expected calls are absorbed."""

    @abstractmethod
    def serves(self, of: Watched) -> bool:
        """True if this statistic, gathered earlier, holds what :meth:`for_input` would gather now."""

    def update(self, x: Tensor, call: Call) -> None:
        """Look and absorb."""
        if seen := self.look(x, call):
            self.absorb(seen, call)


def split(seen: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """``{"range.low": x}`` as ``{"range": {"low": x}}``."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in seen.items():
        name, _, rest = key.partition(".")
        found.setdefault(name, {})[rest] = value
    return found


def look_each(members: Mapping[str, Statistic], x: Tensor, call: Call) -> dict[str, Tensor]:
    """The looks of several statistics at one input, in one dictionary: ``{"range.low": ...}``."""
    return {f"{name}.{key}": value for name, member in members.items() for key, value in member.look(x, call).items()}


def absorb_each(members: Mapping[str, Statistic], seen: Mapping[str, Tensor], call: Call) -> None:
    """Add what :func:`look_each` gave."""
    for name, own in split(seen).items():
        members[name].absorb(own, call)
