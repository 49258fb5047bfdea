"""Calls of ``module.forward(...)`` become calls of ``module(...)``, which hooks see.

Research code calls ``self.forward`` in methods beside it (``forward_with_cfg`` of DiT and Latte), so a clock would not tick. The module's
class becomes a subclass of the same name; signature, ``isinstance``, saving and copying work as before.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from torch import nn

_threads = threading.local()


def _running() -> set[int]:
    """Modules of this thread whose call has not reached their forward yet."""
    if not hasattr(_threads, "modules"):
        _threads.modules = set()
    return _threads.modules


@functools.cache
def _routed_class(kind: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) not in _running():
            vars(self)["reelquant_direct"] = True
            return self(*args, **kwargs)
        _running().discard(id(self))
        return kind.forward(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _running().add(id(self))
        try:
            return kind.__call__(self, *args, **kwargs)
        finally:
            _running().discard(id(self))

    def reduce(self: Any, protocol: Any) -> Any:
        """Generated classes have no importable name."""
        _, _, *state = kind.__reduce_ex__(self, protocol)
        return _blank, (kind,), *state

    members = {"forward": forward, "__call__": call, "__reduce_ex__": reduce, "__module__": kind.__module__, "reelquant_unrouted": kind}
    return type(kind.__name__, (kind,), members)


def _blank(kind: type[nn.Module]) -> nn.Module:
    """A module without its state."""
    routed = _routed_class(kind)
    return routed.__new__(routed)


def routed(module: nn.Module) -> bool:
    """Whether :func:`route` was called for the module."""
    return hasattr(type(module), "reelquant_unrouted")


def route(module: nn.Module) -> None:
    """From now on ``module.forward(...)`` is ``module(...)``; twice is once."""
    if not routed(module):
        module.__class__ = _routed_class(type(module))


def keep_if_used(module: nn.Module) -> None:
    """Undo :func:`route` unless other code has called ``module.forward``."""
    if routed(module) and not vars(module).get("reelquant_direct"):
        module.__class__ = type(module).reelquant_unrouted
