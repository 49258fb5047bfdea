"""Metrics on the page: key figures of the header, and the table with the float floor beside every figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from reelquant._numbers import figure, percent, size
from reelquant.evidence.gate import DEFECTS
from reelquant.evidence.metrics import FEW, METRICS
from reelquant.evidence.report import cell_charts
from reelquant.evidence.report.data import KINDS, CheckData, MetricData, QuantizationData, ReportData, ValueRange
from reelquant.evidence.report.sentences import BETTER, WITHIN

NOTES = {True: ", within the noise floor", False: ", outside of the noise floor", None: ""}
TARGETS = {"zero": 0.0, "one": 1.0}


@dataclass(frozen=True)
class Tile:
    """A key figure of the header."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class MetricRow:
    """A row of the metric table; ``within`` is ``within``, ``outside`` or a dash, ``limit`` what the floor allows."""

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
    limit: str


@dataclass(frozen=True)
class GateRow:
    """A limit of the gate; ``result`` is ``passed``, ``failed`` or ``not measured``."""

    title: str
    value: str
    limit: str
    margin: str
    result: str


def tiles(data: ReportData) -> list[Tile]:
    """The first judged metric of every kind, then what was saved."""
    found: dict[str, Tile] = {}
    for name, metric in data.measured.items():
        kind = metric.kind or "other"
        if kind == "distribution" and data.clip_count < FEW:
            continue  # mostly bias
        if kind not in found and metric.better in BETTER:
            limit = f" ({metric.floor_limit})" if metric.floor_limit else ""
            note = (metric.range_text(metric.decimals) + NOTES[metric.within_floor]).strip(", ") + limit
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
        limit=metric.floor_limit or "",
    )


RESULTS = {True: "passed", False: "failed", None: "not measured"}


def gate_rows(data: ReportData) -> list[GateRow]:
    """Every limit of the gate, those missed first, those not measured last."""
    checks = data.gate.checks if data.gate else ()
    places = {False: 0, True: 1, None: 2}
    return [_gate_row(data, check) for check in sorted(checks, key=lambda check: places[check.passed])]


def _gate_row(data: ReportData, check: CheckData) -> GateRow:
    name = check.metric or "unknown"
    if name == DEFECTS:
        margin = plus(check.margin, percent(check.margin))
        return GateRow("Clips with one and the same defect", percent(check.value), check.limit or "", margin, RESULTS[check.passed])
    unit = data.unit(name) or (METRICS[name].unit if name in METRICS else "")
    digits = METRICS[name].digits if name in METRICS else None
    value, margin = figure(check.value, unit, digits), plus(check.margin, figure(check.margin, "", digits))
    return GateRow(data.title(name), value, check.limit or "", margin, RESULTS[check.passed])


def plus(value: float | None, text: str) -> str:
    """A margin with its sign."""
    return f"+{text}" if value is not None and value > 0 else text


def triple(found: ValueRange) -> tuple[float, float, float]:
    """Value, low and high end of a measured value; an unknown end is the value itself."""
    value = float(found.value or 0.0)
    return value, value if found.low is None else float(found.low), value if found.high is None else float(found.high)
