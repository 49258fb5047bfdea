"""The charts of a report: which fields are drawn, and what each drawing is called. ``charts`` draws."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from reelquant._numbers import figure, is_number
from reelquant.evidence.report import cell_charts, charts
from reelquant.evidence.report.charts import Cell, Chart, Dot, Line
from reelquant.evidence.report.data import LayerData, MetricData, QuantizationData, ReportData, ReuseData, SaturationData
from reelquant.evidence.report.sentences import BETTER, capitalised, sides

STRIPS = 6
ROLES = ("main", "temporal", "prompt", "constant", "entry", "exit")
LAYER_FIGURES = (  # field, title, explanation, axis
    ("coverage", "Code coverage", "Share of the input's codes that a channel uses, mean over channels.", "share"),
    (
        "tdscore",
        "TDScore of temporal layers",
        "How well quantized timestep features keep their distances; 1 is lossless.",
        "TDScore",
    ),
    (
        "skewness",
        "Skewness of temporal features",
        "Asymmetry of the timestep features that a grid has to cover; 0 is even.",
        "skewness",
    ),
)


# ---------------------------------------------------------------------------------------------------------------- clips


def trajectory_chart(data: ReportData) -> Chart:
    """How far the latents drift, step by step."""
    title, found = "Error along the denoising steps", data.trajectory
    if found is None:
        missing = "latents were not recorded for this report"
        return Chart(title, "Relative error of the latents after each step.", missing=missing)
    floors = enumerate(found.floor.items())
    series = [Line(f"floor: {name}", f"s-floor dash-{i % 3}", found.steps, floor.mean) for i, (name, floor) in floors]
    series.append(Line(sides(data)[1], "s-test", found.steps, found.test.mean, found.test.low, found.test.high))
    return charts.line_chart(title, capitalised(found.about), series, "step", "error")


def grain_chart(data: ReportData) -> Chart:
    """Noise in flat areas against the number of steps."""
    title, about, found = (
        "Grain against steps",
        "Noise left in flat areas of the clips, in levels of 255.",
        data.grain_growth,
    )
    if found is None:
        return Chart(title, about, missing="it was not measured at several numbers of steps")
    left, right = sides(data)
    series = [Line(left, "s-ref", found.steps, found.reference), Line(right, "s-test", found.steps, found.test)]
    return charts.line_chart(title, about, series, "steps", "grain", marks=True)


def bias_chart(data: ReportData) -> Chart:
    """A distance of distributions against the number of clips."""
    found = data.bias
    name = data.title((found.metric if found else None) or "fvd")
    title, about = (
        f"{name} against sample size",
        "Few clips make the distance too large; the band is one standard deviation over draws.",
    )
    if found is None:
        return Chart(title, about, missing="it was not measured on subsets of the clips")
    points = list(zip(found.values, found.sd, strict=False))
    low, high = ([v + sign * s for v, s in points if v is not None and s is not None] for sign in (-1, 1))
    level = None if found.extrapolated is None else ("without bias:", float(found.extrapolated))
    series = [Line(name, "s-test", found.sizes, found.values, low, high)]
    return charts.line_chart(title, about, series, "clips", name, marks=True, level=level)


def strip_charts(data: ReportData) -> list[Chart]:
    """One strip per metric that clips have figures of."""
    made = (strip(data, name, metric) for name, metric in data.metrics.items() if metric.better in BETTER)
    return [chart for chart in made if chart.svg is not None][:STRIPS]


def strip(data: ReportData, name: str, metric: MetricData, subject: str = "") -> Chart:
    """Every clip is a dot, by one of its figures."""
    values = [(entry, entry.figures.get(name)) for entry in data.per_clip]
    dots = [
        (float(v), f"{entry.name}: {figure(v, metric.unit)} \u2013 {entry.prompt or 'no prompt'}", str(entry.name))
        for entry, v in values
        if v is not None
    ]
    return charts.strip_chart(f"{subject}{data.title(name)}", metric.about, dots, metric.unit)


def saturation_chart(found: SaturationData) -> Chart:
    """Noise of clipping over noise of rounding, step by step."""
    title, about = (
        "Clipping, step by step",
        "Noise of clipped inputs over noise of rounding; above 1, clips left the calibrated ranges by far.",
    )
    if not found.steps:
        return Chart(title, about, missing="steps were not recorded")
    x, y = ([getattr(one, field) for one in found.steps] for field in ("step", "excess"))
    return charts.line_chart(title, about, [Line("clipping over rounding", "s-test", x, y)], "step", "ratio", marks=True)


def reuse_chart(found: ReuseData) -> Chart:
    """The share of what may be reused that was computed, step by step."""
    title, about = f"{found.things.capitalize()} computed, step by step", "1: they were computed; 0: earlier results stood for them."
    if not found.steps:
        return Chart(title, about, missing="steps were not counted")
    x = [step + 1 for step, *_ in found.steps]
    y = [computed / max(computed + reused, 1) for _, computed, reused in found.steps]
    return charts.line_chart(title, about, [Line("computed", "s-test", x, y)], "step", f"share of {found.unit}", marks=True)


def reuse_map(found: ReuseData) -> Chart:
    """What was computed, step by part; steps that a part was not counted at were computed."""
    title = f"{found.things.capitalize()} computed, step by step and place by place"
    about = "Full colour: computed; empty: earlier results stood for it. Places are in order; hover a cell for its name."
    if not found.cells:
        return Chart(title, about, missing="single places were not counted")
    steps = range(max(step for step, *_ in found.steps) + 1)
    cells = []
    for row, part in enumerate(found.parts):
        counted = {step: (computed, reused) for step, computed, reused in found.cells.get(part, ())}
        for step in steps:
            computed, reused = counted.get(step, (1, 0))
            share = computed / max(computed + reused, 1)
            cells.append(Cell(step, row, share, f"{part}, step {step + 1}: {share:.0%} of its {found.unit}"))
    return charts.map_chart(title, about, cells, "step", "place")


# --------------------------------------------------------------------------------------------------------------- layers


def layer_charts(quantization: QuantizationData) -> list[Chart]:
    """Figures of the layers in the order of the network, coloured by role."""
    return [_layer_chart(quantization.layers, *words) for words in LAYER_FIGURES]


def _layer_chart(layers: Sequence[LayerData], field: str, title: str, about: str, axis: str) -> Chart:
    if not layers:
        return Chart(title, about, missing="there is no quantization report")
    rows = [(i, layer) for i, layer in enumerate(layers, 1) if is_number(getattr(layer, field))]
    dots = [_dot(i, layer, getattr(layer, field)) for i, layer in rows]
    return charts.scatter_chart(title, about, dots, "layer, in order", axis, roles_of([layer for _, layer in rows]))


def _dot(place: int, layer: LayerData, value: float) -> Dot:
    return Dot(place, value, role_style(layer), f"{layer.name} ({layer.role}): {figure(value)}")


def role_style(layer: LayerData) -> str:
    """The class of a role's colour."""
    return f"r-{layer.role}" if layer.role in ROLES else "r-other"


def roles_of(layers: Sequence[LayerData]) -> list[tuple[str, str]]:
    """Legend of the roles in use."""
    return list({role_style(layer): layer.role or "other" for layer in layers}.items())


def error_bars(quantization: QuantizationData) -> list[tuple[str, str, str, Markup]]:
    """Name, role, error and bar of every layer, the largest error first."""
    measured = [(layer, float(layer.error)) for layer in quantization.layers if layer.error is not None]
    measured.sort(key=lambda pair: -pair[1])
    top = (measured[0][1] if measured else 0.0) or 1.0
    return [_error_bar(layer, error, error / top) for layer, error in measured]


def _error_bar(layer: LayerData, error: float, share: float) -> tuple[str, str, str, Markup]:
    name, value = layer.name or "unnamed", figure(error)
    return name, layer.role or "", value, cell_charts.bar(share, role_style(layer), f"{name} {value}")
