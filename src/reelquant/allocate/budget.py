"""A budget of bits divided among the layers of a sensitivity table."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reelquant._errors import RecipeError, nearest
from reelquant.allocate.greedy import greedy
from reelquant.allocate.milp import solve
from reelquant.allocate.problem import Picks, Problem
from reelquant.allocate.sampled import cross_entropy
from reelquant.allocate.sizes import weight_bytes
from reelquant.allocate.surrogate import surrogate
from reelquant.allocate.table import LayerFacts, Measure, SensitivityTable

METHODS: dict[str, Callable[[Problem], Picks]] = {
    "milp": lambda problem: solve(problem.damage, problem.sizes, problem.budget),
    "greedy": greedy,
    "sampled": cross_entropy,
    "surrogate": lambda problem: surrogate(problem, 0),
}

Sizes = Mapping[tuple[str, str], Mapping[str, int]]


@dataclass(frozen=True)
class Allocation:
    """A weight format for every layer that is quantized.

    Attributes:
        formats: component -> layer -> ``FORMAT/GRANULARITY``.
        skipped: component -> layers that stay float, because the table says so.
        weights: how many weights the layers in ``formats`` have.
        nbytes: what their codes and scales take.
        damage: predicted: the sum of what the layers do alone. Layers with a fixed format that was not measured do not count.
        uniform: the best single format within the budget and what it is predicted to do; None if every one is too large.
    """

    formats: Mapping[str, Mapping[str, str]]
    skipped: Mapping[str, tuple[str, ...]]
    weights: int
    nbytes: int
    damage: float
    uniform: tuple[str, float] | None

    @property
    def bits(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.nbytes / self.weights

    def of(self, component: str | None = None) -> dict[str, str]:
        """The formats of a component by layer; of the only one if none is named.

        Raises:
            RecipeError: if there is none of that name, or several and none is named.
        """
        if component is None and len(self.formats) == 1:
            return dict(next(iter(self.formats.values())))
        if component not in self.formats:
            raise RecipeError(f"the allocation has no component '{component}'; {nearest(str(component), self.formats)}")
        return dict(self.formats[component])


def allocate(
    table: SensitivityTable,
    sizes: Sizes | None = None,
    *,
    bits: float | None = None,
    nbytes: float | None = None,
    method: str = "milp",
    measure: Measure | None = None,
    formats: Sequence[str] | None = None,
    components: Sequence[str] | None = None,
    seed: int = 0,
) -> Allocation:
    """Divide a budget among the layers of a table, all components together.

    Layers that the table's ``skip`` names stay float and take no part in the budget; those that ``fixed`` names get their format, and its
    bytes count.

    Args:
        table: what was measured.
        sizes: bytes of every format by (component, layer); by default those of codes and scales, without biases.
        bits: most stored bits per weight, mean over the quantized layers.
        nbytes: most bytes of all quantized weights, instead of ``bits``.
        method: a name of :data:`METHODS`.
        measure: which damages count; by default the most trusted ones of the table.
        formats: what layers may get; by default all weight formats that these damages are of.
        components: the denoisers; by default all.
        seed: of methods that draw.

    Raises:
        RecipeError: if the budget is missing, out of reach, or given twice, or a format or method is not known.

    Example:
        >>> table = reelquant.sensitivity("tiny-dit", "out")
        >>> allocate(table, bits=4.5).of("transformer")
        {'blocks.0.attn1.to_q': 'int4/group-64', ...}
    """
    if method not in METHODS:
        raise RecipeError(f"unknown method '{method}' of allocation; {nearest(method, METHODS)}")
    rows = table.select(measure)
    chosen = _formats(table, formats, {row.format for row in rows.values()})
    layers = [layer for name in components or table.components for layer in table.of(name)]
    quantized = [layer for layer in layers if not table.skipped(layer)]
    free = [layer for layer in quantized if table.fixed_format(layer) is None]
    fixed = {(layer.component, layer.name): fmt for layer in quantized if (fmt := table.fixed_format(layer)) is not None}

    def size(layer: LayerFacts, fmt: str) -> int:
        known = (sizes or {}).get((layer.component, layer.name), {})
        return known[fmt] if fmt in known else weight_bytes(fmt, layer.shape)

    taken = sum(size(layer, fixed[layer.component, layer.name]) for layer in quantized if (layer.component, layer.name) in fixed)
    every = np.array([[size(layer, fmt) for fmt in chosen] for layer in free], dtype=float).reshape(len(free), len(chosen))
    budget = _budget(bits, nbytes, sum(layer.weights for layer in quantized), taken, every, chosen)
    problem = Problem(_damages(table, free, chosen, measure), every, budget - taken, tried=_tried(table, free, chosen), seed=seed)
    picks = METHODS[method](problem) if free else []
    found = {(layer.component, layer.name): chosen[pick] for layer, pick in zip(free, picks, strict=True)} | fixed
    known = [row.damage for key, fmt in fixed.items() if (row := rows.get((*key, fmt))) is not None]
    uniform = problem.uniform() if free else None
    return Allocation(
        {
            name: {layer.name: found[name, layer.name] for layer in quantized if layer.component == name}
            for name in dict.fromkeys(layer.component for layer in layers)
        },
        {name: tuple(layer.name for layer in layers if layer.component == name and table.skipped(layer)) for name in table.components},
        sum(layer.weights for layer in quantized),
        int(problem.size(picks)) + taken,
        (problem.predicted(picks) if free else 0.0) + sum(known),
        None if uniform is None else (chosen[uniform[0]], problem.predicted(uniform) + sum(known)),
    )


def reach(table: SensitivityTable, formats: Sequence[str] | None = None) -> tuple[float, float]:
    """Fewest and most stored bits per weight that :func:`allocate` can divide: every layer in its smallest format, and in its largest.

    Args:
        table: what was measured; layers that it skips do not count.
        formats: what layers may get; by default all weight formats of the most trusted measure.
    """
    chosen = formats or table.formats("weight", table.measures[0])
    layers = [layer for layer in table.layers if not table.skipped(layer)]
    fixed = [table.fixed_format(layer) for layer in layers]
    formats_of = [chosen if own is None else (own,) for own in fixed]
    sizes = [[weight_bytes(fmt, layer.shape) for fmt in some] for layer, some in zip(layers, formats_of, strict=True)]
    weights = max(sum(layer.weights for layer in layers), 1)
    return 8 * sum(map(min, sizes)) / weights, 8 * sum(map(max, sizes)) / weights


def _formats(table: SensitivityTable, wanted: Sequence[str] | None, measured: Container[str]) -> tuple[str, ...]:
    known = [one for one in table.formats() if one in measured]
    for one in wanted or ():
        if one not in known:
            raise RecipeError(f"the table of '{table.model}' was not measured with '{one}'; {nearest(one, known)}")
    chosen = tuple(wanted or known)
    if len(chosen) < 2:
        raise RecipeError(f"an allocation chooses among two or more formats, got {list(chosen)}")
    return chosen


def _budget(bits: float | None, nbytes: float | None, weights: int, taken: int, sizes: np.ndarray, formats: Sequence[str]) -> float:
    if (bits is None) == (nbytes is None):
        raise RecipeError(f"a budget is given in bits per weight or in bytes, one of them; got bits={bits} and nbytes={nbytes}")
    if not weights:
        raise RecipeError("every layer of the table is skipped, so there is nothing to divide; take patterns out of 'skip'")
    budget = float(nbytes if bits is None else bits * weights / 8)  # type: ignore[arg-type]
    least, most = taken + sizes.min(1, initial=np.inf).sum(), taken + sizes.max(1, initial=0).sum()
    if not least <= budget * (1 + 1e-9):
        raise RecipeError(
            f"a budget of {8 * budget / weights:.3f} bits per weight ({budget:,.0f} bytes) is out of reach: {', '.join(formats)} take "
            f"{8 * least / weights:.3f} to {8 * most / weights:.3f} with their scales; allow more, or measure smaller formats"
        )
    return min(budget, float(most))


def _damages(table: SensitivityTable, layers: Sequence[LayerFacts], formats: Sequence[str], measure: Measure | None) -> np.ndarray:
    rows = table.select(measure)
    found = np.zeros((len(layers), len(formats)))
    for number, layer in enumerate(layers):
        for column, fmt in enumerate(formats):
            row = rows.get((layer.component, layer.name, fmt))
            if row is None:
                raise RecipeError(
                    f"the table of '{table.model}' has no damage of {fmt} in layer '{layer.name}'; measure again to complete it"
                )
            found[number, column] = row.damage
    return found


def _tried(table: SensitivityTable, layers: Sequence[LayerFacts], formats: Sequence[str]) -> list[tuple[list[int], float]]:
    """Configurations of the table that say a format for exactly these layers."""
    found = []
    for one in table.configurations:
        wanted = [one.formats.get(layer.name) if layer.component == one.component else None for layer in layers]
        if all(fmt in formats for fmt in wanted):
            found.append(([formats.index(fmt) for fmt in wanted if fmt is not None], one.damage))
    return found
