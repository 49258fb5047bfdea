"""The map of a component that has no timestep (text encoder, VAE): which layers run, in which order, and which are the ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import nn

from reelquant.discover.lineage import channel_axis
from reelquant.discover.probe import first_tensor, quantizable
from reelquant.sites import DenoiserMap, Group, Layer, Role


def outline(module: nn.Module, run: Callable[[], Any]) -> DenoiserMap:
    """Every layer in execution order. The layers that run first and last, in the module and in each of its children (encoder and decoder
    of a VAE), are entry and exit; all others are main, each in a group of its own.

    Args:
        module: a text encoder or VAE.
        run: calls it once, every part of it.
    """
    modules = quantizable(module)
    calls: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = first_tensor(args, kwargs)
            shapes.setdefault(name, () if x is None else tuple(x.shape))
            calls.append(name)

        return hook

    with contextlib.ExitStack() as stack:
        for name, layer in modules.items():
            stack.callback(layer.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
        run()
    roles = _ends(calls, modules, (module, *module.children()))
    layers = {
        name: Layer(
            name, type(modules[name]).__name__, roles.get(name, "main"), frozenset(), tuple(modules[name].get_parameter("weight").shape),
            shapes.get(name, ()), channel_axis(modules[name]), calls.count(name), order if name in shapes else -1,
        )
        for order, name in enumerate([*shapes, *(name for name in modules if name not in shapes)])
    }  # fmt: skip
    groups = tuple(Group((name,), layers[name].role) for name in shapes)
    return DenoiserMap(type(module).__name__, layers, groups, timestep_argument=None, latent_argument=None, prompt_argument=None)


def _ends(calls: list[str], modules: dict[str, nn.Module], parts: tuple[nn.Module, ...]) -> dict[str, Role]:
    """The layers called first and last, in every part that holds more than these."""
    found: dict[str, Role] = {}
    for part in parts:
        inside = {id(layer) for layer in part.modules()}
        called = [name for name in calls if id(modules[name]) in inside]
        if len(set(called)) > 2:
            found |= {called[0]: "entry", called[-1]: "exit"}
    return found
