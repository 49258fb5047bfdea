"""An orthonormal mix of the frames of an input, and the rounding of each band to bits of its own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

FRAMES = 256
"""Of a clip whose frames are mixed, at most; the matrix that mixes them is dense."""
BITS = range(2, 9)
"""What a band may have."""


@functools.cache
def haar(frames: int) -> Tensor:
    """The Haar transform of so many frames: an orthonormal ``[frames, frames]`` float32 matrix, a row per band.

    The first row is the mean of all frames (weighted, if their number is no power of two), then come differences from the coarsest to the
    finest. A frame that has no neighbour to be paired with goes on to the next level as it is.
    """
    low, details = list(torch.eye(frames, dtype=torch.float64)), []
    while len(low) > 1:
        pairs = list(zip(low[::2], low[1::2], strict=False))
        details = [(one - other) / 2**0.5 for one, other in pairs] + details
        low = [(one + other) / 2**0.5 for one, other in pairs] + low[2 * len(pairs) :]
    return torch.stack(low + details).float()


@dataclass(frozen=True)
class Arrangement:
    """Where the frames of an input are.

    Attributes:
        axis: of the input, of size ``frames * n``. Not that of the channels, and for a convolution the first one.
        inner: whether neighbours along the axis are neighbouring frames; else frames are ``n`` apart.
    """

    axis: int
    inner: bool

    def mixed(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Frames multiplied by ``matrix`` ``[frames, frames]``, in the shape and dtype of the input."""
        parted = self._parted(x, len(matrix))
        place = self.axis + self.inner
        return torch.tensordot(matrix.to(x), parted, dims=([1], [place])).movedim(0, place).reshape(x.shape)

    def spread(self, bands: Tensor, x: Tensor) -> Tensor:
        """A number for every frame ``[frames]`` as a tensor that multiplies values of the shape of ``x``."""
        frames, size = len(bands), x.shape[self.axis]
        along = bands.repeat(size // frames) if self.inner else bands.repeat_interleave(size // frames)
        return along.to(x).view(-1, *[1] * (x.ndim - 1 - self.axis))

    def fits(self, x: Tensor, frames: int) -> bool:
        """Whether an input can be parted into so many frames."""
        return x.ndim > self.axis + 1 and x.shape[self.axis] % frames == 0

    def _parted(self, x: Tensor, frames: int) -> Tensor:
        return x.unflatten(self.axis, (-1, frames) if self.inner else (frames, -1))


@dataclass(frozen=True)
class FrameBands:
    """How the frames of an input are mixed and rounded.

    Attributes:
        arrangement: where they are.
        bits: of each band; one entry for inputs whose frames are not mixed.
    """

    arrangement: Arrangement
    bits: tuple[int, ...]

    @classmethod
    def read(cls, stored: Sequence[int]) -> Self:
        """From what :attr:`stored` gives.

        Raises:
            ValueError: if it is nothing that this class writes.
        """
        axis, inner, *bits = map(int, stored)
        if axis not in range(4) or inner not in (0, 1) or not 0 < len(bits) <= FRAMES or any(own not in BITS for own in bits):
            raise ValueError(f"axis 0 to 3, inner 0 or 1, and bits of 1 to {FRAMES} bands, 2 to 8 each")
        return cls(Arrangement(axis, bool(inner)), tuple(bits))

    @property
    def stored(self) -> tuple[int, ...]:
        """As checkpoints hold it: axis, inner, bits of every band."""
        return (self.arrangement.axis, int(self.arrangement.inner), *self.bits)

    def mixes(self, x: Tensor) -> bool:
        """Whether the frames of this input are mixed: clips of other lengths may not fit."""
        return len(self.bits) > 1 and self.arrangement.fits(x, len(self.bits))

    def bands(self, x: Tensor) -> Tensor:
        """The input after the mix."""
        return self.arrangement.mixed(x, haar(len(self.bits)))

    def frames(self, y: Tensor) -> Tensor:
        """The mix undone, for an output."""
        return self.arrangement.mixed(y, haar(len(self.bits)).T)

    def of_constant(self) -> Tensor:
        """What undoing the mix makes of ones: a number for every frame."""
        return haar(len(self.bits)).sum(0)

    def rounded(self, x: Tensor, channel_axis: int) -> Tensor:
        """Values rounded, position by position, to symmetric integers of the bits of their band."""
        if self.mixes(x):
            steps = self.arrangement.spread(torch.tensor([2.0 ** (bits - 1) - 1 for bits in self.bits]), x)
        else:  # as many bits as the bands have on average
            steps = 2.0 ** (round(sum(self.bits) / len(self.bits)) - 1) - 1
        largest = x.abs().amax(channel_axis, keepdim=True)
        scale = torch.where(largest > 0, largest, torch.ones_like(largest)) / steps
        return (x / scale).round() * scale
