"""What a kernel may know about a quantized layer: packed weight, how the input is rewritten and rounded, the window of a convolution."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant.formats import (
    Granularity,
    Int,
    MiniFloat,
    MinMax,
    Mse,
    NumberFormat,
    Quantizer,
    QuantSpec,
    dynamic,
    fit,
    in_bits,
    pack,
    unpack,
)
from reelquant.kernels.features import features_in_use, grain_features
from reelquant.kernels.hadamard import hadamard
from reelquant.kernels.mixing import Mix

PLAIN = frozenset({"weight", "bias"})  # fields of Operands that every kernel takes
NARROWED = 16  # ranges that are tried for a weight in fewer bits
CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight as it is stored.

    Attributes:
        codes: ``[out, bytes]`` uint8, or int8 ``[out, in]`` for symmetric 8-bit integers.
        quantizer: format and scales of the codes.
        shape: shape of the float weight.
        stored: the very scales that the layer stores, if it stores floats: a kernel that reads these keeps no copy of them.
    """

    codes: Tensor
    quantizer: Quantizer
    shape: tuple[int, ...]
    stored: Tensor | None = None

    @property
    def width(self) -> int:
        """Codes in a row."""
        return math.prod(self.shape[1:])

    @property
    def scales(self) -> Tensor:
        """Scales of every row, ``[out, groups]`` or ``[out, 1]``, in the dtype and the memory that they are stored in."""
        scale = (self.quantizer.scale if self.stored is None else self.stored).detach()
        return scale.expand(self.shape[0] if self.quantizer.granularity.kind == "tensor" else -1).reshape(self.shape[0], -1)

    def rows(self, some: slice) -> PackedWeight:
        """Some of its rows; a weight is brought into another layout a few of them at a time."""
        codes, kind = self.codes[some], self.quantizer.granularity.kind
        scale, zero = (
            units if units is None or kind == "tensor" else units.reshape(self.shape[0], -1)[some].flatten()
            for units in (self.quantizer.scale, self.quantizer.zero_point)
        )
        return PackedWeight(codes, replace(self.quantizer, scale=scale, zero_point=zero), (len(codes), *self.shape[1:]))

    def unpacked(self) -> Tensor:
        """``[out, width]`` uint8, indices into the format's numbers."""
        codes = (self.codes ^ -128).view(torch.uint8) if self.codes.dtype == torch.int8 else self.codes
        return unpack(codes, self.quantizer.format.bits, self.width)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats, in its original shape."""
        return self.quantizer.dequantize(self.unpacked().reshape(self.shape), dtype)

    def narrowed(self, bits: int, quantizer: Quantizer | None = None) -> PackedWeight:
        """An integer weight in fewer bits, from its own codes.

        Every scale is found again, by the least square error to the weight that the codes stand for, so that nothing beside these is
        stored. Papers: Double Rounding (arXiv 2502.01101) and Matryoshka quantization (arXiv 2502.06786) read the upper bits of a code
        with the scale it has, and train the weight for that. Deviation: codes are rounded, not cut, and ranges are searched; the
        result lacks only what rounding to the stored bits took away before.

        Args:
            bits: fewer than it has.
            quantizer: of an earlier call for this weight and these bits, whose scales need no search.
        """
        own, values = self.quantizer, self.dequantize()
        assert isinstance(own.format, Int), "only integers are read in fewer bits"
        if quantizer is None:
            spec = QuantSpec(Int(bits, own.format.signed), replace(own.granularity, scale="float"), Mse(p=2, candidates=NARROWED))
            quantizer = fit(spec, values)
        return PackedWeight(pack(quantizer.codes(values).flatten(1), bits), quantizer, self.shape)


@dataclass(frozen=True, eq=False)
class InputQuant:
    """How an input is rounded.

    Attributes:
        format: the numbers.
        granularity: who shares a scale, with the axis of the input's channels.
        scale, zero_point: ``[slots, units]`` float32 of static inputs; a row per denoising step, or one for all.
        rule: the specification that dynamic inputs follow instead.
    """

    format: NumberFormat
    granularity: Granularity
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    rule: QuantSpec | None = None

    def with_bits(self, bits: int) -> InputQuant:
        """The same range in finer or coarser steps, see :func:`reelquant.formats.in_bits`.

        A small float whose scales are found in the forward becomes an integer of more bits, with a scale for the same values. Other
        numbers stay as they are: fewer bits have no format of their own, and a static scale belongs to its format.
        """
        if isinstance(self.format, MiniFloat) and self.rule is not None and self.format.bits < bits:
            wider = Int(bits)
            return replace(self, format=wider, rule=replace(self.rule, format=wider, range=MinMax()))
        if not isinstance(self.format, Int) or self.format.bits == bits:
            return self
        if self.rule is not None:
            fmt = Int(bits, self.format.signed)
            return replace(self, format=fmt, rule=replace(self.rule, format=fmt))
        assert self.scale is not None
        fmt, scale, zero = in_bits(self.format, bits, self.scale, self.zero_point)
        return replace(self, format=fmt, scale=scale, zero_point=zero)

    def quantizer(self, x: Tensor, slot: int | Tensor) -> Quantizer:
        """The quantizer of this input at this step."""
        if self.rule is not None:
            return dynamic(self.rule, x)
        assert self.scale is not None
        zero = None if self.zero_point is None else of_slot(self.zero_point, slot)
        return Quantizer(self.format, self.granularity, of_slot(self.scale, slot), zero)


def of_slot(table: Tensor, slot: int | Tensor) -> Tensor:
    """The row of a step; the only one if all steps share it."""
    if table.shape[0] == 1:
        return table[0]
    return table[slot] if isinstance(slot, int) else table.index_select(0, slot.reshape(1).to(table.device))[0]


@dataclass(frozen=True)
class Window:
    """How a convolution slides; padding as ``F.pad`` takes it (last axis first)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def convolve(self) -> Callable[..., Tensor]:
        """The convolution without its padding."""
        return functools.partial(CONVOLVE[len(self.stride)], stride=self.stride, dilation=self.dilation)


def check_width(x: Tensor, shape: Sequence[int], window: Window | None) -> None:
    """Refuse an input whose channels are not those of a weight of this shape: loops read and write memory by them.

    Raises:
        RuntimeError: as torch's own products do.
    """
    axis = -1 if window is None else 1 - len(shape)
    if x.ndim < -axis or x.shape[axis] != shape[1]:
        raise RuntimeError(f"a layer with a weight of shape {tuple(shape)} cannot take an input of shape {tuple(x.shape)}")


@dataclass(frozen=True, eq=False)
class Operands:
    """One quantized layer, as data.

    Attributes:
        weight: the packed weight.
        bias: ``[out]``, or None.
        input: how the input is rounded, or None for float inputs.
        shift, scale: ``[in]``, the input's rewrite ``(x - shift) / scale``; or None.
        rotate: whether a Hadamard rotation of the channels comes before it.
        mix: what happens to the channels before that, in order (:mod:`reelquant.kernels.mixing`).
        window: of a convolution; None for a linear layer.
    """

    weight: PackedWeight
    bias: Tensor | None
    input: InputQuant | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    rotate: bool = False
    window: Window | None = None
    mix: tuple[Mix, ...] = ()

    @property
    def features(self) -> frozenset[str]:
        """Names of the fields in use beside weight and bias, and of scales of a kind: what a kernel must take to compute this layer."""
        grains = grain_features(self.weight.quantizer.granularity, None if self.input is None else self.input.granularity)
        return features_in_use(self, PLAIN) | grains

    @property
    def channel_axis(self) -> int:
        """Axis of the input's channels."""
        return -1 if self.window is None else 1

    @property
    def rewritten(self) -> bool:
        """Whether anything happens to the input before it is rounded."""
        return bool(self.mix) or self.rotate or self.shift is not None or self.scale is not None

    @property
    def product(self) -> Callable[..., Tensor]:
        """``F.linear``, or the convolution of inputs that are padded already."""
        return F.linear if self.window is None else self.window.convolve

    def padded(self, x: Tensor) -> Tensor:
        """The input with its zero border."""
        return F.pad(x, self.window.padding) if self.window is not None and any(self.window.padding) else x

    def mixed(self, x: Tensor) -> Tensor:
        """The input in float32 after :attr:`mix`."""
        x = x.float()
        for one in self.mix:
            x = one(x, self.channel_axis)
        return x

    def rewritten_input(self, x: Tensor) -> Tensor:
        """``(rotate(mix(x)) - shift) / scale`` in float32."""
        x = self.mixed(x)
        x = hadamard(x, self.channel_axis) if self.rotate else x
        x = x if self.shift is None else x - self._along(self.shift, x.ndim)
        return x if self.scale is None else x / self._along(self.scale, x.ndim)

    def quantized_input(self, x: Tensor, slot: int | Tensor) -> Tensor:
        """The same, rounded as the layer's input is."""
        x = self.rewritten_input(x)
        return x if self.input is None else self.input.quantizer(x, slot)(x)

    def _along(self, vector: Tensor, ndim: int) -> Tensor:
        return vector.float() if self.window is None else vector.float().view(-1, *[1] * (ndim - 2))


Runner = Callable[[Tensor, Any], Tensor]  # (input, slot) -> output, in the dtype of the input
