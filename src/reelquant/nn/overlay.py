"""Another ``forward`` for a module of somebody else's class, and the way back.

The module gets another class, a mixin over its old one, so that ``isinstance``, names of parameters, saving and copying go on as
before. Whatever a mixin adds begins with ``reelquant_``: a module of that class may have parts of any other name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

from reelquant.nn.graph import outlined
from reelquant.nn.layers import QuantLayer


class Overlay(nn.Module):
    """A mixin that :func:`lay` puts over a module's class; its ``forward`` may call ``super().forward``."""

    reelquant_over: type[Overlay]
    reelquant_below: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle cannot name the class; with both that it is made of, it gets to a quantized layer, which says why it is refused."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _blank, (self.reelquant_over, self.reelquant_below), *state


@functools.cache
def _laid(over: type[Overlay], kind: type[nn.Module]) -> type[nn.Module]:
    return type(over.__name__ + kind.__name__, (over, kind), {"reelquant_over": over, "reelquant_below": kind})


def _blank(over: type[Overlay], kind: type[nn.Module]) -> nn.Module:
    """A module without its state."""
    laid = _laid(over, kind)
    return laid.__new__(laid)


def lay(over: type[Overlay], module: nn.Module, **members: Any) -> None:
    """Put a mixin over a module's class, and its attributes into the module."""
    module.__class__ = _laid(over, type(module))
    vars(module).update(members)


def lift(over: type[Overlay], model: nn.Module) -> None:
    """Undo :func:`lay` in a whole model."""
    for module in model.modules():
        if isinstance(module, over):
            module.__class__ = module.reelquant_below
            for name in over.__annotations__:
                vars(module).pop(name, None)


def untouched(layers: Iterable[nn.Module]) -> bool:
    """Whether nobody wraps or watches these layers: adapters, offloading and traces do, and want every call to go through ``layer(x)``."""
    return not outlined() and all(isinstance(layer, QuantLayer) and unwatched(layer) for layer in layers)


def unwatched(module: nn.Module) -> bool:
    """Whether a call of this module is nobody else's business."""
    return "forward" not in vars(module) and not module._forward_pre_hooks and not module._forward_hooks
