"""The summary of a report in Markdown, to paste into a pull request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reelquant._markup import escaped
from reelquant._numbers import count, figure, size
from reelquant.evidence.report.data import MetricData, QuantizationData, ReportData, ValueRange
from reelquant.evidence.report.sentences import BETTER, WITHIN, clipping, failure_line, headline, sides, verdict

MARKS = {"good": "\u2705", "bad": "\u274c", "unknown": "\u2754"}


def summary(data: Mapping[str, Any]) -> str:
    """A short Markdown text to paste into a pull request.

    Args:
        data: the content of ``report.json``, see ``docs/report.md``; every field may be absent.

    Raises:
        MeasurementError: if a field does not have the schema's shape.
    """
    found = ReportData.from_json(data)
    tone, sentences = verdict(found)
    lines = [
        f"### {MARKS[tone]} {escaped(headline(found))}",
        "",
        escaped(" ".join(sentences)),
        "",
        *metric_table(found),
        "",
    ]
    lines += _clip_lines(found)
    for name, items in _sections(found).items():
        if items:
            lines += [f"**{name}**", "", *(f"- {escaped(item)}" for item in items), ""]
    if found.quantization is not None:
        lines += [quantization_line(found.quantization), ""]
    if words := clipping(found):
        lines += [f"{words}.", ""]
    environment = environment_line(found)
    lines += [f"<sub>{environment}</sub>"] if environment else []
    return "\n".join(lines).rstrip() + "\n"


def _clip_lines(data: ReportData) -> list[str]:
    if data.clips is None:
        return []
    with_interval = any(metric.low is not None for metric in data.measured.values())
    intervals = "; intervals are 95 % over clips" if with_interval else ""
    return [f"{count(data.clip_count, 'clip')}{intervals}.", ""]


def _sections(data: ReportData) -> dict[str, list[str]]:
    """Title -> items of the lists below the table."""
    return {
        "Gate": [failure_line(data, failure) for failure in (data.gate.failures if data.gate else ())],
        "Seen": [f"{defect.name} in {count(len(defect.clips), 'clip')}: {defect.sentence}" for defect in data.defects],
        "Not measured": [f"{', '.join(titles)}: {reason}" for reason, titles in data.missing.items()],
        "Warnings": list(data.warnings),
    }


def metric_table(data: ReportData) -> list[str]:
    """Lines of the summary's table."""
    rows, floors = data.measured, data.floors
    if not rows:
        return ["No metric was measured."]
    left, right = sides(data)
    heads = ["Metric", escaped(left), escaped(right), *(f"floor: {escaped(floor)}" for floor in floors), "floor"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' + '---:|' * (len(heads) - 2) + ':---:|'}"]
    return lines + [_metric_row(data.title(name), metric, floors) for name, metric in rows.items()]


def _metric_row(title: str, metric: MetricData, floors: list[str]) -> str:
    digits = metric.decimals
    arrow = BETTER.get(metric.better or "", ("", ""))[0]
    cells = [
        f"{escaped(title)} {arrow}".strip(),
        figure(metric.reference, "", digits),
        metric.text(escaped(metric.unit), digits),
    ]
    cells += [metric.floor.get(floor, ValueRange()).text("", digits) for floor in floors]
    return f"| {' | '.join([*cells, WITHIN[metric.within_floor]])} |"


def quantization_line(quantization: QuantizationData) -> str:
    """What was quantized, in one line."""
    return (
        f"Recipe {escaped(quantization.recipe or 'unnamed')} ({escaped(quantization.digest or 'no digest')}): "
        f"{count(len(quantization.layers), 'layer')} quantized, {quantization.skipped_count} skipped; "
        f"{size(quantization.bytes_float)} \u2192 {size(quantization.bytes_quantized)} ({figure(quantization.ratio)}x smaller)."
    )


def environment_line(data: ReportData) -> str:
    """Where and with what it was measured."""
    machine, versions = data.machine, {"reelquant": data.tool_version, **data.versions}
    parts = [
        machine.get("gpu") or machine.get("cpu"),
        machine.get("os"),
        *(f"{name} {text}" for name, text in versions.items() if text),
    ]
    return ", ".join(escaped(part) for part in parts if part)
