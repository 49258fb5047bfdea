"""Quantized layers: stock ``nn.Linear`` / ``nn.ConvNd`` subclasses that hold packed codes and scales instead of a float weight.

Plain parameters and buffers only, so that offload, device maps, compile, peft and safetensors see nothing special. Convolutions pad
their input *before* the shift, so a shifted zero is what the border sees and the rewrite is exact up to the edge.

What computes a layer is prepared when it first runs (:mod:`reelquant.kernels`). A kernel may take the weight over, repacked: the parameter
then keeps its shape and dtype and no memory, and saving, copying and moving the layer ask the kernel for the codes. Offloading moves
parameters without asking; what was prepared is recognised as out of date by the memory it was made from.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.clock import ANY, BOTH, FIRST, SECOND, Clock, Moment, keeping_dtype
from reelquant.formats import LEVEL_DTYPE, Levels, NumberFormat, Quantizer, packed_width, parse_format
from reelquant.kernels import InputQuant, Kernel, Operands, PackedWeight, Runner, Window, hadamard, of_slot, select
from reelquant.kernels.activations import ACTIVATIONS
from reelquant.nn.graph import call, number_of, outline, outlined
from reelquant.nn.kept import Kept, stamp
from reelquant.nn.pages import drop_mapped, give_back
from reelquant.nn.spec import HALVES, LayerLayout, TensorLayout
from reelquant.observe import Geometry

SHIFT_DTYPE = torch.bfloat16
"""Per-channel shifts and scales: the bias and the weight codes were computed with the rounded values, so nothing is lost."""
PLACEHOLDER = 0x5A  # every code of a weight that a kernel holds; no quantizer gives that code to all of a weight
_preparing = threading.RLock()  # of all layers: between repacking a weight and letting go of it nobody else may look at it


@dataclass(eq=False)
class LayerTensors:
    """The tensors of one quantized layer, by their names in the checkpoint (``<layer>.weight``, ``<layer>.weight_scale`` ...)."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class Ready:
    """What computes a layer, and the memory its weight had then; kept, so that no other weight can come to lie there.

    ``finer`` computes protected steps from the same memory; ``kept`` are outputs of earlier steps.
    """

    runner: Runner
    kernel: Kernel
    refused: dict[str, str]
    weight: Tensor
    finer: Runner | None = None
    kept: Kept = field(default_factory=Kept)

    @property
    def holds(self) -> bool:
        """Whether the runner has taken the weight over; the memory is a placeholder's then."""
        return getattr(self.runner, "codes", None) is not None

    @property
    def codes(self) -> Tensor:
        """The weight as it is stored."""
        return self.runner.codes() if self.holds else self.weight  # type: ignore[attr-defined]

    def fits(self, weight: Tensor) -> bool:
        """Whether a weight still lies where it did: offloading puts another one in its place, or the same one elsewhere."""
        return weight.data_ptr() == self.weight.data_ptr()


class QuantLayer(nn.Module):
    """What linear and convolution layers share. Not used directly: see :class:`QuantLinear` and the ``QuantConv`` classes."""

    layout: LayerLayout
    weight_shape: tuple[int, ...]
    channel_axis: int
    bias_made: bool  # quantization made the bias: the float layer had none
    _ready: Ready | None
    output_format = torch.contiguous_format
    keeps = False  # whether eager calls give the output of an earlier step again where the input is the same
    kernels = "auto"  # or "reference", whatever others use; see set_kernels
    elsewhere: tuple[Kernel, dict[str, str]] | None = None  # what computes it if its denoiser runs as a graph, and why nothing better does
    clock: tuple[Clock, ...]  # a tuple hides the shared clock from nn.Module, and deepcopy still maps it to the copied denoiser's

    def _build(self, layout: LayerLayout, device: torch.device | str | None) -> None:
        """Replace the float weight by empty tensors of the layout's shapes."""
        self.layout, self.weight_shape, self.clock = layout, tuple(self.weight.shape), ()
        self._ready, self.bias_made = None, layout.bias and self.bias is None
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
        """The kernel, and why each better one of this device refused the layer; or what computes it in the graph of its denoiser."""
        return self.elsewhere or self._selected()

    def _selected(self) -> tuple[Kernel, dict[str, str]]:
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

    @property
    def features(self) -> frozenset[str]:
        """Names of everything the layer uses beside a weight and a bias: what graphs must take to compute it."""
        return self.operands.features | self.layout.features

    def _numbers(self) -> InputQuant | None:
        layout = self.layout.input
        if layout is None:
            return None
        fmt, grain = _format(layout, getattr(self, "input_levels", None)), layout.grain(self.channel_axis)
        if layout.dynamic:
            return InputQuant(fmt, grain, rule=layout.spec(self.channel_axis))
        return InputQuant(fmt, grain, self.input_scale, getattr(self, "input_zero_point", None))

    def _window(self) -> Window | None:
        return None

    @property
    def packed(self) -> PackedWeight:
        """The stored weight with its quantizer."""
        layout = self.layout.weight
        zero = getattr(self, "weight_zero_point", None)
        fmt = _format(layout, getattr(self, "weight_levels", None))
        quantizer = Quantizer(fmt, layout.grain(), self.weight_scale.float(), None if zero is None else zero.float())
        return PackedWeight(self.codes, quantizer, self.weight_shape, self.weight_scale)

    @property
    def codes(self) -> Tensor:
        """The weight's codes as they are stored, wherever they are now.

        Raises:
            UnsupportedError: if they are lost, because something copied the parameter of a running layer instead of asking the layer.
        """
        ready, weight = self._ready, self.weight.data
        copied = not (ready and ready.fits(weight)) and _is_placeholder(weight)
        if ready and (copied or ready.fits(weight)):
            return ready.codes.to(weight.device)
        if copied:
            raise UnsupportedError(
                f"the weight of a quantized layer ({self}) was moved while a kernel held it, without the layer being asked; load the "
                "model again, and call model.to('cpu') before switching on what moves parameters itself (group offloading with streams)"
            )
        return weight

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats, the input's rewrite undone: what a float layer would hold (its bias is :meth:`float_bias`)."""
        weight = self._unscaled_weight()
        return (hadamard(weight, 1) if self.layout.rotate else weight).to(dtype)

    def _unscaled_weight(self) -> Tensor:
        """The weight that meets the input after its rotation, the per-channel input scale divided out."""
        weight = self.packed.dequantize()
        return weight / self.pre_quant_scale.float().view(1, -1, *[1] * (weight.ndim - 2)) if self.layout.scale else weight

    def float_bias(self) -> Tensor | None:
        """The bias that belongs to :meth:`dequantized_weight`: without the compensation of the shift.

        None if there is none, or if that compensation is all that quantization made it for.
        """
        if self.bias is None or not self.layout.shift:
            return self.bias
        weight = self._unscaled_weight()
        shift = self.pre_quant_shift.float().view(1, -1, *[1] * (weight.ndim - 2))
        left = self.bias.float() - (weight * shift).flatten(1).sum(1)
        return None if self.bias_made and _is_rounding(left, self.bias.float()) else left.to(self.bias.dtype)

    # --- running ----------------------------------------------------------------------------------------------------------------

    def _prepared(self) -> Ready | None:
        """What is ready to run, if it is for the weight that is here now."""
        ready = self._ready
        return ready if ready is not None and ready.fits(self._parameters["weight"]) else None  # type: ignore[arg-type]

    def prepare(self) -> Ready:
        """Choose a kernel and build what computes this layer; once, also for threads that come together."""
        return self._prepared() or self._prepare()

    def _prepare(self) -> Ready:
        with _preparing:
            if (ready := self._prepared()) is None:
                self.release()
                _drop_outdated()
                kernel, refused = self._selected()
                ready = Ready(kernel.prepare(self.operands), kernel, refused, self.weight.data)
                if ready.holds:
                    drop_mapped(self.weight.data)
                    self.weight.data = self.weight.new_full((1,), PLACEHOLDER).expand(self.weight.shape)
                    ready = replace(ready, weight=self.weight.data)
                    _tidy(self.weight.numel())
                self._ready = ready
                _running.add(self)
            return ready

    def release(self) -> None:
        """Take the weight back from the kernel, if it has it; the next call prepares anew."""
        if self._ready is None:
            return
        codes, weight = self.codes, self.weight.data
        if 0 in weight.stride():
            self.weight.data = codes
        elif codes.data_ptr() != weight.data_ptr():
            weight.copy_(codes)  # in place: group offloading keeps this memory and moves copies of it
        self._ready = None

    def forget(self) -> None:
        """Drop what was prepared, weight and all: the layer's tensors are taken from elsewhere before it runs again."""
        self._ready = None

    def forward(self, input: Tensor) -> Tensor:
        return self.activated(input, "")

    def activated(self, input: Tensor, activation: str) -> Tensor:
        """The output, with an activation of :data:`reelquant.kernels.activations.ACTIVATIONS` applied to it; empty for none."""
        if torch.compiler.is_compiling():
            return call(self, input, self.clock, activation)
        if outlined():
            return outline(self, input)
        now = self.clock[0].now() if self.clock else Moment()
        if self.keeps and not now.protected:
            kept = self.prepare().kept
            numbers = stamp((*self._parameters.values(), *self._buffers.values()))
            return kept.once(input, (activation, numbers), lambda: self.compute(input, now, activation))
        return self.compute(input, now, activation)

    def compute(self, input: Tensor, now: Moment, activation: str = "") -> Tensor:
        """The output at a step; ``now.exact`` if the current timestep is the very one of that slot."""
        if self.layout.table and self.clock:
            if now.exact:
                stored = self._from_table(input, now.slot)
                return ACTIVATIONS[activation](stored) if activation else stored
            self.clock[0].fall_back()
        if self.layout.slots > 1 and not self.clock:
            raise UnsupportedError("a layer with per-step scales needs the clock of its denoiser; load it with reelquant.load")
        if torch.is_grad_enabled() and input.requires_grad:
            out = StraightThrough.apply(input, self, now)
            return ACTIVATIONS[activation](out) if activation else out
        return self._product(input, now, activation)

    def _product(self, input: Tensor, now: Moment, activation: str) -> Tensor:
        """What the kernel of this step gives; halves of guidance that have scales of their own one after the other."""
        runner: Any = self._protecting() if now.protected and self.layout.input is not None else self.prepare().runner
        if not self.layout.cfg_halves:
            return _run(runner, input, now.slot, activation)
        slot = (now.slot if self.layout.slots > HALVES else 0) * HALVES
        if now.half != BOTH or len(input) % 2:
            return _run(runner, input, slot + (ANY if now.half == BOTH else now.half), activation)
        return torch.cat(
            [_run(runner, half, slot + which, activation) for which, half in zip((FIRST, SECOND), input.chunk(2), strict=True)]
        )

    def _protecting(self) -> Any:
        """What computes a protected step, from the weight as it is: no second copy outlives the call."""
        ready, numbers = self.prepare(), self._numbers()
        assert numbers is not None
        if self.clock[0].inputs == "8-bit" and (ready.finer or numbers.widened() is numbers):
            return ready.finer or ready.runner
        given = replace(self.operands, input=None if self.clock[0].inputs == "float" else numbers.widened())
        if given.input is not None and hasattr(ready.runner, "rounding"):
            ready.finer = ready.runner.rounding(given)
            return ready.finer
        return select(given, self.weight.device.type, self.kernels)[0].prepare(given)

    def _from_table(self, input: Tensor, slot: int | Tensor) -> Tensor:
        """The stored output of this step, for every row of the input; an unused layer answers with zeros nobody reads.

        In memory of its own: models add to outputs in place.
        """
        shape = (*input.shape[:-1], self.weight_shape[0])
        if self.layout.unused:
            return input.new_zeros(shape)
        return of_slot(self.output_table, slot).to(input.dtype).expand(shape).clone()

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of this shape, given that of the output: as if the input were not rounded.

        The weight is dequantized for it, so adapters train on quantized layers; the layer itself does not.
        """
        x = gradient.new_zeros(shape).requires_grad_()
        with torch.enable_grad():
            operands = self.operands
            out = operands.product(operands.padded(x), self.dequantized_weight(gradient.dtype), None)
        return torch.autograd.grad(out, x, gradient)[0]

    # --- moving, copying, saving: the weight comes back first --------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLayer:
        """``.to(bfloat16)`` and ``.half()`` cast the bias, as in a float layer; scales, shifts, levels and tables keep their dtype.

        So does the bias where a cast would leave one byte of it (layerwise casting).
        """
        kept = keeping_dtype(fn)

        def cast(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if tensor is self.bias and new.dtype.itemsize > 1 else kept(tensor)

        samples = (self.weight.new_empty(0), self.bias)
        if any(sample is not None and cast(sample) is not sample for sample in samples):
            self.release()
        return super()._apply(cast, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantLayer:
        new = memo[id(self)] = type(self).__new__(type(self))
        parameters = self._parameters | {"weight": nn.Parameter(self.codes, requires_grad=False)}
        new.__setstate__(copy.deepcopy(self.__dict__ | {"_parameters": parameters, "_ready": None}, memo))
        new.number = number_of(new)
        return new

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "quantized models are not pickled (torch.save, multiprocessing): a pickle can run code, and kernels hold the weights; "
            "use save_pretrained or reelquant.save, and load them where they are needed"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (codes := self.codes).data_ptr() != self.weight.data_ptr():
            destination[prefix + "weight"] = codes

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        inputs = self.layout.input
        return f"{super().extra_repr()}, weight={self.layout.weight.format}, input={inputs.format if inputs else 'float'}"


def _run(runner: Any, input: Tensor, slot: int | Tensor, activation: str) -> Tensor:
    """Product and activation, in one kernel if it can."""
    if not activation:
        return runner(input, slot)
    if activation in getattr(runner, "fused", ()):
        return runner(input, slot, activation)
    return ACTIVATIONS[activation](runner(input, slot))


def _is_rounding(left: Tensor, bias: Tensor) -> bool:
    """Whether a difference is what float16 leaves of a bias, and float32 of a sum whose terms cancel."""
    size, eps = bias.abs(), torch.finfo(torch.float16).eps
    return bool((left.abs() <= eps * (size + eps * size.amax())).all())


_running: weakref.WeakSet[QuantLayer] = weakref.WeakSet()


def _drop_outdated() -> None:
    """Let go of what was prepared from weights that were offloaded since; nothing tells their layers, so others do."""
    for layer in _running:
        if layer._prepared() is None:
            layer.release()


TIDY = 64 << 20  # bytes of weights after whose preparation the heap is looked through
_repacked = 0


def _tidy(size: int) -> None:
    """Give the heap's holes back once in a while: what was repacked, and what that took, has left some."""
    global _repacked
    _repacked += size
    if _repacked >= TIDY:
        give_back()
        _repacked = 0


def _is_placeholder(weight: Tensor) -> bool:
    """Whether this is what a kernel that holds a weight leaves in its place, or a copy of that."""
    if weight.device.type == "meta":
        return False
    return bool((weight[0] == PLACEHOLDER).all()) and bool((weight == PLACEHOLDER).all())


class StraightThrough(torch.autograd.Function):
    """A layer between adapters that are trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLayer, now: Moment) -> Tensor:
        """What the layer's kernel gives."""
        ctx.layer, ctx.shape = layer, x.shape
        return layer._product(x.detach(), now, "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """:meth:`QuantLayer.input_gradient`."""
        return ctx.layer.input_gradient(gradient, ctx.shape), None, None


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
        """Called like a stock convolution it is one: peft builds the float factors of an adapter with the class of its layer."""
        return _float_class(cls)(*geometry, **options) if geometry or options else super().__new__(cls)

    @classmethod
    def like(cls, module: Any, layout: LayerLayout, device: Any = None) -> _QuantConv:
        """An empty layer of the same geometry."""
        if module.groups != 1 or module.padding_mode != "zeros":
            raise UnsupportedError(f"convolutions with groups={module.groups}, padding_mode='{module.padding_mode}' stay float")
        new = cls.__new__(cls)
        new.__init__(
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
    """The quantized counterpart of a float layer, or None if there is none.

    Subclasses count if they keep the stock forward; those of convolutions also if :func:`prepares_input`.
    """
    for kind, replacement in LAYERS.items():
        if isinstance(module, kind) and not isinstance(module, QuantLayer):
            forward = type(module).forward
            if forward in (kind.forward, _compatible_forward(type(module))):
                return replacement
            return _extended(type(module), replacement) if prepares_input(module) else None
    return None


def float_class(layer: QuantLayer) -> type[nn.Module]:
    """The class of the float layer that a quantized one stands for; built like its first base class in :data:`LAYERS`."""
    return type(layer).__mro__[1] if type(layer) not in LAYERS.values() else next(kind for kind in LAYERS if isinstance(layer, kind))


def prepares_input(module: nn.Module) -> bool:
    """Is this a convolution that pads its input by itself and reaches its weight through ``super().forward`` alone (causal ones do)?"""
    code = getattr(type(module).forward, "__code__", None)
    names = set() if code is None else set(code.co_names)
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and {"super", "forward"} <= names and "weight" not in names


@functools.cache
def _extended(kind: type[nn.Module], replacement: Any) -> Any:
    """A quantized layer with the forward of ``kind``, whose ``super().forward`` is the quantized one."""

    def like(cls: Any, module: nn.Module, layout: LayerLayout, device: Any = None) -> Any:
        new = replacement.like(module, layout, device)
        new.__class__ = cls
        new.__dict__ |= own_attributes(module, new)
        return new

    return type(f"Quant{kind.__name__}", (kind, replacement), {"like": classmethod(like)})


def own_attributes(module: nn.Module, stock: nn.Module) -> dict[str, Any]:
    """What a subclass keeps on its layers beside the attributes of the ``stock`` class: paddings, caches."""
    return {name: value for name, value in vars(module).items() if name not in vars(stock)}


def _compatible_forward(kind: type[nn.Module]) -> Any:
    """diffusers' ``LoRACompatible*`` layers add an unused ``scale`` argument to the stock forward."""
    return kind.forward if kind.__name__.startswith("LoRACompatible") else None


def _float_class(kind: type[nn.Module]) -> type[nn.Module]:
    return next(base for base in kind.__mro__ if not issubclass(base, QuantLayer))


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
