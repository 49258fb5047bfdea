"""The picture of a table: layers by formats, layers by steps, and all inputs by single steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reelquant.allocate.roles import nearest_four
from reelquant.allocate.table import EVERY, LayerFacts, Measure, SensitivityTable
from reelquant.checkpoint import keeping_work

NAMED = 90  # layers that are written out; of more, the blocks are
MAP = "viridis"
DARKEST = -15  # log10 of a damage that is none


def draw(table: SensitivityTable, file: Path) -> None:
    """A row of panels for every denoiser: dark is harmless, bright does most damage, each colour scale logarithmic."""
    from matplotlib.figure import Figure

    measure = table.measures[0]
    heights = [max(4.0, 0.14 * min(len(table.of(name)), NAMED) + 1.5) for name in table.components]
    figure = Figure(figsize=(15, sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 3, squeeze=False, width_ratios=[2, 2, 1.4], height_ratios=heights)
    for row, component in enumerate(table.components):
        formats, steps, inputs = panels[row]
        stepped = (
            measure if table.step_ranges(component, measure) else next((m for m in table.measures if table.step_ranges(component, m)), None)
        )
        _formats(figure, formats, table, component, measure)
        _steps(figure, steps, table, component, stepped)
        _inputs(inputs, table, component)
    with keeping_work(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=100)


def _formats(figure: Any, axes: Any, table: SensitivityTable, component: str, measure: Measure) -> None:
    layers = table.of(component)
    columns = [("weight", one) for one in table.formats("weight", measure)]
    columns += [("input", one) for one in table.formats("input", measure)]
    rows = {part: table.select(measure, part) for part in ("weight", "input")}  # type: ignore[arg-type]
    values = [[_value(rows[part].get((component, layer.name, fmt))) for part, fmt in columns] for layer in layers]
    _heat(figure, axes, values, layers)
    axes.set_xticks(range(len(columns)), [f"{part[0]} {fmt}" for part, fmt in columns], rotation=90, fontsize=7)
    axes.set_title(f"{component}: a layer alone (w: its weight, i: its input), by {measure}", fontsize=9)


def _steps(figure: Any, axes: Any, table: SensitivityTable, component: str, measure: Measure | None) -> None:
    if measure is None:
        axes.axis("off")
        axes.set_title("layers by steps were not measured", fontsize=9)
        return
    layers, ranges = table.of(component), table.step_ranges(component, measure)
    fmt = nearest_four(table, measure)
    rows = [table.select(measure, "weight", steps) for steps in ranges]
    _heat(figure, axes, [[_value(row.get((component, layer.name, fmt))) for row in rows] for layer in layers], layers, named=False)
    axes.set_xticks(range(len(ranges)), [str(first) if first == last else f"{first}-{last}" for first, last in ranges], fontsize=8)
    axes.set_xlabel("denoising steps")
    axes.set_title(f"the weight as {fmt} at some steps alone, by {measure}", fontsize=9)


def _inputs(axes: Any, table: SensitivityTable, component: str) -> None:
    found = [row for row in table.rows if (row.component, row.layer, row.part) == (component, EVERY, "input") and row.steps is not None]
    measure = next((one for one in table.measures if any(row.measure == one for row in found)), None)
    for fmt in dict.fromkeys(row.format for row in found if row.measure == measure):
        mine = sorted((row.steps[0], row.damage, row.low, row.high) for row in found if (row.format, row.measure) == (fmt, measure))  # type: ignore[index]
        steps, damage, low, high = zip(*mine, strict=True)
        axes.plot(steps, damage, marker=".", label=fmt)
        axes.fill_between(steps, low, high, alpha=0.2)
    axes.set_xlabel("denoising step")
    axes.set_title("all inputs at one step alone" + (f", by {measure}" if measure else ": not measured"), fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if found:
        axes.set_yscale("log")
        axes.set_ylabel("damage")
        axes.legend(fontsize=8)


def _value(row: Any) -> float:
    return float("nan") if row is None else max(row.damage, 1e-20)


def _heat(figure: Any, axes: Any, values: Sequence[Sequence[float]], layers: Sequence[LayerFacts], *, named: bool = True) -> None:
    shown = np.log10(np.array(values))
    finite = shown[shown > DARKEST]
    floor = float(np.percentile(finite, 2)) if finite.size else DARKEST  # what does nothing at all would take all colours
    image = axes.imshow(shown, aspect="auto", cmap=MAP, interpolation="nearest", vmin=floor)
    figure.colorbar(image, ax=axes, label="log10 of the damage", shrink=0.6)
    blocks = [layer.block for layer in layers]
    starts = [number for number in range(1, len(blocks)) if blocks[number] != blocks[number - 1]]
    for start in starts:
        axes.axhline(start - 0.5, color="white", linewidth=0.8)
    if not named:
        axes.set_yticks([])
    elif len(layers) <= NAMED:
        axes.set_yticks(range(len(layers)), [f"{layer.name}{_mark(layer)}" for layer in layers], fontsize=6)
    else:
        ends = [0, *starts, len(blocks)]
        middles = [(first + last - 1) / 2 for first, last in itertools.pairwise(ends)]
        axes.set_yticks(middles, [blocks[first] or "outside of blocks" for first in ends[:-1]], fontsize=7)


def _mark(layer: LayerFacts) -> str:
    return "" if layer.role == "main" else f" ({layer.role})"
