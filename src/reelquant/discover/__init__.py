"""What a denoiser is made of, observed by running it a few times on tiny inputs. Statistics of real inputs do not belong here
(:mod:`reelquant.observe`).

    from reelquant.discover import denoiser_of, discover
    name, denoiser = denoiser_of(pipeline)
    map = discover(denoiser)

Nothing is listed by layer name or by model class (see ``docs/design.md``, "discover, don't hand-write"). One file per question:
``arguments`` (what an argument means), ``learned`` (what calls tell of it where its name does not), ``inputs`` (tiny inputs), ``probe``
(runs that leave no trace), ``roles``, ``lineage`` (which tensor came from where), ``groups``, ``sources``
(whose channels a group reads), ``heads`` (which of these are the values of attention), ``blocks``, ``components`` (the denoiser of a
pipeline), ``stand_in`` (a model to run before its weights are there), ``outline`` (the map of a model that cannot be run).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from reelquant._errors import UnsupportedError
from reelquant.discover.arguments import argument_of, bind, kinds, own_kinds
from reelquant.discover.blocks import called_apart, find_blocks, last_parts
from reelquant.discover.components import (
    TIMED,
    component_of,
    denoiser_of,
    denoisers_of,
    denoises,
    kind_of_component,
    modules_of,
    plain,
    takes_timestep,
)
from reelquant.discover.groups import find_groups
from reelquant.discover.heads import with_heads
from reelquant.discover.inputs import dummy_inputs
from reelquant.discover.lineage import Trace, channel_axis, trace
from reelquant.discover.outline import outline
from reelquant.discover.probe import quantizable, steady
from reelquant.discover.roles import dependencies, role_of
from reelquant.discover.sources import with_sources
from reelquant.discover.stand_in import stand_in
from reelquant.nn import get_module
from reelquant.sites import AttentionSite, DenoiserMap, Layer, Role

__all__ = [
    "TIMED",
    "bind",
    "component_of",
    "denoiser_of",
    "denoisers_of",
    "denoises",
    "discover",
    "discover_or_outline",
    "dummy_inputs",
    "kind_of_component",
    "modules_of",
    "outline",
    "stand_in",
    "takes_timestep",
]

logger = logging.getLogger(__name__)


def discover(denoiser: nn.Module, inputs: dict[str, Any] | None = None) -> DenoiserMap:
    """The map of a denoiser: roles, groups, blocks and the names of its arguments.

    Runs the denoiser about a dozen times. It is left exactly as it was: parameters, buffers, training flags, hooks and random state.

    Args:
        denoiser: a diffusers denoiser, in float32, bfloat16 or float16, anywhere.
        inputs: keyword arguments of one recorded call (see :func:`bind` for calls with positional arguments). Without them tiny
            random ones are made up by :func:`dummy_inputs`.

    Raises:
        UnsupportedError: if it cannot be probed: which argument, what was tried, what would work.
    """
    denoiser = plain(denoiser)
    inputs = dummy_inputs(denoiser) if inputs is None else bind(denoiser, (), inputs)
    found = kinds(inputs, own_kinds(denoiser))
    with steady(denoiser):
        depends = dependencies(denoiser, inputs, found)
        main = {name for name, its in depends.items() if "latent" in its}
        traced = trace(denoiser, inputs, main)
        layers = _layers(denoiser, depends, traced)
        groups = with_sources(denoiser, inputs, find_groups(denoiser, layers, traced), layers, traced)
        layers = with_heads(denoiser, inputs, groups, layers, traced)
    blocks = find_blocks(denoiser, layers)
    ends = tuple(f"{part}." for part in last_parts(denoiser, blocks, layers))
    end = tuple(f"{block}." for block in blocks[-1:])
    layers = {name: replace(layer, last=name.startswith(ends), end=name.startswith(end)) for name, layer in layers.items()}
    return DenoiserMap(
        cls=type(denoiser).__name__,
        layers=layers,
        groups=groups,
        blocks=blocks,
        timestep_argument=argument_of(found, "timestep"),
        latent_argument=argument_of(found, "latent"),
        prompt_argument=argument_of(found, "prompt"),
        notes=_notes(layers),
        apart=called_apart(blocks, traced.callers),
        attention=_attention(denoiser, traced),
    )


def discover_or_outline(denoiser: nn.Module, like: Callable[[nn.Module], nn.Module] = lambda denoiser: denoiser) -> DenoiserMap:
    """The map of a denoiser, or an outline of it, with a warning, if tiny inputs cannot be made up: enough for recipes without data.

    Args:
        like: what is run in its place, for denoisers without weights.
    """
    try:
        return discover(like(denoiser))
    except UnsupportedError as error:
        logger.warning("roles of the layers of %s are told by their names only: %s", type(denoiser).__name__, error)
        return outline(denoiser)


def _attention(denoiser: nn.Module, traced: Trace) -> tuple[AttentionSite, ...]:
    """Modules that ask for attention, and whose keys they ask with."""
    return tuple(
        AttentionSite(name, type(get_module(denoiser, name)).__name__, "self" if own else "cross") for name, own in traced.attention.items()
    )


def _layers(denoiser: nn.Module, depends: dict[str, frozenset[str]], traced: Trace) -> dict[str, Layer]:
    """Every layer in execution order, those that never ran at the end."""
    roles = _roles(depends, traced)
    modules = quantizable(denoiser)
    found: dict[str, Layer] = {}
    for order, name in enumerate([*traced.reads, *(name for name in modules if name not in traced.reads)]):
        reads = traced.reads.get(name, [])
        found[name] = Layer(
            name=name,
            kind=type(modules[name]).__name__,
            role=roles.get(name, "constant"),
            depends=depends.get(name, frozenset()),
            shape=tuple(modules[name].get_parameter("weight").shape),
            input_shape=reads[0].shape if reads else (),
            channel_axis=channel_axis(modules[name]),
            calls=len(reads),
            order=order if reads else -1,
        )
    return found


def _roles(depends: dict[str, frozenset[str]], traced: Trace) -> dict[str, Role]:
    """Roles by dependency, then the ends: entries read the latent before any main layer did, exits are the last to reach the output."""
    roles: dict[str, Role] = {name: role_of(its) for name, its in depends.items()}
    order = list(traced.reads)
    main = [name for name in order if roles[name] == "main"]
    exits = {order[last] for last in traced.last if last >= 0} or {main[-1]}
    entries = {name for name in main if traced.reads[name][0].after < 0} or {main[0]}
    for name in roles:
        roles[name] = "entry" if name in entries else "exit" if name in exits else roles[name]
    return roles


def _notes(layers: dict[str, Layer]) -> tuple[str, ...]:
    idle = [layer.name for layer in layers.values() if not layer.calls]
    mixed = [layer.name for layer in layers.values() if layer.role == "temporal" and layer.depends != {"timestep"}]
    told = {
        f"{len(idle)} layers never ran in the probing call, first '{idle[0]}'" if idle else "",
        f"{len(mixed)} temporal layers also depend on the conditioning, first '{mixed[0]}': no table over the steps alone" if mixed else "",
    }
    return tuple(sorted(told - {""}))
