"""The map of a model from its names alone: for text encoders and VAEs, which no pipeline calls with a timestep, and for denoisers that
cannot be run on made-up inputs."""

from __future__ import annotations

from torch import nn

from reelquant.discover.lineage import channel_axis
from reelquant.discover.probe import quantizable
from reelquant.sites import DenoiserMap, Group, Layer, Role


def outline(model: nn.Module) -> DenoiserMap:
    """Layers of the repeated blocks are ``main``; those before and after them (stems, heads, ``lm_head``) are ``entry`` and ``exit``.

    A block is a member of a ``ModuleList``. In a model that has none, the first layer is the entry and the last one the exit. Layers
    have the order of the modules. The model does not run, so every layer counts as called once, and no two layers share an input.
    """
    roles = _roles(model)
    modules = quantizable(model)
    layers = {
        name: Layer(
            name=name,
            kind=type(modules[name]).__name__,
            role=role,
            depends=frozenset(),
            shape=tuple(modules[name].get_parameter("weight").shape),
            channel_axis=channel_axis(modules[name]),
            order=order,
        )
        for order, (name, role) in enumerate(roles.items())
    }
    groups = tuple(Group((name,), role) for name, role in roles.items())
    note = f"{type(model).__name__} was not run: roles come from the names of its modules"
    return DenoiserMap(
        cls=type(model).__name__,
        layers=layers,
        groups=groups,
        timestep_argument=None,
        latent_argument=None,
        prompt_argument=None,
        notes=(note,),
    )


def _roles(model: nn.Module) -> dict[str, Role]:
    names = list(quantizable(model))
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside = [any(name.startswith(prefix) for prefix in lists) for name in names]
    if not any(inside):
        inside = [0 < index < len(names) - 1 for index in range(len(names))]
    return {name: "main" if inside[i] else "entry" if any(inside[i:]) else "exit" for i, name in enumerate(names)}
