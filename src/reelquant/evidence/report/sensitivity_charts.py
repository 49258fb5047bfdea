"""Drawings of a sensitivity map: layers by formats, and layers by denoising steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from reelquant._numbers import figure
from reelquant.evidence.report import charts
from reelquant.evidence.report.charts import Cell, Chart
from reelquant.evidence.report.data import Number, SensitivityData


def sensitivity_maps(found: Sequence[SensitivityData]) -> list[Chart]:
    """For every denoiser its layers by formats, and by ranges of steps where single steps were measured."""
    return [chart for one in found for chart in (_format_map(one), *([_step_map(one)] if one.steps else []))]


def _format_map(found: SensitivityData) -> Chart:
    title = f"{found.component}: damage of one layer's weight alone"
    about = f"By {found.measure}. Full colour: most damage, on a logarithmic scale. Framed: what the layer got. Hover a cell for its layer."
    shade = _shades(found.damage)
    chosen = [*found.chosen, *[None] * (len(found.layers) - len(found.chosen))]
    cells = [
        Cell(column, row, shade(value), f"{found.layers[row]}, {fmt}: {figure(value)}", framed=chosen[row] == fmt)
        for row, values in enumerate(found.damage)
        for column, (fmt, value) in enumerate(zip(found.formats, values, strict=False))
        if value is not None
    ]
    names = [fmt.replace("channel", "ch.").replace("group-", "g") for fmt in found.formats]
    return charts.map_chart(title, about, cells, "format", "layer, in order", names)


def _step_map(found: SensitivityData) -> Chart:
    title = f"{found.component}: damage at some steps alone"
    about = f"The weight as {found.step_format} at these steps and in float at all others."
    shade, ranges = _shades(found.step_damage), [_range(steps) for steps in found.steps]
    cells = [
        Cell(column, row, shade(value), f"{found.layers[row]}, steps {steps}: {figure(value)}")
        for row, values in enumerate(found.step_damage)
        for column, (steps, value) in enumerate(zip(ranges, values, strict=False))
        if value is not None
    ]
    return charts.map_chart(title, about, cells, "denoising steps", "layer, in order", ranges)


def _range(steps: tuple[int, int]) -> str:
    first, last = steps
    return str(first + 1) if first == last else f"{first + 1}-{last + 1}"


def _shades(rows: Sequence[Sequence[Number]]) -> Callable[[float], float]:
    """From the logarithm of a damage to a shade: the least of the larger 98 % is nearly empty, the largest full."""
    values = sorted(value for row in rows for value in row if value)
    if not values:
        return lambda _: 0.0
    low, high = math.log(values[len(values) // 50]), math.log(values[-1])
    return lambda value: 0.04 + 0.96 * (math.log(value) - low) / max(high - low, 1e-9) if value > 0 else 0.0
