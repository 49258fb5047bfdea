"""The page: data and clips to one HTML file that refers to nothing outside of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reelquant import _numbers as numbers
from reelquant.evidence.media import FPS
from reelquant.evidence.report import clip_cards, metric_table, plots, proof, sensitivity_charts, sentences
from reelquant.evidence.report.data import QuantizationData, ReportData, ReuseData, SaturationData
from reelquant.evidence.report.glossary import WORDS
from reelquant.evidence.report.page import ClipSection, check_panels, embedded, rendered, views
from reelquant.evidence.report.panels import Panel, worst_first
from reelquant.evidence.store import write_text

LIMIT_MB = 40.0
TOP_LAYERS = 20


def write(
    data: Mapping[str, Any],
    clips: Sequence[Panel],
    path: str | Path,
    *,
    limit_mb: float = LIMIT_MB,
    fps: float | None = None,
) -> Path:
    """Write the page; it appears complete or not at all. Folders on the way are made.

    Args:
        data, clips, limit_mb, fps: see :func:`render`.
        path: of the HTML file.

    Returns:
        The path.

    Raises:
        CheckpointError: if the file cannot be written.
        MeasurementError: as :func:`render`.
    """
    path = Path(path)
    write_text(path, render(data, clips, limit_mb=limit_mb, fps=fps))
    return path


def render(
    data: Mapping[str, Any],
    clips: Sequence[Panel] = (),
    *,
    limit_mb: float = LIMIT_MB,
    fps: float | None = None,
) -> str:
    """The report as one HTML page.

    Args:
        data: the content of ``report.json``; ``docs/report.md`` has the schema. Every field may be absent or null.
        clips: to play side by side; the worst come first.
        limit_mb: bound of the page's size, in 10^6 characters; the best clips are left out to keep it.
        fps: frames per second of the clips; None: what the data say, or 8.

    Raises:
        MeasurementError: if two clips have one name, or a field of the data does not have the schema's shape.
    """
    raw = numbers.finite_only(data)
    found = ReportData.from_json(raw)
    shown = _shown(found, clips, limit_mb, raw, fps or found.fps or FPS)
    return rendered(
        "report.html.jinja",
        data=found,
        raw=raw,
        clips_note=clip_cards.clips_note(found, len(clips), len(shown.cards), limit_mb),
        **vars(shown),
        **_words(found),
        **_metrics(found),
        **_costs(found),
        **_quantization(found.quantization or QuantizationData()),
        **_saturation(found),
        reuse=sentences.reuse(found),
        reuse_steps=plots.reuse_chart(found.reuse or ReuseData()),
        reuse_map=plots.reuse_map(found.reuse or ReuseData()),
        sensitivity_maps=sensitivity_charts.sensitivity_maps(found.sensitivity),
    )


def _shown(data: ReportData, clips: Sequence[Panel], limit_mb: float, raw: Mapping[str, Any], fps: float) -> ClipSection:
    """As many clips as fit, the worst first."""
    check_panels(clips)
    ordered, by = worst_first(clips, data.metrics)
    gain, made = embedded(ordered, limit_mb, raw, fps)
    cards = clip_cards.clip_cards(data, made, {panel.name: panel for panel in clips})
    left, right = sentences.sides(data)
    return ClipSection(
        cards=cards,
        orders=clip_cards.orders(cards, data),
        order_words=clip_cards.order_words(data, by, len(cards)),
        views=views(ordered, left, [right], gain),
        frames=max((card.clip.frames for card in cards), default=1),
        gain=gain,
        fps=fps,
    )


# ------------------------------------------------------------------------------------------- what the template is given


def _words(data: ReportData) -> dict[str, Any]:
    tone, said = sentences.verdict(data)
    failures = data.gate.failures if data.gate else ()
    return {
        "kind": sentences.TITLES.get(data.kind or "", "Report"),
        "headline": sentences.headline(data),
        "tone": tone,
        "sentences": said,
        "sides": sentences.sides(data),
        "failures": [(failure, data.title(failure.metric)) for failure in failures],
        "environment": proof.environment(data),
        "command": sentences.reproduce(data),
        "words": list(WORDS.items()),
        "gate": metric_table.gate_rows(data),
    }


def _metrics(data: ReportData) -> dict[str, Any]:
    return {
        "tiles": metric_table.tiles(data),
        "groups": metric_table.metric_groups(data),
        "floors": data.floors,
        "floor_note": sentences.floor_note(data),
        "few_clips": sentences.few_clips(data),
        "has_reference": any(metric.reference is not None for metric in data.metrics.values()),
        "missing": [(*sentences.command(reason), titles) for reason, titles in data.missing.items()],
        "charts": [plots.trajectory_chart(data), plots.bias_chart(data), plots.grain_chart(data)],
        "strips": plots.strip_charts(data),
    }


def _costs(data: ReportData) -> dict[str, Any]:
    return {"costs": proof.cost_rows(data), "cost_note": proof.cost_note(data)}


def _quantization(quantization: QuantizationData) -> dict[str, Any]:
    return {
        "errors": plots.error_bars(quantization),
        "top": TOP_LAYERS,
        "roles": plots.roles_of(quantization.layers),
        "layer_charts": plots.layer_charts(quantization),
        "facts": proof.facts(quantization),
        "byte_bars": proof.byte_bars(quantization),
        "columns": proof.LAYER_COLUMNS,
        "layers": proof.layer_rows(quantization),
        "trials": proof.trial_rows(quantization),
    }


def _saturation(data: ReportData) -> dict[str, Any]:
    found = data.saturation or SaturationData()
    return {
        "clipping": sentences.clipping(data),
        "clipped_layers": proof.clipped_rows(found),
        "clipped_steps": plots.saturation_chart(found),
    }
