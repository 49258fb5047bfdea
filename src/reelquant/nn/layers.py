"""Quantized layers: stock ``nn.Linear`` / ``nn.ConvNd`` subclasses that hold packed codes and scales instead of a float weight.

Plain parameters and buffers only, so that offload, device maps, compile, peft and safetensors see nothing special. Convolutions pad
their input *before* the shift, so a shifted zero is what the border sees and the rewrite is exact up to the edge.

What computes a layer is prepared when it first runs (:mod:`reelquant.kernels`). A kernel may take the weight over, repacked: the parameter
then keeps its shape and dtype and no memory, and saving, copying and moving the layer ask the kernel for the codes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.clock import Clock, keeping_dtype
from reelquant.formats import LEVEL_DTYPE, Levels, NumberFormat, Quantizer, packed_width, parse_format
from reelquant.kernels import InputNumbers, Kernel, Operands, PackedWeight, Runner, Window, hadamard, of_slot, select
from reelquant.kernels.activations import ACTIVATIONS
from reelquant.nn.graph import call, number_of
from reelquant.nn.pages import drop_mapped
from reelquant.nn.spec import LayerLayout, TensorLayout
from reelquant.observe import Geometry

SHIFT_DTYPE = torch.bfloat16
"""Per-channel shifts and scales: the bias and the weight codes were computed with the rounded values, so nothing is lost."""
_preparing = threading.RLock()  # of all layers: between repacking a weight and letting go of it nobody else may look at it


@dataclass(eq=False)
class LayerTensors:
    """The tensors of one quantized layer, by their names in the checkpoint (``<layer>.weight``, ``<layer>.weight_scale`` ...)."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Ready:
    """What computes a layer, and the weight it was built from."""

    runner: Runner
    kernel: Kernel
    refused: dict[str, str]
    weight: Any

    @property
    def holds(self) -> bool:
        """Whether the runner has taken the weight over."""
        return getattr(self.runner, "codes", None) is not None


class QuantLayer(nn.Module):
    """What linear and convolution layers share. Not used directly: see :class:`QuantLinear` and the ``QuantConv`` classes."""

    layout: LayerLayout
    weight_shape: tuple[int, ...]
    channel_axis: int
    _ready: Ready | None
    output_format = torch.contiguous_format
    kernels = "auto"  # or "reference", whatever others use; see set_kernels
    clock: tuple[Clock, ...]  # a tuple hides the shared clock from nn.Module, and deepcopy still maps it to the copied denoiser's

    def _build(self, layout: LayerLayout, device: torch.device | str | None) -> None:
        """Replace the float weight by empty tensors of the layout's shapes."""
        self.layout, self.weight_shape, self.clock = layout, tuple(self.weight.shape), ()
        self._ready = None
        self.number = number_of(self)
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
        self._ready = None
        self.weight.data = tensors.weight
        self.weight_scale = tensors.weight_scale
        if tensors.bias is not None:
            assert self.bias is not None
            self.bias.data = tensors.bias
        for name, value in tensors.extra.items():
            setattr(self, name, value)

    def _channels(self) -> int:
        raise NotImplementedError

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the output for this input."""
        raise NotImplementedError

    @property
    def kernel(self) -> Kernel:
        """What computes this layer on the device it lies on."""
        return self.selected[0]

    @property
    def selected(self) -> tuple[Kernel, dict[str, str]]:
        """The kernel, and why each better one of this device refused the layer."""
        ready = self._prepared()
        return (ready.kernel, ready.refused) if ready else select(self.operands, self.weight.device.type, self.kernels)

    @property
    def simulated(self) -> bool:
        """Whether float arithmetic stands in for the low-bit arithmetic of the recipe."""
        return self.layout.input is not None and not self.kernel.low_bit

    @property
    def operands(self) -> Operands:
        """This layer as kernels see it."""
        layout = self.layout
        shift, scale = (getattr(self, name, None) for name in ("pre_quant_shift", "pre_quant_scale"))
        return Operands(self.packed, self.bias, self._numbers(), shift, scale, layout.rotate, self._window())

    def _numbers(self) -> InputNumbers | None:
        layout = self.layout.input
        if layout is None:
            return None
        fmt, grain = _format(layout, getattr(self, "input_levels", None)), layout.grain(self.channel_axis)
        if layout.dynamic:
            return InputNumbers(fmt, grain, rule=layout.spec(self.channel_axis))
        return InputNumbers(fmt, grain, self.input_scale, getattr(self, "input_zero_point", None))

    def _window(self) -> Window | None:
        return None

    @property
    def packed(self) -> PackedWeight:
        """The stored weight with its quantizer."""
        layout = self.layout.weight
        zero = getattr(self, "weight_zero_point", None)
        fmt = _format(layout, getattr(self, "weight_levels", None))
        quantizer = Quantizer(fmt, layout.grain(), self.weight_scale.float(), None if zero is None else zero.float())
        return PackedWeight(self.codes, quantizer, self.weight_shape)

    @property
    def codes(self) -> Tensor:
        """The weight's codes as they are stored, wherever they are now."""
        ready = self._prepared()
        return ready.runner.codes() if ready and ready.holds else self.weight.data

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

    # --- running ----------------------------------------------------------------------------------------------------------------

    def _prepared(self) -> Ready | None:
        """What is ready to run, if it is for the weight that is here now: offloading puts another one in its place."""
        return self._ready if self._ready is not None and self._ready.weight is self._parameters["weight"] else None

    def prepare(self) -> Ready:
        """Choose a kernel and build what computes this layer; once, also for threads that come together."""
        return self._prepared() or self._prepare()

    def _prepare(self) -> Ready:
        with _preparing:
            if (ready := self._prepared()) is None:
                kernel, refused = self.selected
                ready = self._ready = Ready(kernel.prepare(self.operands), kernel, refused, self._parameters["weight"])
                if ready.holds:
                    drop_mapped(self.weight.data)
                    self.weight.data = self.weight.new_empty(1).expand(self.weight.shape)
            return ready

    def release(self) -> None:
        """Take the weight back from the kernel, if it has it; the next call prepares anew."""
        self.weight.data = self.codes
        self._ready = None

    def forward(self, input: Tensor) -> Tensor:
        return self.activated(input, "")

    def activated(self, input: Tensor, activation: str) -> Tensor:
        """The output, with an activation of :data:`reelquant.kernels.activations.ACTIVATIONS` applied to it; empty for none."""
        if torch.compiler.is_compiling():
            return call(self, input, self.clock, activation)
        return self.compute(input, *(self.clock[0].now() if self.clock else (0, False)), activation)

    def compute(self, input: Tensor, slot: int | Tensor, exact: bool, activation: str = "") -> Tensor:
        """The output at a step; ``exact`` if the current timestep is the very one of that slot."""
        if self.layout.table and self.clock:
            if exact:
                stored = self._from_table(input, slot)
                return ACTIVATIONS[activation](stored) if activation else stored
            self.clock[0].fall_back()
        if self.layout.slots > 1 and not self.clock:
            raise UnsupportedError("a layer with per-step scales needs the clock of its denoiser; load it with reelquant.load")
        runner: Any = self.prepare().runner
        if not activation:
            return runner(input, slot)
        if activation in getattr(runner, "fused", ()):
            return runner(input, slot, activation)
        return ACTIVATIONS[activation](runner(input, slot))

    def _from_table(self, input: Tensor, slot: int | Tensor) -> Tensor:
        """The stored output of this step, for every row of the input; an unused layer answers with zeros nobody reads."""
        shape = (*input.shape[:-1], self.weight_shape[0])
        if self.layout.unused:
            return input.new_zeros(()).expand(shape)
        return of_slot(self.output_table, slot).to(input.dtype).expand(shape)

    # --- moving, copying, saving: the weight comes back first --------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLayer:
        """``.to(bfloat16)`` and ``.half()`` cast the bias, as in a float layer; scales, shifts, levels and tables keep their dtype."""
        self.release()
        kept = keeping_dtype(fn)
        return super()._apply(lambda tensor: fn(tensor) if tensor is self.bias else kept(tensor), recurse)

    def __getstate__(self) -> dict[str, Any]:
        parameters = self._parameters | {"weight": nn.Parameter(self.codes, requires_grad=False)}
        return self.__dict__ | {"_parameters": parameters, "_ready": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = number_of(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (ready := self._prepared()) and ready.holds:
            destination[prefix + "weight"] = self.codes

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

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

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        return (*x.shape[:-1], self.out_features)


class _QuantConv(QuantLayer):
    """Geometry shared by the convolution classes."""

    channel_axis = 1

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

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        window, places = self._window(), x.shape[-len(self.kernel_size) :]
        padding = [sum(pair) for pair in zip(window.padding[::2], window.padding[1::2], strict=True)][::-1] or [0] * len(places)
        sizes = zip(places, padding, self.kernel_size, window.stride, window.dilation, strict=True)
        return (*x.shape[: -1 - len(places)], self.out_channels, *((size + p - d * (k - 1) - 1) // s + 1 for size, p, k, s, d in sizes))

    def _window(self) -> Window:
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
