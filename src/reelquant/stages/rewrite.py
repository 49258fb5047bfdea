"""The exact rewrite of a layer: ``x' = (M x - shift) / scale`` on the input, ``W' = W M^-1 * scale`` on the weight, and a new bias."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reelquant.kernels import Mix, Permutation, Rotation, Scaling, unmixed

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, eq=False)
class Rewrite:
    """Operations on channels, one after the other, that leave the float output as it was.

    Every chain of shifts, scales, rotations and permutations has this form: shifts move to the end, because ``M (x - z) = M x - M z``,
    and what follows the last rotation or permutation is one shift and one scale.

    Attributes:
        mixes: linear operations that come first, in order.
        taps: values per channel, side by side, in the tensors this rewrite meets: 1, but for patches of a convolution.
        shift: ``[channels]``, in units of the mixed input, or None.
        scale: ``[channels]``, not zero, unitless, or None.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    mixes: tuple[Mix, ...] = ()
    taps: int = 1

    @property
    def identity(self) -> bool:
        return self.shift is None and self.scale is None and not self.mixes

    @property
    def rotated(self) -> bool:
        """Whether :func:`reelquant.kernels.hadamard` is all that comes before shift and scale."""
        return len(self.mixes) == 1 and is_plain(self.mixes[0])

    def then(self, after: Rewrite) -> Rewrite:
        """This rewrite followed by another one: ``(M2 (M1 x - z1) / s1 - z2) / s2``."""
        if self.identity or after.identity:
            return after if self.identity else self
        if not after.mixes:
            return self._then_affine(after)
        inner = Rewrite(None, self.scale, self.mixes, self.taps)
        mixes = inner.linear + after.mixes
        if self.shift is None:
            return Rewrite(after.shift, after.scale, _joined(mixes), self.taps)
        moved = self.shift if self.scale is None else self.shift / self.scale
        for mix in after.mixes:
            moved = mix(moved)
        return Rewrite(moved if after.shift is None else moved + after.shift, after.scale, _joined(mixes), self.taps)

    def _then_affine(self, after: Rewrite) -> Rewrite:
        """Followed by a shift and a scale: ``((M x - z1) / s1 - z2) / s2``."""
        if after.shift is None:
            shift = self.shift
        else:
            moved = after.shift if self.scale is None else after.shift * self.scale
            shift = moved if self.shift is None else self.shift + moved
        scales = [scale for scale in (self.scale, after.scale) if scale is not None]
        scale = scales[0] * scales[1] if len(scales) == 2 else scales[0] if scales else None
        return Rewrite(shift, scale, self.mixes, self.taps)

    @property
    def linear(self) -> tuple[Mix, ...]:
        """Everything but the shift."""
        return self.mixes if self.scale is None else (*self.mixes, Scaling(self.scale))

    def first(self) -> tuple[Rewrite, Rewrite]:
        """The shift and the scale of the raw channels, as far as they stand at the front, and the rest."""
        if not self.mixes:
            return self, Rewrite(taps=self.taps)
        if isinstance(self.mixes[0], Scaling):
            return Rewrite(scale=self.mixes[0].scale, taps=self.taps), replace(self, mixes=self.mixes[1:])
        return Rewrite(taps=self.taps), self

    def stored(self, dtype: torch.dtype) -> Rewrite:
        """The same rewrite with its vectors rounded to what the checkpoint stores; everything else is computed from these."""
        shift, scale = (None if v is None else v.to(dtype).float() for v in (self.shift, self.scale))
        mixes = tuple(Scaling(mix.scale.to(dtype).float()) if isinstance(mix, Scaling) else mix for mix in self.mixes)
        return replace(self, shift=shift, scale=scale, mixes=mixes if mixes else ())

    def input(self, x: Tensor) -> Tensor:
        """Rewrite values ``[..., channels * taps]``."""
        if self.mixes:
            x = x.unflatten(-1, (-1, self.taps))
            for mix in self.mixes:
                x = mix(x, -2)
            x = x.flatten(-2)
        return self.affine(x)

    def affine(self, x: Tensor) -> Tensor:
        """The part after the mixes, for what is known about mixed values."""
        x = x if self.shift is None else x - self.shift
        return x if self.scale is None else x / self.scale

    def ends(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Ranges ``[..., channels]`` after the rewrite, if no rotation is among its operations."""
        for mix in self.mixes:
            low, high = mix(low), mix(high)
        low, high = self.affine(low), self.affine(high)
        return torch.minimum(low, high), torch.maximum(low, high)

    def weight(self, weight: Tensor) -> Tensor:
        """Rewrite a weight ``[out, channels, *kernel]``."""
        for mix in self.mixes:
            weight = mix.weight(weight)
        return weight if self.scale is None else weight * self.scale.view(1, -1, *[1] * (weight.ndim - 2))

    def undone(self, weight: Tensor) -> Tensor:
        """The weight for the input before the rewrite, from one ``[out, channels, *kernel]`` for the input after it."""
        weight = weight if self.scale is None else weight / self.scale.view(1, -1, *[1] * (weight.ndim - 2))
        return unmixed(weight, self.mixes)

    def per_tap(self, taps: int) -> Rewrite:
        """The same rewrite for patches ``[..., channels * taps]``."""
        shift, scale = (None if v is None else v.repeat_interleave(taps) for v in (self.shift, self.scale))
        return replace(self, shift=shift, scale=scale, taps=taps)


def is_plain(mix: Mix) -> bool:
    """Whether an operation is the rotation whose ranges calibration observes: that of the largest blocks."""
    return isinstance(mix, Rotation) and not mix.block


def _joined(mixes: Sequence[Mix]) -> tuple[Mix, ...]:
    """The same operations, neighbours of one kind in one; a rotation cancels an equal one before it."""
    found: list[Mix] = []
    for mix in mixes:
        last = found[-1] if found else None
        if isinstance(last, Scaling) and isinstance(mix, Scaling):
            found[-1] = Scaling(last.scale * mix.scale)
        elif isinstance(last, Permutation) and isinstance(mix, Permutation):
            found[-1] = Permutation(last.order[mix.order])
        elif isinstance(last, Rotation) and isinstance(mix, Rotation) and last.block == mix.block:
            found.pop()
        else:
            found.append(mix)
    return tuple(found)
