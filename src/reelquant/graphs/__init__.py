"""RUNTIMES: what runs a whole quantized denoiser, and ``configure``, which chooses it. How a single layer computes does not belong here.

``torch`` calls a module at a time. ``openvino`` makes one graph for CPUs: norms, rotary embeddings and gates are fused with the
operations around them, and Python calls no layer. A graph holds the codes, scales, shifts, rotations, steps and tables of the layers as
they are; nothing is estimated again.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from torch import nn

from reelquant._errors import RecipeError, UnsupportedError, nearest


def _torch(model: nn.Module) -> None:
    if find_spec("openvino") is not None:  # without it nothing can have been started
        from reelquant.graphs.runner import stop

        stop(model)


def _openvino(model: nn.Module) -> None:
    from reelquant.graphs.runner import start

    start(model)


RUNTIMES: dict[str, Callable[[nn.Module], None]] = {"torch": _torch, "openvino": _openvino}
"""Name -> what lets a model run on it."""


def check_runtime(name: str) -> None:
    """Refuse runtimes that do not exist or are not installed.

    Raises:
        RecipeError: for an unknown name, with the nearest one.
        UnsupportedError: if its package is missing, with the command that installs it.
    """
    if name not in RUNTIMES:
        raise RecipeError(f"unknown runtime '{name}'; {nearest(name, RUNTIMES)}")
    if name == "openvino" and find_spec("openvino") is None:
        raise UnsupportedError("runtime 'openvino' needs a package that is not installed: pip install 'reelquant[openvino]'")


def set_runtime(model: nn.Module, name: str) -> None:
    """Let a quantized denoiser be run by ``torch`` or as a graph of ``openvino``, from its next call on; calling it again drops the graphs.

    Raises:
        RecipeError: if there is no such runtime.
        UnsupportedError: if its package is missing, or the model cannot run on it.
    """
    check_runtime(name)
    RUNTIMES[name](model)


__all__ = ["RUNTIMES", "check_runtime", "set_runtime"]
