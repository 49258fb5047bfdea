"""Quantized layers: stock ``nn.Linear`` / ``nn.ConvNd`` subclasses that hold packed codes and scales instead of a float weight.

Plain parameters and buffers only, so that offload, device maps, compile, peft and safetensors see nothing special. Convolutions pad
their input *before* the shift, so a shifted zero is what the border sees and the rewrite is exact up to the edge.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.clock import Clock, keeping_dtype
from reelquant.formats import LEVEL_DTYPE, Levels, NumberFormat, Quantizer, dynamic, packed_width, parse_format
from reelquant.kernels import InputStage, Kernel, PackedWeight, hadamard, select
from reelquant.nn.spec import LayerLayout, TensorLayout
from reelquant.observe import Geometry

SHIFT_DTYPE = torch.bfloat16
"""Per-channel shifts and scales: the bias and the weight codes were computed with the rounded values, so nothing is lost."""


@dataclass(eq=False)
class LayerTensors:
    """The tensors of one quantized layer, by their names in the checkpoint (``<layer>.weight``, ``<layer>.weight_scale`` ...)."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)


class QuantLayer(nn.Module):
    """What linear and convolution layers share. Not used directly: see :class:`QuantLinear` and the ``QuantConv`` classes."""

    layout: LayerLayout
    weight_shape: tuple[int, ...]
    channel_axis: int
    clock: tuple[Clock, ...]  # a tuple hides the shared clock from nn.Module, and deepcopy still maps it to the copied denoiser's

    def _build(self, layout: LayerLayout, device: torch.device | str | None) -> None:
        """Replace the float weight by empty tensors of the layout's shapes."""
        self.layout, self.weight_shape, self.clock = layout, tuple(self.weight.shape), ()
        dtype = self.weight.dtype
        if layout.bias != (self.bias is not None):
            self.bias = nn.Parameter(torch.empty(self.weight_shape[0], device=device, dtype=dtype)) if layout.bias else None
        if self.bias is not None:
            self.bias.requires_grad_(False)
        weight = torch.empty(*_codes_shape(self.weight_shape, layout.weight), dtype=_codes_dtype(layout.weight), device=device)
        del self._parameters["weight"]  # after the bias: diffusers reads a block's dtype off its first parameter
        self.weight = nn.Parameter(weight, requires_grad=False)
        for name, (shape, kind) in buffer_shapes(self.weight_shape, layout, self._channels()).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))

    def fill(self, tensors: LayerTensors) -> None:
        """Take over computed tensors; shapes must be those of the layout."""
        self.weight.data = tensors.weight
        self.weight_scale = tensors.weight_scale
        if tensors.bias is not None:
            assert self.bias is not None
            self.bias.data = tensors.bias
        for name, value in tensors.extra.items():
            setattr(self, name, value)

    def _channels(self) -> int:
        raise NotImplementedError

    def _operation(self) -> Callable[..., Tensor]:
        raise NotImplementedError

    def _padded(self, x: Tensor) -> Tensor:
        return x

    @property
    def kernel(self) -> Kernel:
        """The function that computes this layer on the device it lies on."""
        return select(self.layout.weight.format, self.layout.input and self.layout.input.format, self.weight.device.type)

    @property
    def packed(self) -> PackedWeight:
        """The stored weight with its quantizer."""
        layout = self.layout.weight
        zero = getattr(self, "weight_zero_point", None)
        fmt = _format(layout, getattr(self, "weight_levels", None))
        quantizer = Quantizer(fmt, layout.grain(), self.weight_scale.float(), None if zero is None else zero.float())
        return PackedWeight(self.weight.data, quantizer, self.weight_shape)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats, the input's rewrite undone: what a float layer would hold (its bias is :meth:`float_bias`)."""
        weight = self._unscaled_weight()
        return (hadamard(weight, 1) if self.layout.rotate else weight).to(dtype)

    def _unscaled_weight(self) -> Tensor:
        """The weight that meets the input after its rotation, the per-channel input scale divided out."""
        weight = self.packed.dequantize()
        return weight / self.pre_quant_scale.float().view(1, -1, *[1] * (weight.ndim - 2)) if self.layout.scale else weight

    def float_bias(self) -> Tensor | None:
        """The bias that belongs to :meth:`dequantized_weight`: without the compensation of the shift."""
        if self.bias is None or not self.layout.shift:
            return self.bias
        weight = self._unscaled_weight()
        shift = self.pre_quant_shift.float().view(1, -1, *[1] * (weight.ndim - 2))
        return (self.bias.float() - (weight * shift).flatten(1).sum(1)).to(self.bias.dtype)

    def stage(self, x: Tensor) -> InputStage:
        """The input stage of the current denoising step."""
        shift, scale = (self._along_channels(getattr(self, name, None), x.ndim) for name in ("pre_quant_shift", "pre_quant_scale"))
        return InputStage(shift, scale, self._input_quantizer(), self.channel_axis if self.layout.rotate else None)

    def _along_channels(self, vector: Tensor | None, ndim: int) -> Tensor | None:
        if vector is None or self.channel_axis == -1:
            return None if vector is None else vector.float()
        return vector.float().view(-1, *[1] * (ndim - 1 - self.channel_axis))

    def _input_quantizer(self) -> Callable[[Tensor], Tensor] | None:
        layout = self.layout.input
        if layout is None:
            return None
        if layout.dynamic:
            spec = layout.spec(self.channel_axis)
            return lambda x: dynamic(spec, x)(x)
        scale, zero = self._of_slot(self.input_scale), getattr(self, "input_zero_point", None)
        fmt = _format(layout, getattr(self, "input_levels", None))
        return Quantizer(fmt, layout.grain(self.channel_axis), scale, None if zero is None else self._of_slot(zero))

    def _of_slot(self, table: Tensor) -> Tensor:
        if table.shape[0] == 1:
            return table[0]
        if not self.clock:
            raise UnsupportedError("a layer with per-step scales needs the clock of its denoiser; load it with reelquant.load")
        return table.index_select(0, self.clock[0].slot.reshape(1).to(table.device))[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLayer:
        """``.to(bfloat16)`` and ``.half()`` cast the bias, as in a float layer; scales, shifts, levels and tables keep their dtype."""
        kept = keeping_dtype(fn)
        return super()._apply(lambda tensor: fn(tensor) if tensor is self.bias else kept(tensor), recurse)

    def forward(self, input: Tensor) -> Tensor:
        if self.layout.table and self.clock:
            if self.clock[0].exact:
                return self._from_table(input)
            self.clock[0].fall_back()
        x = self._padded(input)
        return self.kernel.function(x, self.stage(x), self.packed, self.bias, self._operation())

    def _from_table(self, input: Tensor) -> Tensor:
        """The stored output of this step, for every row of the input; an unused layer answers with zeros nobody reads."""
        shape = (*input.shape[:-1], self.weight_shape[0])
        if self.layout.unused:
            return input.new_zeros(()).expand(shape)
        return self._of_slot(self.output_table).to(input.dtype).expand(shape)

    def extra_repr(self) -> str:
        inputs = self.layout.input
        return f"{super().extra_repr()}, weight={self.layout.weight.format}, input={inputs.format if inputs else 'float'}"


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

    def _operation(self) -> Callable[..., Tensor]:
        return F.linear


class _QuantConv(QuantLayer):
    """Geometry shared by the convolution classes."""

    channel_axis = 1
    _convolve: Callable[..., Tensor]

    @classmethod
    def like(cls, module: Any, layout: LayerLayout, device: Any = None) -> _QuantConv:
        """An empty layer of the same geometry."""
        if module.groups != 1 or module.padding_mode != "zeros":
            raise UnsupportedError(f"convolutions with groups={module.groups}, padding_mode='{module.padding_mode}' stay float")
        new = cls(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding, module.dilation,
            bias=module.bias is not None, device="meta", dtype=module.weight.dtype,
        )  # fmt: skip
        if new.bias is not None:
            new.bias = nn.Parameter(torch.empty(module.out_channels, device=device, dtype=module.weight.dtype))
        new._build(layout, device)
        return new

    def _channels(self) -> int:
        return self.in_channels

    def _padded(self, x: Tensor) -> Tensor:
        geometry = Geometry.of(self)
        return F.pad(x, geometry.padding) if geometry.padded else x

    def _operation(self) -> Callable[..., Tensor]:
        return functools.partial(type(self)._convolve, stride=self.stride, dilation=self.dilation)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """A 1-D convolution in few bits."""

    _convolve = staticmethod(F.conv1d)


class QuantConv2d(_QuantConv, nn.Conv2d):
    """A 2-D convolution in few bits."""

    _convolve = staticmethod(F.conv2d)


class QuantConv3d(_QuantConv, nn.Conv3d):
    """A 3-D (or temporal) convolution in few bits."""

    _convolve = staticmethod(F.conv3d)


LAYERS: dict[type[nn.Module], Any] = {nn.Linear: QuantLinear, nn.Conv1d: QuantConv1d, nn.Conv2d: QuantConv2d, nn.Conv3d: QuantConv3d}


def quantized_class(module: nn.Module) -> Any | None:
    """The quantized counterpart of a float layer, or None if there is none. Subclasses that keep the stock forward count."""
    for kind, replacement in LAYERS.items():
        if isinstance(module, kind) and not isinstance(module, QuantLayer):
            forward = type(module).forward
            return replacement if forward in (kind.forward, _compatible_forward(type(module))) else None
    return None


def _compatible_forward(kind: type[nn.Module]) -> Any:
    """diffusers' ``LoRACompatible*`` layers add an unused ``scale`` argument to the stock forward."""
    return kind.forward if kind.__name__.startswith("LoRACompatible") else None


def buffer_shapes(shape: tuple[int, ...], layout: LayerLayout, channels: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every buffer of a layer, in checkpoint wording."""
    weight, inputs = layout.weight, layout.input
    grain = weight.grain()
    width = 1
    for size in shape[1:]:
        width *= size
    units = {"tensor": 1, "channel": shape[0], "group": shape[0] * -(-width // max(grain.size, 1))}[grain.kind]
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"weight_scale": ((units,), grain.scale_dtype)}
    if parse_format(weight.format).needs_zero_point:
        found["weight_zero_point"] = ((units,), torch.uint8)
    if weight.levels:
        found["weight_levels"] = ((weight.levels,), LEVEL_DTYPE)
    if inputs is not None and not inputs.dynamic:
        units = {"tensor": 1, "channel": channels, "frame": inputs.grain().size}[inputs.grain().kind]
        found["input_scale"] = ((layout.slots, units), torch.float32)
        if parse_format(inputs.format).needs_zero_point:
            found["input_zero_point"] = ((layout.slots, units), torch.float32)
        if inputs.levels:
            found["input_levels"] = ((inputs.levels,), LEVEL_DTYPE)
    found |= {f"pre_quant_{name}": ((channels,), SHIFT_DTYPE) for name in ("shift", "scale") if getattr(layout, name)}
    if layout.table and not layout.unused:
        found["output_table"] = ((layout.table, shape[0]), torch.float32)
    return found


def _format(layout: TensorLayout, levels: Tensor | None) -> NumberFormat:
    fmt = parse_format(layout.format)
    return fmt if levels is None else Levels(levels.float(), fmt.bits, fmt.name)


def _codes_shape(shape: tuple[int, ...], layout: TensorLayout) -> tuple[int, int]:
    width = 1
    for size in shape[1:]:
        width *= size
    return shape[0], packed_width(width, parse_format(layout.format).bits)


def _codes_dtype(layout: TensorLayout) -> torch.dtype:
    return torch.int8 if layout.format == "int8" else torch.uint8
