"""Give a module of another library a new ``forward``, and take it back.

The module's class becomes a subclass of a mixin and its old class, so ``isinstance``, parameter names, saving and copying work as before.
Every attribute that a mixin adds begins with ``reelquant_``, so it cannot collide with a submodule.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

from reelquant.nn.around.graph import is_tracing
from reelquant.nn.layers import QuantLayer


class ClassPatch(nn.Module):
    """A mixin that :func:`patch` puts over a module's class; its ``forward`` may call ``super().forward``."""

    reelquant_patch: type[ClassPatch]
    reelquant_below: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Generated classes have no importable name. Rebuild from the bases, so pickling reaches a quantized layer, which raises the real
        error."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _blank, (self.reelquant_patch, self.reelquant_below), *state


@functools.cache
def _patched_class(mixin: type[ClassPatch], kind: type[nn.Module]) -> type[nn.Module]:
    return type(mixin.__name__ + kind.__name__, (mixin, kind), {"reelquant_patch": mixin, "reelquant_below": kind})


def _blank(mixin: type[ClassPatch], kind: type[nn.Module]) -> nn.Module:
    """A module without its state."""
    patched = _patched_class(mixin, kind)
    return patched.__new__(patched)


def patch(mixin: type[ClassPatch], module: nn.Module, **members: Any) -> None:
    """Put a mixin over a module's class, and its attributes into the module."""
    module.__class__ = _patched_class(mixin, type(module))
    vars(module).update(members)


def unpatch(mixin: type[ClassPatch], model: nn.Module) -> None:
    """Undo :func:`patch` in a whole model."""
    for module in model.modules():
        if isinstance(module, mixin):
            module.__class__ = module.reelquant_below
            for name in mixin.__annotations__:
                vars(module).pop(name, None)


def untouched(layers: Iterable[nn.Module]) -> bool:
    """True if no hook or wrapper of these layers would miss a call: adapters, offloading and traces want every call as ``layer(x)``."""
    return not is_tracing() and all(isinstance(layer, QuantLayer) and unwatched(layer) for layer in layers)


def unwatched(module: nn.Module) -> bool:
    """True if no hook or wrapper would observe a call of this module."""
    return "forward" not in vars(module) and not module._forward_pre_hooks and not module._forward_hooks
