"""The page of several tests: a table, a plot of size, quality and speed, clips side by side, and every figure beside its limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from pydantic import ValidationError

from reelquant import _numbers as numbers
from reelquant._errors import MeasurementError
from reelquant._numbers import count, figure, is_number
from reelquant.evidence.media import FPS
from reelquant.evidence.metrics import METRICS
from reelquant.evidence.report import cell_charts, charts, clip_cards, metric_table, plots, proof, sentences
from reelquant.evidence.report.charts import Bubble, Chart
from reelquant.evidence.report.clip_cards import ClipCard, Curve
from reelquant.evidence.report.data import KINDS, ReportData
from reelquant.evidence.report.glossary import WORDS
from reelquant.evidence.report.html import LIMIT_MB
from reelquant.evidence.report.page import ClipSection, check_panels, embedded, rendered, views
from reelquant.evidence.report.panels import BADNESS, Embedded, Panel
from reelquant.evidence.report.several_table import SeveralData, TestData, heads, summary_cells
from reelquant.evidence.store import write_text

COLOURS = 6  # of tests, in the style sheet
CURVE = "psnr"
Curves = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]  # test -> clip -> metric -> a value per frame


def write(data: Mapping[str, Any], clips: Sequence[Panel], curves: Curves, path: Path) -> Path:
    """Write the page; it appears complete or not at all.

    Args:
        data: the content of ``report.json``.
        clips: with a clip of every test, in the order of the page; their figures are named ``METRIC TEST``.
        curves: figures per frame.
        path: of the HTML file.

    Raises:
        CheckpointError: if the file cannot be written.
        MeasurementError: if the data do not have the schema's shape.
    """
    write_text(path, render(data, clips, curves))
    return path


def render(data: Mapping[str, Any], clips: Sequence[Panel] = (), curves: Curves | None = None) -> str:
    """The page as text; see :func:`write`."""
    raw = numbers.finite_only(data)
    try:
        found = SeveralData.model_validate(raw)
    except ValidationError as error:
        raise MeasurementError(f"these are not the data of several tests: {error.errors()[0]}; docs/report.md has the schema") from None
    shared = ReportData.from_json({key: value for key, value in raw.items() if key != "tests"})
    names = [test.name for test in found.tests]
    reference = " ".join(filter(None, (found.reference.name, found.reference.dtype))) or "float"
    shown = _shown(found, clips, curves or {}, raw)
    return rendered(
        "several.html.jinja",
        data=found,
        raw=raw,
        headline=f"{count(len(names), 'quantized pipeline')} against {reference}",
        tests=found.tests,
        names=names,
        verdicts=[(test, *sentences.verdict(test)) for test in found.tests],
        heads=heads(found),
        rows=summary_cells(found),
        plot=size_chart(found),
        strips=strips(found),
        clips_note=clip_cards.clips_note(shared, len(clips), len(shown.cards), LIMIT_MB),
        **vars(shown),
        groups=metric_groups(found),
        floor_note=sentences.floor_note(found.tests[0]) if found.tests else "",
        few_clips=sentences.few_clips(found.tests[0]) if found.tests else "",
        gate=gate_table(found),
        costs=cost_table(found),
        cost_note=proof.cost_note(found.tests[0]) if found.tests else "",
        words=list(WORDS.items()),
        command=found.command or "not recorded",
        environment=[row for row in proof.environment(shared) if row[0] not in ("Test", "Seconds", "Peak memory")],
    )


def style(number: int) -> str:
    """The class of a test's colour."""
    return f"t-{number % COLOURS}"


def size_chart(data: SeveralData) -> Chart:
    """Size against quality, a bubble for each test, the larger the faster."""
    quality = METRICS[data.quality].title if data.quality in METRICS else "quality"
    timed = all(test.speedup for test in data.tests)
    speed = "the larger a bubble, the faster" if timed else "speed was not measured: evaluate --speed makes bubbles of faster tests larger"
    title, about = f"Size, {quality} and speed", f"Bytes of all weights against {quality}, with its interval; {speed}."
    bubbles = [bubble for i, test in enumerate(data.tests) if (bubble := _bubble(data, i, test, timed)) is not None]
    unit = METRICS[data.quality].unit if data.quality in METRICS else ""
    return charts.bubble_chart(title, about, bubbles, "weights, MB", f"{quality} {unit}".strip())


def _bubble(data: SeveralData, number: int, test: TestData, timed: bool) -> Bubble | None:
    metric = test.metrics.get(data.quality or "")
    if metric is None or metric.value is None or not test.stored:
        return None
    speed = f", {test.speedup:.2f}\u00d7 as fast as float" if test.speedup else ""
    words = f"{test.name}: {numbers.size(test.stored)}, {figure(metric.value, metric.unit)}{speed}"
    radius = 7 * (test.speedup or 1.0) ** 0.5 if timed else 7.0
    low, high = metric.bounds or (metric.value, metric.value)
    return Bubble(test.stored / 1e6, float(metric.value), low, high, min(radius, 22.0), style(number), str(number + 1), test.name, words)


def strips(data: SeveralData) -> list[Chart]:
    """A strip for each test: every clip is a dot, by the metric of quality."""
    metrics = {test.name: test.metrics[data.quality] for test in data.tests if data.quality in test.metrics}
    return [plots.strip(test, data.quality or "", metrics[test.name], f"{test.name}: ") for test in data.tests if test.name in metrics]


# --- clips ------------------------------------------------------------------------------------------------------------


def _shown(data: SeveralData, clips: Sequence[Panel], curves: Curves, raw: Mapping[str, Any]) -> ClipSection:
    check_panels(clips)
    names = [test.name for test in data.tests]
    gain, made = embedded(clips, LIMIT_MB, raw, FPS)
    given = {panel.name: panel for panel in clips}
    cards = [_card(data, clip, given[clip.name], curves) for clip in made]
    title = METRICS[data.quality].title if data.quality in METRICS else ""
    return ClipSection(
        cards=cards,
        orders=_orders(data, cards),
        order_words=f", worst {title} of any test first" if title and len(cards) > 1 else "",
        views=views(clips, "float", names, gain),
        frames=max((card.clip.frames for card in cards), default=1),
        gain=gain,
        fps=FPS,
    )


def _card(data: SeveralData, clip: Embedded, panel: Panel, curves: Curves) -> ClipCard:
    numbers = {name: float(value or 0.0) for name, value in panel.figures.items() if is_number(value)}
    quality = data.quality or ""
    unit, title = (METRICS[quality].unit, METRICS[quality].title) if quality in METRICS else ("", quality)
    shown = [(f"{title}, {test.name}", figure(numbers.get(f"{quality} {test.name}"), unit)) for test in data.tests]
    badges = [
        f"{test.name}: {sentences.defect_words(defect.name)}" for test in data.tests for defect in test.defects if clip.name in defect.clips
    ]
    return ClipCard(clip, badges, shown, numbers, _curves(data, clip, curves))


def _curves(data: SeveralData, clip: Embedded, curves: Curves) -> list[Curve]:
    """PSNR per frame, a line for each test."""
    lines = [(style(i), curves.get(test.name, {}).get(clip.name, {}).get(CURVE, ())) for i, test in enumerate(data.tests)]
    values = [x for _, line in lines for x in line if is_number(x)]
    metric = METRICS[CURVE]
    svg: Markup | None = cell_charts.curve([line for line in lines if line[1]], clip.frames, f"{metric.title} per frame of every test")
    return [] if svg is None else [Curve(metric.title, figure(min(values), metric.unit), figure(max(values), metric.unit), svg, False)]


def _orders(data: SeveralData, cards: Sequence[ClipCard]) -> list[tuple[str, str, str]]:
    """Every figure of every test that all clips have."""
    return [
        (f"{name} {test.name}", f"{test.title(name)} of {test.name}", str(metric.better))
        for test in data.tests
        for name, metric in test.metrics.items()
        if metric.better in BADNESS and len(cards) > 1 and all(f"{name} {test.name}" in card.numbers for card in cards)
    ]


# --- tables -----------------------------------------------------------------------------------------------------------


def metric_groups(data: SeveralData) -> list[tuple[str, list[tuple[metric_table.MetricRow, list[metric_table.MetricRow | None]]]]]:
    """By kind: every metric that a test has, the row of the first such test for its words, and the row of every test."""
    groups: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for test in data.tests for name in test.measured):
        rows = [_metric_row(test, name) for test in data.tests]
        first, test = next((row, test) for row, test in zip(rows, data.tests, strict=True) if row is not None)
        groups.setdefault(KINDS.get(test.metrics[name].kind or "", "Other"), []).append((first, rows))
    return list(groups.items())


def _metric_row(test: TestData, name: str) -> metric_table.MetricRow | None:
    return metric_table.metric_row(test.title(name), test.measured[name], test.floors) if name in test.measured else None


def gate_table(data: SeveralData) -> list[tuple[metric_table.GateRow, list[metric_table.GateRow | None]]]:
    """Every limit of the gate: its row in the first test, and that of every test."""
    every = [{row.title: row for row in metric_table.gate_rows(test)} for test in data.tests]
    titles = dict.fromkeys(title for rows in every for title in rows)
    return [(next(rows[title] for rows in every if title in rows), [rows.get(title) for rows in every]) for title in titles]


def cost_table(data: SeveralData) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Name, float, and for every test its own and the ratio."""
    every = [{name: row for name, *row in proof.cost_rows(test)} for test in data.tests]
    names = dict.fromkeys(name for rows in every for name in rows)
    return [(name, next(rows[name][0] for rows in every if name in rows), [_cost(rows.get(name)) for rows in every]) for name in names]


def _cost(row: Sequence[str] | None) -> tuple[str, str]:
    return (row[1], row[2]) if row else (numbers.NOTHING, "")
