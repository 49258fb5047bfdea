"""Metrics on the page: key figures of the header, and the table with the float floor beside every figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from reelquant._numbers import figure, size
from reelquant.evidence.report import cell_charts
from reelquant.evidence.report.data import KINDS, MetricData, QuantizationData, ReportData, ValueRange
from reelquant.evidence.report.sentences import BETTER, WITHIN

NOTES = {True: ", within the float floor", False: ", outside of the float floor", None: ""}
TARGETS = {"zero": 0.0, "one": 1.0}


@dataclass(frozen=True)
class Tile:
    """A key figure of the header."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class MetricRow:
    """A row of the metric table; ``within`` is ``within``, ``outside`` or a dash."""

    title: str
    about: str
    arrow: str
    better: str
    reference: str
    value: str
    interval: str
    floors: Sequence[tuple[str, str, str]]
    plot: Markup
    plotted: Sequence[str]
    within: str


def tiles(data: ReportData) -> list[Tile]:
    """The first judged metric of every kind, then what was saved."""
    found: dict[str, Tile] = {}
    for name, metric in data.measured.items():
        kind = metric.kind or "other"
        if kind not in found and metric.better in BETTER:
            note = (metric.range_text(metric.decimals) + NOTES[metric.within_floor]).strip(", ")
            found[kind] = Tile(data.title(name), figure(metric.value, metric.unit, metric.decimals), note)
    return [*found.values(), *(savings(data.quantization) if data.quantization else [])]


def savings(quantization: QuantizationData) -> list[Tile]:
    """What quantization did, as key figures."""
    before, after = quantization.bytes_model_float, quantization.bytes_model
    found = []
    if before is not None and after:
        found.append(Tile("Denoiser", f"{before / after:.2f}\u00d7", f"smaller, {size(before)} \u2192 {size(after)}"))
    if count := len(quantization.layers):
        found.append(Tile("Layers", f"{count} of {count + quantization.skipped_count}", "quantized"))
    return found


def metric_groups(data: ReportData) -> list[tuple[str, list[MetricRow]]]:
    """Rows by kind, with the kind's title."""
    groups: dict[str, list[MetricRow]] = {}
    for name, metric in data.measured.items():
        groups.setdefault(KINDS.get(metric.kind or "", "Other"), []).append(metric_row(data.title(name), metric, data.floors))
    return list(groups.items())


def metric_row(title: str, metric: MetricData, floors: Sequence[str]) -> MetricRow:
    """A measured metric as text and drawing."""
    digits = metric.decimals
    own = {floor: metric.floor.get(floor, ValueRange()) for floor in floors}
    measured = [(floor, triple(found)) for floor, found in own.items() if found.value is not None]
    arrow, better = BETTER.get(metric.better or "", ("", ""))
    return MetricRow(
        title=title,
        about=metric.about,
        arrow=arrow,
        better=better,
        reference=figure(metric.reference, "", digits),
        value=figure(metric.value, metric.unit, digits),
        interval=metric.range_text(digits),
        floors=[(floor, figure(found.value, "", digits), found.range_text(digits)) for floor, found in own.items()],
        plot=cell_charts.interval_plot(triple(metric), measured, TARGETS.get(metric.better or "")),
        plotted=[floor for floor, _ in measured],
        within=WITHIN[metric.within_floor],
    )


def triple(found: ValueRange) -> tuple[float, float, float]:
    """Value, low and high end of a measured value; an unknown end is the value itself."""
    value = float(found.value or 0.0)
    return value, value if found.low is None else float(found.low), value if found.high is None else float(found.high)
