"""One layer (or one group of layers that share an input) through plan, statistics and build, without a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.observe import Call, Geometry, InputStatistics, Watched
from reelquant.recipes.build import BuiltGroup, build_group
from reelquant.recipes.plan import Plan, make_plan
from reelquant.recipes.recipe import load_recipe
from reelquant.sites import DenoiserMap, Group, Layer, Role


def one_group(model: nn.Module, names: Sequence[str], role: Role = "main", **group: Any) -> DenoiserMap:
    """A map that says: these layers of the model read one input."""
    layers = {}
    for order, name in enumerate(names):
        module = model.get_submodule(name)
        axis = -1 if isinstance(module, nn.Linear) else 1
        shape = tuple(module.get_parameter("weight").shape)
        layers[name] = Layer(name, type(module).__name__, role, frozenset({"latent"}), shape, (), axis, 1, order)
    return DenoiserMap("Model", layers, (Group(tuple(names), role, **group),))


def statistics(module: nn.Module, calls: Sequence[Tensor], *, frames: int = 1, features: bool = False) -> InputStatistics:
    """Statistics of a layer whose input at step ``i`` is ``calls[i]``."""
    geometry = Geometry.of(module)
    axis = 1 if geometry.kernel else -1
    generator = torch.Generator().manual_seed(0)
    wanted = frozenset({"gram", "rotated"} | ({"features"} if features else set()))
    role, count = "temporal" if features else "main", len(calls)
    found = InputStatistics.for_input(Watched("layer", geometry, axis, frames, role, 1, generator, wanted, count, 1))
    for step, x in enumerate(calls):
        found.update(x, Call(step))
    found.check([float(step) for step in range(len(calls))])
    return found


def plan_of(model: nn.Module, map_: DenoiserMap, weight: Any, input: Any = None, steps: Sequence[dict[str, Any]] = ()) -> Plan:
    recipe = {"name": "test", "defaults": {"weight": weight, "input": input}, "steps": list(steps)}
    return make_plan(load_recipe(recipe), map_, model)


def unrounded(built: BuiltGroup) -> BuiltGroup:
    """The same layers with float inputs: what is left of a rewrite when nothing is rounded."""
    for layer in built.layers.values():
        layer.layout = replace(layer.layout, input=None)
    return built


def build(
    model: nn.Module, names: Sequence[str], calls: Sequence[Tensor], weight: Any, input: Any = None, steps: Sequence[dict[str, Any]] = (),
    *, frames: int = 1, role: Role = "main", **group: Any,
) -> BuiltGroup:  # fmt: skip
    """The quantized replacements of a group."""
    map_ = one_group(model, names, role, **group)
    plan = plan_of(model, map_, weight, input, steps)
    seen = {name: statistics(model.get_submodule(name), calls, frames=frames, features=role == "temporal") for name in names}
    return build_group(plan, map_.groups[0], model, seen, {}, [float(step) for step in range(len(calls))])
