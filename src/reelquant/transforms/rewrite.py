"""The exact rewrite all transforms speak: ``x' = (x - shift) / scale`` on the input, ``W' = W * scale`` and a new bias on the layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reelquant.observe import Need


@dataclass(frozen=True, eq=False)
class Rewrite:
    """A per-channel affine that leaves the float output as it was.

    Attributes:
        shift: ``[channels]``, in units of the input, or None.
        scale: ``[channels]``, positive, unitless, or None.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None

    @property
    def identity(self) -> bool:
        return self.shift is None and self.scale is None

    def then(self, after: Rewrite) -> Rewrite:
        """This rewrite followed by another one: ``((x - z1) / s1 - z2) / s2``."""
        if after.shift is None:
            shift = self.shift
        else:
            moved = after.shift if self.scale is None else after.shift * self.scale
            shift = moved if self.shift is None else self.shift + moved
        scales = [scale for scale in (self.scale, after.scale) if scale is not None]
        return Rewrite(shift, scales[0] * scales[1] if len(scales) == 2 else scales[0] if scales else None)

    def stored(self, dtype: torch.dtype) -> Rewrite:
        """The same rewrite with its vectors rounded to what the checkpoint stores; everything else is computed from these."""
        return Rewrite(*(None if v is None else v.to(dtype).float() for v in (self.shift, self.scale)))

    def input(self, x: Tensor) -> Tensor:
        """Rewrite values ``[..., channels]``."""
        x = x if self.shift is None else x - self.shift
        return x if self.scale is None else x / self.scale

    def weight(self, weight: Tensor) -> Tensor:
        """Rewrite a weight ``[out, channels, *kernel]``."""
        return weight if self.scale is None else weight * self.scale.view(1, -1, *[1] * (weight.ndim - 2))

    def per_tap(self, taps: int) -> Rewrite:
        """The same rewrite for patches ``[..., channels * taps]``."""
        return Rewrite(*(None if v is None else v.repeat_interleave(taps) for v in (self.shift, self.scale)))


@dataclass(frozen=True, eq=False)
class GroupView:
    """What a transform may look at: one shared input, as earlier transforms left it, and the weights that read it.

    Attributes:
        low, high, mean: ``[steps, channels]``.
        weights: ``[out, channels, *kernel]`` each, earlier scales already in.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    weights: Sequence[Tensor]

    def rewritten(self, rewrite: Rewrite) -> GroupView:
        """The view after one more transform."""
        low, high, mean = (rewrite.input(v) for v in (self.low, self.high, self.mean))
        return GroupView(low, high, mean, [rewrite.weight(weight) for weight in self.weights])


class Transform(ABC):
    """A function-preserving change of a layer's input and weight, planned from statistics.

    Attributes:
        needs: statistics beyond the channel ranges, which are always there.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    @abstractmethod
    def plan(self, group: GroupView) -> Rewrite:
        """The rewrite for one group of layers that share an input."""


def magnitude(group: GroupView) -> Tensor:
    """Largest magnitude of every channel over all steps: ``[channels]``."""
    return torch.maximum(group.high.amax(0), -group.low.amin(0))
