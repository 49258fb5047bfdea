"""The classes of quantized layers: linear layers and convolutions of one, two and three axes.

Convolutions pad their input *before* the shift, so a shifted zero is what the border sees and the rewrite is exact up to the edge.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.kernels import Window
from reelquant.nn.layers import QuantLayer
from reelquant.nn.spec import LayerLayout
from reelquant.observe import Geometry


class QuantLinear(QuantLayer, nn.Linear):
    """A linear layer in few bits."""

    channel_axis = -1

    def __init__(self, in_features: int, out_features: int, bias: bool, layout: LayerLayout, device: Any = None, dtype: Any = None) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device="meta", dtype=dtype)
        if self.bias is not None:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self._build(layout, device)

    @classmethod
    def like(cls, module: nn.Linear, layout: LayerLayout, device: Any = None) -> QuantLinear:
        """An empty layer of the same geometry."""
        return cls(module.in_features, module.out_features, module.bias is not None, layout, device, module.weight.dtype)

    def _channels(self) -> int:
        return self.in_features

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        return (*x.shape[:-1], self.out_features)


class _QuantConv(QuantLayer):
    """Geometry shared by the convolution classes."""

    channel_axis = 1

    def __new__(cls, *geometry: Any, **options: Any) -> Any:
        """Build a float convolution when called like one: peft makes the factors of an adapter with the class of the layer it adapts."""
        if not geometry and not options:
            return super().__new__(cls)
        return next(base for base in cls.__mro__ if not issubclass(base, QuantLayer))(*geometry, **options)

    @classmethod
    def like(cls, module: Any, layout: LayerLayout, device: Any = None) -> _QuantConv:
        """An empty layer of the same geometry."""
        if module.groups != 1 or module.padding_mode != "zeros":
            raise UnsupportedError(f"convolutions with groups={module.groups}, padding_mode='{module.padding_mode}' stay float")
        new = cls.__new__(cls)
        new.__init__(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            bias=module.bias is not None,
            device="meta",
            dtype=module.weight.dtype,
        )
        if new.bias is not None:
            new.bias = nn.Parameter(torch.empty(module.out_channels, device=device, dtype=module.weight.dtype))
        new._build(layout, device)
        return new

    def _channels(self) -> int:
        return self.in_channels

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        window, places = self.window, x.shape[-len(self.kernel_size) :]
        padding = [sum(pair) for pair in zip(window.padding[::2], window.padding[1::2], strict=True)][::-1] or [0] * len(places)
        sizes = zip(places, padding, self.kernel_size, window.stride, window.dilation, strict=True)
        return (*x.shape[: -1 - len(places)], self.out_channels, *((size + p - d * (k - 1) - 1) // s + 1 for size, p, k, s, d in sizes))

    @property
    def window(self) -> Window:
        """How the convolution slides."""
        return Window(self.stride, Geometry.of(self).padding, self.dilation)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """A 1-D convolution in few bits."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """A 2-D convolution in few bits."""

    output_format = torch.channels_last


class QuantConv3d(_QuantConv, nn.Conv3d):
    """A 3-D (or temporal) convolution in few bits."""

    output_format = torch.channels_last_3d


LAYERS: dict[type[nn.Module], Any] = {nn.Linear: QuantLinear, nn.Conv1d: QuantConv1d, nn.Conv2d: QuantConv2d, nn.Conv3d: QuantConv3d}
