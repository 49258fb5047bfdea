"""The page: data and clips to one HTML file that refers to nothing outside of itself."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from reelquant import _numbers as numbers
from reelquant._errors import MeasurementError
from reelquant.evidence.media import FPS
from reelquant.evidence.report import clip_cards, metric_table, plots, proof, sentences
from reelquant.evidence.report.clip_cards import ClipCard
from reelquant.evidence.report.data import QuantizationData, ReportData, ReuseData, SaturationData
from reelquant.evidence.report.panels import Panel, best_gain, embed_within, worst_first
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
    shown = _shown(found, clips, limit_mb, spare=150_000 + 6 * len(json.dumps(raw)), fps=fps or found.fps or FPS)
    script, style = resource("report.js"), resource("report.css")
    page = templates().from_string(resource("template.html.jinja"))
    return page.render(
        data=found,
        raw=raw,
        policy=policy(script, style),
        script=Markup(script),
        style=Markup(style),
        clips_note=clip_cards.clips_note(found, len(clips), len(shown.cards), shown.by, limit_mb),
        **vars(shown),
        **_words(found),
        **_metrics(found),
        **_quantization(found.quantization or QuantizationData()),
        **_saturation(found),
        reuse=sentences.reuse(found),
        reuse_steps=plots.reuse_chart(found.reuse or ReuseData()),
    )


# ---------------------------------------------------------------------------------------------------------------- clips


@dataclass(frozen=True)
class Shown:
    """The clips of the page.

    Attributes:
        cards: one per clip, the worst first.
        orders: name, title and direction of each metric that can sort them.
        by: the metric that orders them now; None if none does.
        frames: of the longest clip.
        gain: amplification of the difference.
        fps: frames per second.
    """

    cards: list[ClipCard]
    orders: list[tuple[str, str, str]]
    by: str | None
    frames: int
    gain: int
    fps: float


def _shown(data: ReportData, clips: Sequence[Panel], limit_mb: float, *, spare: int, fps: float) -> Shown:
    """As many clips as fit.

    Args:
        data: of the report.
        clips: all that were given.
        limit_mb: of the page.
        spare: more characters than the page takes without its clips.
        fps: frames per second.
    """
    panels = {panel.name: panel for panel in clips}
    if len(panels) != len(clips):
        twice = sorted(name for name in panels if sum(panel.name == name for panel in clips) > 1)
        raise MeasurementError(f"clips of a report need different names; got several called {', '.join(twice[:4])}")
    ordered, by = worst_first(clips, data.metrics)
    gain = best_gain(ordered)
    embedded = embed_within(ordered, gain, fps, max(0.0, limit_mb * 1e6 - spare))
    cards = clip_cards.clip_cards(data, embedded, panels)
    frames = max((card.clip.frames for card in cards), default=1)
    return Shown(cards, clip_cards.orders(cards, data), by, frames, gain, fps)


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
    }


def _metrics(data: ReportData) -> dict[str, Any]:
    return {
        "tiles": metric_table.tiles(data),
        "groups": metric_table.metric_groups(data),
        "floors": data.floors,
        "has_reference": any(metric.reference is not None for metric in data.metrics.values()),
        "missing": [(*sentences.command(reason), titles) for reason, titles in data.missing.items()],
        "charts": [plots.trajectory_chart(data), plots.bias_chart(data), plots.grain_chart(data)],
        "strips": plots.strip_charts(data),
    }


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


# ---------------------------------------------------------------------------------------------------------------- files


@functools.cache
def resource(name: str) -> str:
    """A text file that lies beside this module."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def policy(script: str, style: str) -> str:
    """The content security policy: nothing is loaded, and only this script and this style sheet run."""
    hashes = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in (script, style)]
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; "
        "media-src blob:; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def templates() -> Environment:
    """Jinja with escaping on: only :class:`~markupsafe.Markup` made by this package is inserted as it is."""
    found = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters["count"] = numbers.count
    return found
