"""Rules x layers -> a table: what every layer becomes, or why it stays."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from reelquant._errors import RecipeError, UnsupportedError
from reelquant.formats import QuantSpec
from reelquant.nn import get_module, prepares_input, quantized_class
from reelquant.recipes.recipe import Recipe, Rule, TensorRecipe
from reelquant.sites import DenoiserMap, Layer, matches, select
from reelquant.solvers import Solver


@dataclass(frozen=True)
class LayerPlan:
    """One row of the table.

    Attributes:
        layer: what discovery knows.
        kept: why the layer stays float, or None.
        weight, input: specs of a quantized layer; ``input`` None means float inputs.
        steps: indices of the recipe's steps that apply.
        bytes_before, bytes_after: weight storage in float32 and an estimate of the packed size.
    """

    layer: Layer
    kept: str | None
    weight: QuantSpec | None = None
    input: QuantSpec | None = None
    steps: tuple[int, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0


@dataclass(frozen=True)
class Plan:
    """What a recipe does to a denoiser, before anything is done."""

    recipe: Recipe
    map: DenoiserMap
    layers: dict[str, LayerPlan]

    @property
    def unseen(self) -> bool:
        """True if ranges are extended to what later clips may reach."""
        return self.recipe.calibrate is not None and self.recipe.calibrate.ranges == "unseen"

    @property
    def quantized(self) -> list[LayerPlan]:
        return [row for row in self.layers.values() if row.kept is None]

    @property
    def kept(self) -> list[LayerPlan]:
        return [row for row in self.layers.values() if row.kept is not None]


def make_plan(recipe: Recipe, map_: DenoiserMap, denoiser: nn.Module, skip: Sequence[str] = ()) -> Plan:
    """Apply a recipe's rules, and user patterns ``skip`` on top of them, to every layer.

    What the user's patterns name may lie in another component, so whoever knows all components checks them.

    Raises:
        SiteError: if a pattern of the recipe that names layers matches none.
        RecipeError: if nothing at all would be quantized.
        UnsupportedError: if a spec cannot be computed for a layer (found here, before calibration).
    """
    for pattern in (*(rule.on for rule in recipe.rules if rule.on), *(step.on for step in recipe.steps)):
        select(pattern, map_.layers.values())
    own = _model_keeps(recipe, denoiser)
    rows = {layer.name: _row(recipe, layer, get_module(denoiser, layer.name), skip, own) for layer in map_.layers.values()}
    plan = Plan(recipe, map_, rows)
    if not plan.quantized:
        reasons = sorted({row.kept or "" for row in plan.kept})
        raise RecipeError(
            f"recipe '{recipe.name}' quantizes none of the {len(rows)} layers of {map_.cls}; they stay because: {'; '.join(reasons)}"
        )
    return plan


def _model_keeps(recipe: Recipe, model: nn.Module) -> dict[str, str]:
    """Layers that the model itself wants in float, and why. What it keeps in float32 only counts where no data can show otherwise."""
    kept = {layer: f"shares its weight with '{other}'" for layer, other in _shared_weights(model).items()}
    if recipe.data_free:
        words = {word for kind in _FLOAT32 for word in _words(getattr(model, kind, None))}
        kept |= {name: "the model keeps it in float32" for name, _ in model.named_modules() if words & set(name.split("."))}
    return kept


_FLOAT32 = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")


def _words(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """Modules of which another one uses the weight: embeddings and output heads."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    pairs = [(one, other) for names in owners.values() for one, other in itertools.pairwise(names)]
    pairs += (getattr(model, "all_tied_weights_keys", None) or {}).items()  # transformers ties them after loading
    return {a.rpartition(".")[0]: b.rpartition(".")[0] for one, other in pairs for a, b in ((one, other), (other, one))}


def _row(recipe: Recipe, layer: Layer, module: nn.Module, skip: Sequence[str], own: Mapping[str, str]) -> LayerPlan:
    before = sum(p.numel() * 4 for p in module.parameters(recurse=False))
    reason = _kept(recipe.rules, layer, module, skip, own)
    if reason is None and not recipe.data_free and prepares_input(module):
        reason = "it changes its input before it multiplies, so calibration does not see what would be rounded"
    if reason is not None:
        return LayerPlan(layer, reason, bytes_before=before, bytes_after=before)
    weight, inputs = recipe.defaults.weight, recipe.defaults.input
    for rule in _hits(recipe.rules, layer):
        weight = rule.weight or weight
        inputs = rule.input if "input" in rule.model_fields_set else inputs
    steps = tuple(number for number, step in enumerate(recipe.steps) if matches(step.on, layer))
    specs = weight.spec(), _input_spec(recipe, inputs, layer)
    _check(recipe, layer, specs, steps)
    return LayerPlan(layer, None, *specs, steps, before, _estimate(specs[0], layer, module))


def _input_spec(recipe: Recipe, inputs: TensorRecipe | None, layer: Layer) -> QuantSpec | None:
    if inputs is None:
        return None
    if recipe.data_free and not inputs.dynamic:
        raise RecipeError(
            f"recipe '{recipe.name}' has no calibration, so static inputs of '{layer.name}' cannot be ranged; set dynamic: true"
        )
    return inputs.spec(layer.channel_axis)


def _hits(rules: Sequence[Rule], layer: Layer) -> list[Rule]:
    return [rule for rule in rules if matches(rule.on, layer)]


def _kept(rules: Sequence[Rule], layer: Layer, module: nn.Module, skip: Sequence[str], own: Mapping[str, str]) -> str | None:
    """Why a layer stays float: the user, the model, the recipe, or a fact about the layer."""
    for pattern in skip:
        if matches(pattern, layer):
            return f"skipped by you ({pattern})"
    if layer.name in own:
        return own[layer.name]
    verdict: str | None = None
    for rule in _hits(rules, layer):
        if rule.keep is not None:
            verdict = (rule.because or f"kept by rule '{rule.on}'") if rule.keep else None
    if verdict is None and layer.order < 0:
        return "never called by the sampler"
    if verdict is None and not _supported(module):
        return f"{type(module).__name__} has no quantized form"
    return verdict


def _supported(module: nn.Module) -> bool:
    plain = getattr(module, "groups", 1) == 1 and getattr(module, "padding_mode", "zeros") == "zeros"
    return plain and quantized_class(module) is not None


def _check(recipe: Recipe, layer: Layer, specs: tuple[QuantSpec, QuantSpec | None], steps: tuple[int, ...]) -> None:
    for number in steps:
        for options in recipe.steps[number].choices():
            mechanism = recipe.steps[number].mechanism(options)
            problem = mechanism.supports(specs[0]) if isinstance(mechanism, Solver) else None
            if problem:
                raise UnsupportedError(f"layer '{layer.name}': {problem}")
    solving = [number for number in steps if recipe.steps[number].solve]
    if len(solving) > 1:
        raise RecipeError(f"layer '{layer.name}' is solved twice, by steps {solving} of '{recipe.name}'; narrow the 'on' of one")
    problem = _weight_problem(specs[0]) or (None if specs[1] is None else _input_problem(specs[1], layer))
    if problem:
        raise UnsupportedError(f"layer '{layer.name}': {problem}")


def _weight_problem(spec: QuantSpec) -> str | None:
    if spec.granularity.kind in ("token", "frame"):
        return f"a weight has no {spec.granularity.kind}s; use tensor, channel or group-n"
    if spec.dynamic or spec.slots != "shared":
        return "a weight is the same at every step and in every call; drop 'dynamic' and 'slots'"
    return None


def _input_problem(spec: QuantSpec, layer: Layer) -> str | None:
    kind, sampled = spec.granularity.kind, spec.range.needs_samples or bool(spec.alternatives)
    if kind == "group":
        return "inputs cannot be scaled by group; use tensor, channel, token or frame-n"
    if kind == "token" and not spec.dynamic:
        return "per-token scales are found at run time; add dynamic: true"
    if spec.dynamic and spec.slots != "shared":
        return "dynamic scales follow every call by themselves; drop 'slots'"
    if spec.dynamic and (spec.alternatives or spec.range != type(spec.range)()):
        return "a range that is found at run time takes one format and the rule's own parameters"
    if sampled and not spec.dynamic and (spec.slots != "shared" or kind == "frame" or (kind == "channel" and layer.role != "temporal")):
        return f"a choice of formats and range rules that look at samples work per tensor with shared slots, got {spec}; use range: minmax"
    return None


def _estimate(spec: QuantSpec, layer: Layer, module: nn.Module) -> int:
    width = 1
    for size in layer.shape[1:]:
        width *= size
    units = {"tensor": 1, "channel": layer.shape[0], "group": layer.shape[0] * -(-width // max(spec.granularity.size, 1))}
    scales = units[spec.granularity.kind] * spec.granularity.scale_dtype.itemsize
    bias = 0 if getattr(module, "bias", None) is None else layer.shape[0] * 4
    return layer.shape[0] * -(-width * spec.format.bits // 8) + scales + bias
