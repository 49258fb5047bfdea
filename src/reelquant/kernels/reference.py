"""The oracle: what a quantized layer computes, in plain torch and float32, from packed integers and scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reelquant.formats import Quantizer, unpack
from reelquant.kernels.hadamard import hadamard


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight as it is stored.

    Attributes:
        codes: ``[out, bytes]`` uint8, or int8 ``[out, in]`` for symmetric 8-bit integers.
        quantizer: format and scales of the codes.
        shape: shape of the float weight.
    """

    codes: Tensor
    quantizer: Quantizer
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats, in its original shape."""
        width = 1
        for size in self.shape[1:]:
            width *= size
        codes = (self.codes ^ -128).view(torch.uint8) if self.codes.dtype == torch.int8 else self.codes
        return self.quantizer.dequantize(unpack(codes, self.quantizer.format.bits, width).reshape(self.shape), dtype)


@dataclass(frozen=True, eq=False)
class InputStage:
    """What happens to the input before the product: ``quantize((rotate(x) - shift) / scale)``.

    Attributes:
        rotate: the axis of the channels if they are rotated, or None.
        shift, scale: per input channel, already shaped to broadcast against the input; or None.
        quantizer: static scales of this step, a function for dynamic ones, or None for float inputs.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    quantizer: Callable[[Tensor], Tensor] | None = None
    rotate: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float() if self.rotate is None else hadamard(x.float(), self.rotate)
        x = x if self.shift is None else x - self.shift
        x = x if self.scale is None else x / self.scale
        return x if self.quantizer is None else self.quantizer(x)


def reference(x: Tensor, stage: InputStage, weight: PackedWeight, bias: Tensor | None, operation: Callable[..., Tensor]) -> Tensor:
    """``operation(stage(x), dequantized weight, bias)`` in float32, returned in the dtype of ``x``.

    Args:
        x: float input; a convolution's zero padding is already in it.
        operation: ``F.linear`` or a convolution with its stride, dilation and groups bound.
    """
    return operation(stage(x), weight.dequantize(), None if bias is None else bias.float()).to(x.dtype)
