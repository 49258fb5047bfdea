"""Rules and stages x layers -> a table: what every layer becomes, or why it is skipped."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from reelquant._errors import RecipeError, UnsupportedError, printable
from reelquant._markup import table
from reelquant._numbers import size
from reelquant.engine.checks import input_problem, weight_problem
from reelquant.formats import QuantSpec
from reelquant.nn import get_module, quantized_class
from reelquant.recipes.entry import Entry
from reelquant.recipes.recipe import Recipe, Rule, TensorRecipe
from reelquant.sites import DenoiserMap, Layer, matches, select
from reelquant.stages import Specs, StageSite

ALWAYS = frozenset({"range", "rows", "features"})
"""Statistics that the engine itself uses for scales, errors and figures of temporal layers."""


@dataclass(frozen=True)
class LayerPlan:
    """One row of the table.

    Attributes:
        layer: what discovery knows.
        skipped: why the layer stays float, or None.
        specs: numbers of a quantized layer; None if it is skipped.
        entries: the stages that touch it, in recipe order.
        bytes_before, bytes_after: weight storage in float32 and an estimate of the packed size.
    """

    layer: Layer
    skipped: str | None
    specs: Specs | None = None
    entries: tuple[Entry, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def weight(self) -> QuantSpec | None:
        """Numbers of the weight; None if the layer is skipped."""
        return self.specs and self.specs.weight

    @property
    def input(self) -> QuantSpec | None:
        """Numbers of the input; None if it stays float."""
        return self.specs and self.specs.input

    @property
    def site(self) -> StageSite:
        """The layer after all of its stages."""
        return self.site_before(len(self.entries))

    def site_before(self, number: int) -> StageSite:
        """The layer as the stage of this number meets it."""
        assert self.specs is not None
        return StageSite(self.layer, self.specs, tuple(entry.stage for entry in self.entries[:number]))

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that have to be observed of its input."""
        return ALWAYS.union(*(entry.stage.needs(self.site_before(number)) for number, entry in enumerate(self.entries)))

    def with_specs(self, specs: Specs) -> LayerPlan:
        """The same layer with other numbers."""
        row = replace(self, specs=specs)
        return replace(row, bytes_after=estimated_bytes(specs.weight, self.layer.shape) + row.bytes_beside)

    @property
    def bytes_beside(self) -> int:
        """Bytes of what it stores beside codes and scales of its weight: a float32 bias, and what its stages add."""
        bias = 4 * self.layer.shape[0] if self._bias else 0
        return bias + sum(entry.stage.stored_bytes(self.site) for entry in self.entries)

    @property
    def _bias(self) -> bool:
        return self.bytes_before > 4 * math.prod(self.layer.shape)


@dataclass(frozen=True, repr=False)
class Plan:
    """What a recipe does to a denoiser, before anything is done.

    Attributes:
        recipe: the recipe.
        map: the denoiser.
        layers: a row per layer, by name.
        entries: every stage of the recipe.
    """

    recipe: Recipe
    map: DenoiserMap
    layers: dict[str, LayerPlan]
    entries: tuple[Entry, ...] = ()

    def __repr__(self) -> str:
        return printable(f"Plan({self._title})")

    def _repr_html_(self) -> str:
        """What a notebook shows: how many layers get which numbers, and why others stay float."""
        numbers = Counter(self._words(row) for row in self.layers.values())
        return table(self._title, [(*words, count) for words, count in numbers.items()], ("weight", "input", "layers"))

    @property
    def _title(self) -> str:
        counted = f"{len(self.quantized)} of {len(self.layers)} layers quantized"
        before, after = (sum(getattr(row, name) for row in self.layers.values()) for name in ("bytes_before", "bytes_after"))
        return f"{self.recipe.name} on {self.map.cls}: {counted}, {size(before)} -> {size(after)} with float layers"

    @staticmethod
    def _words(row: LayerPlan) -> tuple[str, str]:
        if row.specs is None:
            return f"float: {row.skipped}", ""
        return str(row.specs.weight), str(row.specs.input or "float")

    @property
    def unseen(self) -> bool:
        """True if ranges are extended to what later clips may reach."""
        return self.recipe.calibrate is not None and self.recipe.calibrate.ranges == "unseen"

    @property
    def quantized(self) -> list[LayerPlan]:
        """Rows of the layers that are quantized."""
        return [row for row in self.layers.values() if row.skipped is None]

    @property
    def skipped(self) -> list[LayerPlan]:
        """Rows of the layers that stay float."""
        return [row for row in self.layers.values() if row.skipped is not None]

    def acting(self, hook: str) -> list[Entry]:
        """The stages that take part in a hook, in recipe order."""
        return [entry for entry in self.entries if entry.acts(hook)]

    def touched(self, entry: Entry, part: str = "") -> list[str]:
        """The quantized layers that a stage touches, or those in a part of the denoiser, in execution order."""
        rows = [row for row in self.quantized if not part or f"{row.layer.name}.".startswith(f"{part}.")]
        return [row.layer.name for row in rows if entry in row.entries]

    def parts(self, entry: Entry) -> list[str]:
        """The parts of the denoiser that a stage works on: those that hold a layer which it touches."""
        return [part for part in entry.stage.units(self.map) if self.touched(entry, part)]

    def without(self, names: Container[str], reason: str) -> Plan:
        """The plan with some more layers that stay float."""
        rows = {
            name: LayerPlan(row.layer, reason, bytes_before=row.bytes_before, bytes_after=row.bytes_before) if name in names else row
            for name, row in self.layers.items()
        }
        return replace(self, layers=rows)

    def with_specs(self, specs: Mapping[str, Specs]) -> Plan:
        """The plan with other numbers for some layers.

        Raises:
            UnsupportedError: if numbers cannot be computed for a layer.
        """
        rows = {name: row.with_specs(specs[name]) if name in specs else row for name, row in self.layers.items()}
        for name in specs:
            _check(rows[name])
        return replace(self, layers=rows)


def make_plan(recipe: Recipe, map_: DenoiserMap, denoiser: nn.Module, skip: Sequence[str] = ()) -> Plan:
    """Apply a recipe's rules and stages, and user patterns ``skip`` on top of them, to every layer.

    The patterns of ``skip`` may name layers of another component, so the caller checks that each matches somewhere.

    Raises:
        SiteError: if a pattern of the recipe that names layers matches none.
        RecipeError: if nothing at all would be quantized.
        UnsupportedError: if a spec or a stage does not fit a layer (found here, before calibration).
    """
    entries = recipe.entries
    for pattern in (*(rule.on for rule in recipe.rules if rule.on), *(entry.on for entry in entries)):
        select(pattern, map_.layers.values())
    own = _model_skips(recipe, denoiser)
    rows = {layer.name: _row(recipe, entries, layer, get_module(denoiser, layer.name), skip, own) for layer in map_.layers.values()}
    plan = Plan(recipe, map_, rows, entries)
    if not plan.quantized:
        reasons = "; ".join(sorted({row.skipped or "" for row in plan.skipped}))
        raise RecipeError(f"recipe '{recipe.name}' quantizes none of the {len(rows)} layers of {map_.cls}; they stay because: {reasons}")
    return plan


def _model_skips(recipe: Recipe, model: nn.Module) -> dict[str, str]:
    """Layers that the model itself wants in float, and why. What it keeps in float32 only counts where no data can show otherwise."""
    skipped = {layer: f"shares its weight with '{other}'" for layer, other in _shared_weights(model).items()}
    if recipe.data_free:
        words = {word for kind in _FLOAT32 for word in _words(getattr(model, kind, None))}
        float32 = [name for name, _ in model.named_modules() if words & set(name.split("."))]
        skipped |= dict.fromkeys(float32, "the model keeps it in float32")
    return skipped


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


def _row(
    recipe: Recipe,
    entries: Sequence[Entry],
    layer: Layer,
    module: nn.Module,
    skip: Sequence[str],
    own: Mapping[str, str],
) -> LayerPlan:
    before = sum(p.numel() * 4 for p in module.parameters(recurse=False))
    reason = _skip_reason(recipe.rules, layer, module, skip, own)
    if reason is not None:
        return LayerPlan(layer, reason, bytes_before=before, bytes_after=before)
    weight, inputs = recipe.defaults.weight, recipe.defaults.input
    for rule in _hits(recipe.rules, layer):
        weight = rule.weight or weight
        inputs = rule.input if "input" in rule.model_fields_set else inputs
    specs = Specs(weight.spec(), _input_spec(recipe, inputs, layer))
    row = LayerPlan(layer, None, specs, tuple(entry for entry in entries if matches(entry.on, layer)), before)
    _check(row)
    return row.with_specs(specs)


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


def _skip_reason(rules: Sequence[Rule], layer: Layer, module: nn.Module, skip: Sequence[str], own: Mapping[str, str]) -> str | None:
    """Why a layer stays float: the user, the model, the recipe, or a fact about the layer."""
    for pattern in skip:
        if matches(pattern, layer):
            return f"skipped by you ({pattern})"
    if layer.name in own:
        return own[layer.name]
    verdict: str | None = None
    for rule in _hits(rules, layer):
        if rule.skip is not None:
            verdict = (rule.because or f"skipped by rule '{rule.on}'") if rule.skip else None
    if verdict is None and layer.order < 0:
        return "never called by the sampler"
    if verdict is None and not _supported(module):
        return f"{type(module).__name__} has no quantized form"
    return verdict


def _supported(module: nn.Module) -> bool:
    plain = getattr(module, "groups", 1) == 1 and getattr(module, "padding_mode", "zeros") == "zeros"
    return plain and quantized_class(module) is not None


def _check(row: LayerPlan) -> None:
    """Ask every stage, with each of its alternatives, whether it can work on this layer after those before it."""
    name, specs = row.layer.name, row.specs
    assert specs is not None
    problem = weight_problem(specs.weight) or (specs.input and input_problem(specs.input, row.layer))
    for number, entry in enumerate(row.entries):
        site = row.site_before(number)
        problem = problem or next(filter(None, (stage.supports(site) for stage in entry.alternatives)), None)
        problem = problem or _filling(entry, row.entries[:number], site)
    if problem:
        raise UnsupportedError(f"layer '{name}': {problem}")
    axes = [entry.axis for entry in row.entries if entry.stage.exclusive]
    if twice := next((axis for axis in axes if axes.count(axis) > 1), None):
        lines = [entry.position for entry in row.entries if entry.axis == twice]
        raise RecipeError(f"layer '{name}' gets two '{twice}' steps, {lines} of the recipe; narrow the 'on' of one")


def _filling(entry: Entry, before: Sequence[Entry], site: StageSite) -> str | None:
    """Why a stage cannot follow those that leave rows or columns of the weight out, or None."""
    for other in before:
        if filled := entry.stage.fills & other.stage.leaves_out(site):
            return f"{entry.axis} '{entry.name}' fills the {' and '.join(sorted(filled))} that '{other.name}' leaves out; narrow its 'on'"
    return None


def estimated_bytes(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    """Storage of a packed weight with its scales."""
    width = math.prod(shape[1:])
    units = {"tensor": 1, "channel": shape[0], "group": shape[0] * -(-width // max(spec.granularity.size, 1))}
    scales = units[spec.granularity.kind] * spec.granularity.scale_dtype.itemsize + 4 * spec.granularity.two_levels
    return shape[0] * -(-width * spec.format.bits // 8) + scales
