"""Another ``forward`` for a module of somebody else's class, and the way back.

The module gets a class of its own, a mixin over its old class, so that ``isinstance``, names of parameters, saving and copying go on as
before. Whatever a mixin adds begins with ``reelquant_``: a module of that class may have parts of any other name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from reelquant.nn.layers import QuantLayer


class Overlay(nn.Module):
    """A mixin that :func:`lay` puts over a module's class; its ``forward`` may call ``super().forward``."""

    reelquant_below: type[nn.Module]


def lay(over: type[Overlay], module: nn.Module, **members: Any) -> None:
    """Put a mixin over a module's class; members become attributes of the new class."""
    kind = type(module)
    module.__class__ = type(over.__name__ + kind.__name__, (over, kind), {**members, "reelquant_below": kind})


def lift(over: type[Overlay], model: nn.Module) -> None:
    """Undo :func:`lay` in a whole model."""
    for module in model.modules():
        if isinstance(module, over):
            module.__class__ = module.reelquant_below


def untouched(layers: Iterable[nn.Module]) -> bool:
    """Whether nobody wraps or watches these layers: adapters and offloading do, and want every call to go through ``layer(x)``."""
    return all(isinstance(layer, QuantLayer) and unwatched(layer) for layer in layers)


def unwatched(module: nn.Module) -> bool:
    """Whether a call of this module is nobody else's business."""
    return "forward" not in vars(module) and not module._forward_pre_hooks and not module._forward_hooks
