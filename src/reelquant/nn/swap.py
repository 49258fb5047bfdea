"""Layers in and out of a model, by dotted name."""

from __future__ import annotations

from torch import nn

from reelquant._errors import SiteError, nearest
from reelquant.clock import Clock
from reelquant.nn.layers import QuantLayer


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


def set_clock(model: nn.Module, clock: Clock) -> None:
    """Make the clock a part of the model and show it to every quantized layer."""
    model.add_module("reelquant_clock", clock)
    for layer in quantized_layers(model).values():
        layer.clock = (clock,)
