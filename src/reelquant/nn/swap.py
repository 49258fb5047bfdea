"""Layers in and out of a model, by dotted name."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from reelquant._errors import SiteError, nearest
from reelquant.clock import NAME, Clock, attach
from reelquant.nn.layers import LAYERS, QuantLayer, float_class, own_attributes

HOOK = "_reelquant_clock_hook"


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        SiteError: with the nearest existing path.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        paths = [path for path, _ in model.named_modules() if path]
        raise SiteError(f"{type(model).__name__} has no layer '{name}'; {nearest(name, paths)}") from None


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted path in place of the one that is there; it takes over the training flag."""
    parent, _, child = name.rpartition(".")
    module.train(get_module(model, name).training)
    setattr(get_module(model, parent) if parent else model, child, module)


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Every quantized layer by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def kernels_of(model: nn.Module) -> KernelFacts:
    """What computes the quantized layers of a model on the device they lie on."""
    layers = quantized_layers(model).values()
    selected = [layer.selected for layer in layers]
    names = Counter(kernel.name for kernel, _ in selected)
    reasons = Counter(reason for _, refused in selected for reason in list(refused.values())[:1])
    return KernelFacts(dict(names.most_common()), dict(reasons.most_common()), any(layer.simulated for layer in layers))


@dataclass(frozen=True)
class KernelFacts:
    """Kernels of a model.

    Attributes:
        names: number of layers by kernel.
        refused: number of layers by the reason for which the best kernel of the device does not compute them.
        simulated: whether float arithmetic stands in for the low-bit arithmetic of a recipe anywhere.
    """

    names: dict[str, int]
    refused: dict[str, int]
    simulated: bool


def dequantized(layer: QuantLayer, dtype: torch.dtype) -> nn.Module:
    """A stock float layer with the values the quantized one stands for; its inputs are not rounded any more."""
    kind = next(kind for kind in LAYERS if isinstance(layer, kind))
    names = ("in_features", "out_features") if kind is nn.Linear else _CONV_GEOMETRY
    bias = layer.float_bias()
    new = kind(**{name: getattr(layer, name) for name in names}, bias=bias is not None, device="meta")
    new.weight = nn.Parameter(layer.dequantized_weight(dtype))
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(dtype))
    if (original := float_class(layer)) is not kind:
        new.__class__ = original
        new.__dict__ |= {name: value for name, value in own_attributes(layer, new).items() if name not in STATE}
    return new


STATE = ("layout", "weight_shape", "clock", "number", "_ready")  # what a quantized layer holds beside a float one's attributes
_CONV_GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")


def start_clock(model: nn.Module, clock: Clock, argument: str) -> None:
    """Make the clock a part of the model, tick it before every call, and show it to every quantized layer; an earlier one goes."""
    stop_clock(model)
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))  # meta: offloaded
    watch = model.register_forward_pre_hook(_watch_adapters)
    object.__setattr__(model, HOOK, (watch, attach(model, clock.to(device), argument)))
    for layer in quantized_layers(model).values():
        layer.clock = (clock,)


def stop_clock(model: nn.Module) -> None:
    """Undo :func:`start_clock`."""
    if (handles := vars(model).pop(HOOK, None)) is None:
        return
    for handle in handles:
        handle.remove()
    delattr(model, NAME)
    for layer in quantized_layers(model).values():
        layer.clock = ()


def _watch_adapters(model: nn.Module, args: object) -> None:
    """Tables hold outputs that were computed without adapters: an adapter on a layer that may feed one switches all of them off."""
    adapted = bool(getattr(model, "peft_config", None)) and any(_feeds_table(module) for module in model.modules())
    getattr(model, NAME).adapted = adapted


def _feeds_table(module: nn.Module) -> bool:
    """Whether this is an adapter around a layer with a table, or around a float linear one, which may come before such a layer."""
    base = getattr(module, "base_layer", None)
    return bool(base.layout.table) if isinstance(base, QuantLayer) else isinstance(base, nn.Linear)
