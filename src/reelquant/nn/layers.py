"""Quantized layers: stock ``nn.Linear`` / ``nn.ConvNd`` subclasses that hold packed codes and scales instead of a float weight.

A layer is storage: it is built, filled, saved, moved and copied here. It holds plain parameters and buffers only, so that
offload, device maps, compile, peft and safetensors see nothing special. What happens in its forward is a chain of small links
(:mod:`reelquant.nn.runners`), and who holds the weight while a kernel has repacked it is the business of :mod:`reelquant.nn.residency`.
What it is as floats is in :mod:`reelquant.nn.as_floats`, and linear layers and convolutions are in :mod:`reelquant.nn.layer_classes`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.branches import Branch
from reelquant.clock import Clock, Moment, keeping_dtype
from reelquant.formats import Quantizer, read_scales
from reelquant.kernels import InputQuant, Kernel, Operands, PackedWeight, Window
from reelquant.nn import as_floats
from reelquant.nn.around.graph import call, handle_of, is_tracing, trace_opaque
from reelquant.nn.residency import Prepared, Residency
from reelquant.nn.runners import CallKind, Chain, Mode, assemble
from reelquant.nn.spec import LayerLayout, LayerTensors, buffer_shapes, codes_dtype, codes_shape, mixes_of, number_format
from reelquant.nn.weight_codes import dense_codes, stored_again

CHAINED = ("layout", "clock", "keeps", "watch")  # attributes that decide which links a layer needs
NO_MOMENT, DESCRIPTION = Moment(), "reelquant"  # the key of what a state dict says about a quantized layer beside its tensors


class QuantLayer(nn.Module):
    """What linear and convolution layers share. Not used directly: see :class:`QuantLinear` and the ``QuantConv`` classes.

    Attributes:
        layout: what the layer stores; replaceable.
        weight_shape: shape of the float weight.
        channel_axis: axis of the input's channels.
        bias_made: whether quantization made the bias; the float layer had none.
        keeps: whether eager calls reuse the output of an earlier step where the input is the same.
        watch: sees every input while saturation is counted; see :class:`reelquant.nn.Saturation`.
        kernels: ``auto``, or ``reference`` for this layer alone; see :func:`reelquant.nn.set_kernels`.
        runtime_kernel: what computes the layer if its denoiser runs as a graph, and why nothing better does.
        clock: a tuple hides the shared clock from nn.Module, and deepcopy still maps it to the copied denoiser's.
        bits_group: the group of layers, by the clock's numbers, whose bits of steps it has; set by :meth:`follow`.
        residency: where the weight is.
        handle: by which compiled graphs find the layer.
    """

    layout: LayerLayout
    weight_shape: tuple[int, ...]
    channel_axis: int
    bias_made: bool
    output_format = torch.contiguous_format
    keeps = False
    watch: Callable[[QuantLayer, Tensor, Moment], None] | None = None
    kernels = "auto"
    runtime_kernel: tuple[Kernel, dict[str, str]] | None = None
    bits_group = 0
    clock: tuple[Clock, ...]
    residency: Residency
    handle: int
    _chains: dict[CallKind, Chain]

    def _build(self, layout: LayerLayout, device: torch.device | str | None) -> None:
        """Replace the float weight by empty tensors of the layout's shapes."""
        self.layout, self.weight_shape, self.clock = layout, tuple(self.weight.shape), ()
        self.residency, self.bias_made = Residency(self), layout.bias and self.bias is None
        self.handle = handle_of(self)
        dtype = self.weight.dtype
        if layout.bias != (self.bias is not None):
            self.bias = nn.Parameter(torch.empty(self.weight_shape[0], device=device, dtype=dtype)) if layout.bias else None
        if self.bias is not None:
            self.bias.requires_grad_(False)
        weight = torch.empty(*codes_shape(self.weight_shape, layout.weight), dtype=codes_dtype(layout.weight), device=device)
        del self._parameters["weight"]  # after the bias: diffusers reads a block's dtype off its first parameter
        self.weight = nn.Parameter(weight, requires_grad=False)
        for name, (shape, kind) in buffer_shapes(self.weight_shape, layout, self._channels()).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CHAINED:
            self.__dict__["_chains"] = {}
        super().__setattr__(name, value)

    def fill(self, tensors: LayerTensors) -> None:
        """Take over computed tensors; shapes must be those of the layout."""
        self.residency.forget()
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

    # --- what is stored ---------------------------------------------------------------------------------------------------------

    @property
    def operands(self) -> Operands:
        """This layer as kernels see it."""
        shift, scale = (getattr(self, name, None) for name in ("pre_quant_shift", "pre_quant_scale"))
        return Operands(self.packed, self.bias, self._input_quant(), shift, scale, self.layout.rotate, self.window, mixes_of(self))

    @property
    def features(self) -> frozenset[str]:
        """Names of everything the layer uses beside a weight and a bias: what graphs must take to compute it."""
        return self.operands.features | self.layout.features

    def _input_quant(self) -> InputQuant | None:
        layout = self.layout.input
        if layout is None:
            return None
        fmt, grain = number_format(layout, getattr(self, "input_levels", None)), layout.grain(self.channel_axis)
        if layout.dynamic:
            return InputQuant(fmt, grain, rule=layout.spec(self.channel_axis))
        return InputQuant(fmt, grain, self.input_scale, getattr(self, "input_zero_point", None))

    @property
    def window(self) -> Window | None:
        """How a convolution slides; None for a linear layer."""
        return None

    @property
    def packed(self) -> PackedWeight:
        """The weight with its quantizer, dense: weights that were removed are zeros."""
        quantizer, layout = self._weight_quantizer(), self.layout.weight
        codes = dense_codes(self.codes, quantizer, layout, (self.weight_shape[0], math.prod(self.weight_shape[1:])))
        return PackedWeight(codes, quantizer, self.weight_shape, self.weight_scale if layout.scale == "float" else None)

    def _weight_quantizer(self) -> Quantizer:
        layout, zero = self.layout.weight, getattr(self, "weight_zero_point", None)
        fmt = number_format(layout, getattr(self, "weight_levels", None))
        whole = getattr(self, "weight_scale_2", None)
        scale = read_scales(layout.scale, self.weight_scale, whole)
        return Quantizer(fmt, layout.grain(), scale, None if zero is None else zero.float(), whole)

    @property
    def codes(self) -> Tensor:
        """The weight's codes as they are stored, wherever they are now; see :meth:`Residency.codes`."""
        return self.residency.codes()

    def stored_again(self, codes: Tensor) -> Tensor:
        """The parameter that the dense codes came from, which a kernel gives back."""
        return stored_again(PackedWeight(codes, self._weight_quantizer(), self.weight_shape), self.layout.weight)

    def branch_tensors(self, branch: Branch) -> dict[str, Tensor]:
        """The tensors of one branch, by name."""
        return {name: self._buffers[name] for name in branch.tensors(self.weight_shape)}  # type: ignore[misc]

    # --- as floats --------------------------------------------------------------------------------------------------------------

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What a float layer would hold; see :func:`reelquant.nn.as_floats.weight_of`."""
        return as_floats.weight_of(self).to(dtype)

    def float_bias(self) -> Tensor | None:
        """The bias that belongs to :meth:`dequantized_weight`; see :func:`reelquant.nn.as_floats.bias_of`."""
        return as_floats.bias_of(self)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of this shape, given that of the output; see :func:`reelquant.nn.as_floats.input_gradient`."""
        return as_floats.input_gradient(self, gradient, shape)

    # --- running ----------------------------------------------------------------------------------------------------------------

    def follow(self, clock: Clock | None, name: str) -> None:
        """Take step and bits from this clock, or from none; it knows the layer by its name in the denoiser."""
        self.clock, self.bits_group = ((), 0) if clock is None else ((clock,), clock.group_of(name))

    @property
    def kernel(self) -> Kernel:
        """What computes this layer on the device it lies on."""
        return self.selected[0]

    @property
    def selected(self) -> tuple[Kernel, dict[str, str]]:
        """The kernel, and why each better one of this device refused the layer; or what computes it in the graph of its denoiser."""
        return self.runtime_kernel or self.residency.selected()

    @property
    def simulated(self) -> bool:
        """Whether float arithmetic stands in for the low-bit arithmetic of the recipe."""
        return self.layout.input is not None and (bool(self.layout.bands) or not self.kernel.low_bit)

    def prepare(self) -> Prepared:
        """Choose a kernel and let it repack the weight; see :meth:`Residency.prepare`."""
        return self.residency.prepare()

    def release(self) -> None:
        """Take the weight back from the kernel; see :meth:`Residency.release`."""
        self.residency.release()

    def forward(self, input: Tensor) -> Tensor:
        return self.activated(input, "")

    def activated(self, input: Tensor, activation: str) -> Tensor:
        """The output, with an activation of :data:`reelquant.kernels.activations.ACTIVATIONS` applied to it; empty for none."""
        if torch.compiler.is_compiling():
            return call(self.handle, input, self.clock, activation)
        if is_tracing():
            return trace_opaque(self.handle, input)
        moment = self.clock[0].now(self.bits_group) if self.clock else self._without_clock()
        return self._chain("eager", input, moment)(input, moment, activation)

    def compute(self, input: Tensor, moment: Moment, activation: str = "") -> Tensor:
        """The output at a given moment, as compiled graphs call the layer: no output of an earlier step is reused."""
        if not self.clock:
            self._without_clock()
        return self._chain("compiled", input, moment)(input, moment, activation)

    def _without_clock(self) -> Moment:
        if self.layout.slots > 1:
            raise UnsupportedError("a layer with per-step scales needs the clock of its denoiser; load it with reelquant.load")
        return NO_MOMENT

    def _chain(self, mode: Mode, input: Tensor, moment: Moment) -> Chain:
        """The links of this layer, assembled in the first call after something changed that they depend on."""
        if input.requires_grad and torch.is_grad_enabled():
            mode = "training"
        kind = CallKind(mode, moment.widths)
        if (chain := self._chains.get(kind)) is None:
            chain = self._chains[kind] = assemble(self, kind)
        return chain

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
        state = {"_parameters": parameters, "residency": None, "_chains": {}}
        new.__setstate__(copy.deepcopy(self.__dict__ | state, memo))
        new.residency, new.handle = Residency(new), handle_of(new)
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
        facts = getattr(destination, "_metadata", {}).get(prefix[:-1], {})  # float layers that get these tensors read it
        facts[DESCRIPTION] = {"layout": self.layout.to_json(), "shape": list(self.weight_shape), "layer": self.handle}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        inputs = self.layout.input
        return f"{super().extra_repr()}, weight={self.layout.weight.format}, input={inputs.format if inputs else 'float'}"
