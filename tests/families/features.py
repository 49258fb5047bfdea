"""What layers can be beside packed weights, one data-free recipe a feature, for the check ``features`` of the matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from reelquant.nn import QuantLayer, attention_facts, quantized_layers

ENDS = {"on": "role:entry | role:exit", "keep": True}
INT8 = {"format": "int8", "granularity": "channel"}
TOKEN = {"format": "int8", "granularity": "token", "dynamic": True}
SAMPLE = {"on": "class:Conv2d | class:Conv3d", "input": {"format": "int8", "granularity": "sample", "dynamic": True}}
ROTATION = {"transform": "rotate", "signs": True, "always": True, "on": "role:main"}
GROUPS = {"format": "e2m1", "granularity": "group-16", "scale": "e4m3"}


@dataclass(frozen=True)
class Feature:
    """A recipe, and what it leaves behind in a model.

    Attributes:
        recipe: data-free.
        used: whether a quantized model has it; some families have no layer for it.
        least: signal over error of the whole model that it has to keep, in dB.
    """

    recipe: dict[str, Any]
    used: Callable[[nn.Module], bool]
    least: float


def _recipe(name: str, weight: dict[str, Any], inputs: dict[str, Any] | None, **keys: Any) -> dict[str, Any]:
    rules = [ENDS, *keys.pop("rules", [])]
    return {"name": name, "defaults": {"weight": weight, "input": inputs}, "rules": rules, "calibrate": None} | keys


def _layers(model: nn.Module) -> Iterator[QuantLayer]:
    for name in quantized_layers(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLayer)
        yield layer


def _any(holds: Callable[[Any], Any]) -> Callable[[nn.Module], bool]:
    return lambda model: any(bool(holds(layer.layout)) for layer in _layers(model))


FEATURES: dict[str, Feature] = {
    "signed rotation": Feature(_recipe("rotated", INT8, TOKEN, rules=[SAMPLE], steps=[ROTATION]), _any(lambda one: one.mix), 15),
    "low-rank branch": Feature(
        _recipe("branch", {"format": "int4", "granularity": "group-32"}, None, steps=[{"branch": "lowrank", "rank": 4, "on": "role:main"}]),
        _any(lambda one: one.branches),
        8,
    ),
    "floats in groups": Feature(
        _recipe("nvfp4", GROUPS, GROUPS | {"dynamic": True}), _any(lambda one: one.input and one.input.scale == "e4m3"), 4
    ),
    "zero points in groups": Feature(
        _recipe(
            "affine",
            {"format": "int4", "granularity": "group-16", "scale": "e4m3"},
            {"format": "uint6", "granularity": "group-8", "dynamic": True},
        ),
        _any(lambda one: one.input and one.input.granularity == "group-8"),
        8,
    ),
    "scale per sample": Feature(
        _recipe("samples", INT8, TOKEN, rules=[SAMPLE]), _any(lambda one: one.input and one.input.granularity == "sample"), 15
    ),
    "attention in int8": Feature(
        _recipe("attention", INT8, None, attention=[{"on": "role:self | role:cross", "scores": "int8"}]),
        lambda model: bool(attention_facts(model)),
        15,
    ),
}
