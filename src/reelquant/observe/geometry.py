"""How a layer reads its input: one row per product, whether the layer is linear or a convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Geometry:
    """What is needed to cut the patches of a convolution out of its input.

    Attributes:
        channels: input channels.
        kernel, stride, dilation: one entry per spatial axis; all empty for a linear layer.
        padding: zeros before and after each spatial axis, the last axis first, as :func:`torch.nn.functional.pad` takes them.
    """

    channels: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> Geometry:
        """Geometry of a linear or convolution layer."""
        if isinstance(module, nn.Linear):
            return cls(module.in_features)
        conv: Any = module
        if isinstance(conv.padding, str):
            widths = tuple(conv._reversed_padding_repeated_twice)
        else:
            widths = tuple(width for width in reversed(conv.padding) for _ in (0, 1))
        return cls(conv.in_channels, conv.kernel_size, conv.stride, widths, conv.dilation)

    @property
    def taps(self) -> int:
        """Weights per input and output channel; 1 for a linear layer."""
        return math.prod(self.kernel)

    @property
    def width(self) -> int:
        """Length of a row: channels times taps."""
        return self.channels * self.taps

    @property
    def padded(self) -> bool:
        """True if zeros are read beyond the border."""
        return any(self.padding)

    def rows(self, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Patches at random positions: ``[min(count, positions), channels * taps]`` float32."""
        if not self.kernel:
            flat = x.reshape(-1, x.shape[-1])
            return flat[_pick(len(flat), count, generator).to(x.device)].float()
        sizes = [x.shape[0], *(self._outputs(axis, size) for axis, size in enumerate(x.shape[2:]))]
        positions = _pick(math.prod(sizes), count, generator).to(x.device)
        return self._patches(x, torch.unravel_index(positions, sizes)).float()

    def _before(self, axis: int) -> int:
        """Zeros before the first input of a spatial axis."""
        return self.padding[2 * (len(self.kernel) - 1 - axis)]

    def _outputs(self, axis: int, size: int) -> int:
        """Output positions along a spatial axis of this many inputs."""
        first = 2 * (len(self.kernel) - 1 - axis)
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (size + sum(self.padding[first : first + 2]) - reach) // self.stride[axis] + 1

    def _patches(self, x: Tensor, positions: tuple[Tensor, ...]) -> Tensor:
        """Gather ``[rows, channels, *kernel]`` at output positions, zero beyond the border, and flatten."""
        dims = len(self.kernel)
        inside = torch.ones((), dtype=torch.bool, device=x.device)
        index = [positions[0].view(-1, *[1] * dims)]
        for axis, start in enumerate(positions[1:]):
            taps = torch.arange(self.kernel[axis], device=x.device) * self.dilation[axis] - self._before(axis)
            place = start.view(-1, *[1] * dims) * self.stride[axis] + taps.view(-1, *[1] * (dims - 1 - axis))
            last = x.shape[2 + axis] - 1
            inside = inside & (place >= 0) & (place <= last)
            index.append(place.clamp(0, last))
        patches = x.movedim(1, -1)[tuple(index)]  # [rows, *kernel, channels]; an index of channels, too, would take four times as long
        if self.padded:  # a padded copy of the whole input would cost more than the few patches
            patches.masked_fill_(~inside[..., None], 0)
        return patches.movedim(-1, 1).reshape(len(patches), -1)


def _pick(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Random indices below ``total``, all of them in order if there are no more than ``count``."""
    return torch.arange(total) if total <= count else torch.randint(total, (count,), generator=generator)
