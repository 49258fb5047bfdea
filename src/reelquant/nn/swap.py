"""Layers in and out of a model, by dotted name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MethodType

import torch
from torch import nn

from reelquant._errors import SiteError, nearest
from reelquant.clock import NAME, Apart, Clock, Widths, attach
from reelquant.nn.extended import float_class, own_attributes
from reelquant.nn.layer_classes import LAYERS
from reelquant.nn.layers import QuantLayer

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
    return KernelFacts.of(layer_facts(layer) for layer in layers)


def layer_facts(layer: QuantLayer) -> tuple[str, str | None, bool]:
    """The kernel of a layer, why the best one of the device refused it, and whether it simulates."""
    kernel, refused = layer.selected
    return kernel.name, next(iter(refused.values()), None), layer.simulated


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

    @classmethod
    def of(cls, facts: Iterable[tuple[str, str | None, bool]]) -> KernelFacts:
        """Count :func:`layer_facts`."""
        known = list(facts)
        names, reasons = Counter(name for name, _, _ in known), Counter(reason for _, reason, _ in known if reason)
        return cls(dict(names.most_common()), dict(reasons.most_common()), any(simulated for _, _, simulated in known))


def count_weights(model: nn.Module) -> None:
    """Let ``num_parameters()`` of diffusers and transformers count weights, which may be packed several to a byte."""
    model.num_parameters = MethodType(_num_parameters, model)


def count_tensors(model: nn.Module) -> None:
    """Undo :func:`count_weights`."""
    vars(model).pop("num_parameters", None)


def _num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    packed = sum(math.prod(layer.weight_shape) - layer.weight.numel() for layer in quantized_layers(model).values())
    return type(model).num_parameters(model, only_trainable, exclude_embeddings) + (0 if only_trainable else packed)


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


STATE = (
    "layout",
    "weight_shape",
    "clock",
    "bits_group",
    "handle",
    "bias_made",
    "residency",
    "_chains",
    "keeps",
    "kernels",
    "runtime_kernel",
)
"""Attributes that a quantized layer has and a float one has not."""
_CONV_GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")


def start_clock(model: nn.Module, clock: Clock, argument: str) -> None:
    """Make the clock a part of the model, tick it before every call, and show it to every quantized layer; an earlier one goes."""
    stop_clock(model)
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))  # meta: offloaded
    watch = model.register_forward_pre_hook(_watch_adapters)
    object.__setattr__(model, HOOK, (watch, attach(model, clock.to(device), argument)))
    _follow(model, clock)


def change_bits(model: nn.Module, widths: Sequence[Widths], apart: Sequence[Apart] = ()) -> None:
    """Give the steps of a model whose clock has started other bits, see :meth:`reelquant.clock.Clock.change_bits`."""
    clock = getattr(model, NAME)
    clock.change_bits(widths, apart)
    _follow(model, clock)


def stop_clock(model: nn.Module) -> None:
    """Undo :func:`start_clock`."""
    if (handles := vars(model).pop(HOOK, None)) is None:
        return
    for handle in handles:
        handle.remove()
    delattr(model, NAME)
    _follow(model, None)


def _follow(model: nn.Module, clock: Clock | None) -> None:
    for name, layer in quantized_layers(model).items():
        layer.follow(clock, name)


def _watch_adapters(model: nn.Module, args: object) -> None:
    """Tables hold outputs that were computed without adapters: an adapter on a layer that may feed one keeps them from being used."""
    adapted = bool(getattr(model, "peft_config", None)) and any(_feeds_table(module) for module in model.modules())
    getattr(model, NAME).adapted = adapted


def _feeds_table(module: nn.Module) -> bool:
    """Whether this is an adapter around a layer with a table, or around a float linear one, which may come before such a layer."""
    base = getattr(module, "base_layer", None)
    return bool(base.layout.table) if isinstance(base, QuantLayer) else isinstance(base, nn.Linear)
