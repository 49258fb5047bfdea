"""The exact rewrite all transforms speak: ``x' = (H x - shift) / scale`` on the input, ``W' = W H * scale`` and a new bias on the layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from reelquant._errors import RecipeError
from reelquant.kernels import hadamard


@dataclass(frozen=True, eq=False)
class Rewrite:
    """A rotation and a per-channel affine that leave the float output as it was.

    Attributes:
        rotated: whether :func:`reelquant.kernels.hadamard` comes first.
        taps: values per channel, side by side, in the tensors this rewrite meets: 1, but for patches of a convolution.
        shift: ``[channels]``, in units of the input, or None.
        scale: ``[channels]``, positive, unitless, or None.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    rotated: bool = False
    taps: int = 1

    @property
    def identity(self) -> bool:
        return self.shift is None and self.scale is None and not self.rotated

    def then(self, after: Rewrite) -> Rewrite:
        """This rewrite followed by another one: ``((H x - z1) / s1 - z2) / s2``.

        Raises:
            RecipeError: if a rotation would follow a shift or a scale.
        """
        if after.rotated and not self.identity:
            raise RecipeError("a rotation is stored before shift and scale; put 'transform: rotate' before them, and only once")
        if after.shift is None:
            shift = self.shift
        else:
            moved = after.shift if self.scale is None else after.shift * self.scale
            shift = moved if self.shift is None else self.shift + moved
        scales = [scale for scale in (self.scale, after.scale) if scale is not None]
        scale = scales[0] * scales[1] if len(scales) == 2 else scales[0] if scales else None
        return Rewrite(shift, scale, self.rotated or after.rotated, self.taps)

    def stored(self, dtype: torch.dtype) -> Rewrite:
        """The same rewrite with its vectors rounded to what the checkpoint stores; everything else is computed from these."""
        shift, scale = (None if v is None else v.to(dtype).float() for v in (self.shift, self.scale))
        return replace(self, shift=shift, scale=scale)

    def input(self, x: Tensor) -> Tensor:
        """Rewrite values ``[..., channels * taps]``."""
        if self.rotated:
            x = hadamard(x.unflatten(-1, (-1, self.taps)), -2).flatten(-2)
        return self.affine(x)

    def affine(self, x: Tensor) -> Tensor:
        """The part after the rotation, for what is known about rotated values (their ranges)."""
        x = x if self.shift is None else x - self.shift
        return x if self.scale is None else x / self.scale

    def weight(self, weight: Tensor) -> Tensor:
        """Rewrite a weight ``[out, channels, *kernel]``."""
        weight = hadamard(weight, 1) if self.rotated else weight
        return weight if self.scale is None else weight * self.scale.view(1, -1, *[1] * (weight.ndim - 2))

    def per_tap(self, taps: int) -> Rewrite:
        """The same rewrite for patches ``[..., channels * taps]``."""
        shift, scale = (None if v is None else v.repeat_interleave(taps) for v in (self.shift, self.scale))
        return replace(self, shift=shift, scale=scale, taps=taps)


@dataclass(frozen=True, eq=False)
class GroupView:
    """What a transform may look at: one shared input, as earlier transforms left it, and the weights that read it.

    Attributes:
        low, high, mean: ``[steps, channels]``.
        weights: ``[out, channels, *kernel]`` each, earlier scales already in.
        rounded: False if no reader rounds this input: then nothing is gained by moving its ranges.
        rotated: what ``low, high, mean`` would be after a rotation; None if nobody asked for it, or once it is done.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    weights: Sequence[Tensor]
    rotated: tuple[Tensor, Tensor, Tensor] | None = None
    rounded: bool = True

    def rewritten(self, rewrite: Rewrite) -> GroupView:
        """The view after one more transform."""
        if rewrite.rotated:
            assert self.rotated is not None, "ranges do not rotate: they are observed on rotated inputs"
        known = self.rotated if rewrite.rotated and self.rotated else (self.low, self.high, self.mean)
        low, high, mean = (rewrite.affine(v) for v in known)
        return GroupView(low, high, mean, [rewrite.weight(weight) for weight in self.weights], rounded=self.rounded)


class Transform(ABC):
    """A function-preserving change of a layer's input and weight, planned from statistics.

    Attributes:
        needs: statistics beyond the channel ranges, which are always there.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def plan(self, group: GroupView) -> Rewrite:
        """The rewrite for one group of layers that share an input."""


def magnitude(group: GroupView) -> Tensor:
    """Largest magnitude of every channel over all steps: ``[channels]``."""
    return torch.maximum(group.high.amax(0), -group.low.amin(0))
