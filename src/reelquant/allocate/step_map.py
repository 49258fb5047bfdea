"""Layers x steps, read off a sensitivity table: the damage of each group of layers at each range of steps, in every number of bits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reelquant._errors import RecipeError
from reelquant.allocate.table import EVERY, MEASURES, Damage, LayerFacts, Measure, Part, SensitivityTable

KEYS: dict[Part, str] = {"input": "inputs", "weight": "weights"}  # of ``step_bits`` in recipes
FARTHEST = 3  # bits by which the ideal of a group is away from the mean, at most

Span = tuple[int, int]  # first and last of a range of steps


@dataclass(frozen=True, eq=False)
class StepMap:
    """Damages of rounding all inputs, or all weights, of one denoiser.

    Attributes:
        measure: how damages of single steps were found.
        choices: numbers of bits, ascending.
        spans: ranges of steps, in order.
        groups: names of layers; one group of :data:`EVERY` where layers were not told apart.
        shares: ``[groups]``, of all multiplications.
        damage: ``[groups, spans, choices]``.
        cosines: ``[spans, spans]``, between errors of the same group and bits; errors of different groups or bits are independent.
    """

    measure: Measure
    choices: tuple[int, ...]
    spans: tuple[Span, ...]
    groups: tuple[tuple[str, ...], ...]
    shares: np.ndarray
    damage: np.ndarray
    cosines: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Steps of every range."""
        return np.array([last - first + 1 for first, last in self.spans])

    def merged(self, *, layers: bool, steps: bool) -> StepMap:
        """The same map with all groups of layers as one, or all steps as one."""
        groups, shares, damage, spans, cosines = self.groups, self.shares, self.damage, self.spans, self.cosines
        if steps:
            spans = ((spans[0][0], spans[-1][1]),)
            roots = np.sqrt(damage)
            damage, cosines = np.einsum("gsc,st,gtc->gc", roots, cosines, roots)[:, None], np.eye(1)
        if layers:
            groups, shares = ((EVERY,),), shares.sum(keepdims=True)
            damage = damage.sum(0, keepdims=True)
        return StepMap(self.measure, self.choices, spans, groups, shares, damage, cosines)

    def restricted(self, least: int) -> StepMap:
        """The same map without fewer bits than these."""
        kept = [number for number, one in enumerate(self.choices) if one >= least]
        choices = tuple(self.choices[number] for number in kept)
        return StepMap(self.measure, choices, self.spans, self.groups, self.shares, self.damage[..., kept], self.cosines)


def step_map(table: SensitivityTable, component: str, measure: Measure | None, part: Part) -> StepMap:
    """The map of a table: rows of all layers together at single steps say how much damage a step does, rows of layers at ranges of steps
    how it is divided among the layers.

    Layers are put together whose damage for each multiplication is alike. A bit more takes three quarters of a damage, so with one budget
    for all the ideal bits of a layer are a constant plus half the binary logarithm of damage per multiplication; layers with the same
    rounded ideal are a group.

    Raises:
        RecipeError: if the table holds no damages of this part at single steps.
    """
    chosen, single = _by_step(table, component, measure, part)
    steps, cosines = len(table.timesteps[component]), table.together.get((component, part, chosen))
    cosines = np.eye(steps) if cosines is None else np.asarray(cosines, dtype=float)
    divided = _by_layer(table, component, part, single)
    if divided is None:
        damage = np.array([single[one] for one in single]).reshape(1, len(single), steps).swapaxes(1, 2)
        spans = tuple((step, step) for step in range(steps))
        return StepMap(chosen, tuple(single), spans, ((EVERY,),), np.ones(1), damage, cosines)
    spans, choices, by_layer = divided  # [layers, spans, choices]
    roots = np.sqrt(np.array([single[one] for one in choices]))  # [choices, steps]
    inside = [np.einsum("cs,st,ct->c", roots[:, a : b + 1], cosines[a : b + 1, a : b + 1], roots[:, a : b + 1]) for a, b in spans]
    by_layer = by_layer * (np.array(inside) / np.maximum(by_layer.sum(0), 1e-300))
    layers = table.of(component)
    groups = _alike(layers, by_layer.sum((1, 2)))
    shares = np.array([layer.products for layer in layers]) / sum(layer.products for layer in layers)
    return StepMap(
        chosen,
        choices,
        spans,
        tuple(tuple(layers[number].name for number in group) for group in groups),
        np.array([shares[group].sum() for group in groups]),
        np.array([by_layer[group].sum(0) for group in groups]),
        _between_spans(cosines, spans),
    )


def bits_of(written: str) -> int:
    """Bits of a format like ``int6/token``; 0 if it is no integer, which alone can have other bits at some steps."""
    found = re.fullmatch(r"u?int(\d)/.*", written)
    return int(found[1]) if found else 0


def _by_step(table: SensitivityTable, component: str, measure: Measure | None, part: Part) -> tuple[Measure, Mapping[int, list[float]]]:
    """How damages at single steps were measured, and bits -> damage of every step. Of several granularities, that with most bits."""
    steps = len(table.timesteps[component])
    rows = [
        row
        for row in table.rows
        if (row.component, row.layer, row.part) == (component, EVERY, part) and row.steps is not None and row.steps[0] == row.steps[1]
    ]
    measures = [one for one in MEASURES if any(row.measure == one for row in rows)]
    chosen = measure or next(iter(measures), None)
    if chosen is None or chosen not in measures:
        raise RecipeError(
            f"the table of '{table.model}' holds no damages of {KEYS[part]} at single steps"
            + (f" by '{measure}'; it has them by {', '.join(measures) or 'nothing'}" if measure else f"; measure with {KEYS[part]}")
        )
    found: dict[str, dict[int, dict[int, float]]] = {}
    for row in rows:
        if row.measure == chosen and row.steps is not None and (bits := bits_of(row.format)):
            found.setdefault(row.format.partition("/")[2], {}).setdefault(bits, {})[row.steps[0]] = max(row.high, row.damage)
    complete = [
        {bits: [one[step] for step in range(steps)] for bits, one in by_bits.items() if len(one) == steps} for by_bits in found.values()
    ]
    return chosen, _between(max(complete, key=len, default={}))


def _by_layer(
    table: SensitivityTable, component: str, part: Part, single: Mapping[int, list[float]]
) -> tuple[tuple[Span, ...], tuple[int, ...], np.ndarray] | None:
    """Ranges of steps that cover all of them, bits, and damages ``[layers, spans, bits]`` of layers there; None if the table has none."""
    layers = table.of(component)
    if not sum(layer.products for layer in layers):  # of an earlier version
        return None
    found: dict[tuple[Measure, str], dict[int, dict[tuple[str, Span], float]]] = {}
    for row in table.rows:
        if (row.component, row.part, row.half) == (component, part, None) and _is_cut(row) and (bits := bits_of(row.format)):
            assert row.steps is not None
            grain = row.format.partition("/")[2]
            found.setdefault((row.measure, grain), {}).setdefault(bits, {})[row.layer, row.steps] = row.damage
    for measure in MEASURES:
        mine = [by_bits for (one, _), by_bits in found.items() if one == measure]
        by_bits = max(mine, key=len, default={})
        spans = tuple(sorted({span for one in by_bits.values() for _, span in one}))
        wanted = [(layer.name, span) for layer in layers for span in spans]
        if spans and all(key in one for one in by_bits.values() for key in wanted) and _covers(spans, len(table.timesteps[component])):
            every = _between({bits: [one[key] for key in wanted] for bits, one in by_bits.items()})
            choices = tuple(bits for bits in every if bits in single)
            return spans, choices, np.array([every[bits] for bits in choices]).T.reshape(len(layers), len(spans), len(choices))
    return None


def _is_cut(row: Damage) -> bool:
    return row.layer != EVERY and row.steps is not None


def _covers(spans: Sequence[Span], steps: int) -> bool:
    return [step for first, last in spans for step in range(first, last + 1)] == list(range(steps))


def _between(measured: Mapping[int, list[float]]) -> Mapping[int, list[float]]:
    """The same with all numbers of bits from the fewest to the most: the logarithm of a damage falls evenly in between."""
    known = sorted(measured)
    logs = np.log(np.maximum(np.array([measured[one] for one in known]), 1e-300))  # [bits, columns]
    every = range(known[0], known[-1] + 1) if known else ()
    return {bits: [float(np.exp(np.interp(bits, known, column))) for column in logs.T] for bits in every}


def _alike(layers: Sequence[LayerFacts], damage: np.ndarray) -> list[list[int]]:
    """Numbers of layers by the rounded ideal of their bits, relative to the mean over multiplications."""
    products = np.array([layer.products for layer in layers])
    known = (products > 0) & (damage > 0)
    ideal = 0.5 * np.log2(np.where(known, damage, 1.0) / np.where(known, products, 1.0))
    mean = np.average(ideal[known], weights=products[known]) if known.any() else 0.0
    rounded = np.where(known, (ideal - mean).round().clip(-FARTHEST, FARTHEST), -FARTHEST).astype(int).tolist()
    return [[number for number, one in enumerate(rounded) if one == wanted] for wanted in sorted(set(rounded))]


def _between_spans(cosines: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Cosines between sums of errors over ranges of steps, errors of equal size."""
    sums = np.array([[cosines[a : b + 1, c : d + 1].sum() for c, d in spans] for a, b in spans])
    sizes = np.sqrt(np.maximum(np.diagonal(sums), 1e-300))
    return (sums / np.outer(sizes, sizes)).clip(-1, 1)
