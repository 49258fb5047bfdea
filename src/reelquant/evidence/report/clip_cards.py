"""Clips on the page: what stands around each video, which clips are shown, and how they can be sorted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from reelquant._numbers import count, figure, is_number
from reelquant.evidence.report import cell_charts
from reelquant.evidence.report.data import ClipData, ReportData
from reelquant.evidence.report.panels import BADNESS, Embedded, Panel
from reelquant.evidence.report.sentences import defect_words

FIGURES = 5  # per clip
CURVES = ("psnr", "motion_energy")  # shown first


@dataclass(frozen=True)
class Curve:
    """A figure per frame, drawn."""

    title: str
    low: str
    high: str
    svg: Markup
    both: bool


@dataclass(frozen=True)
class ClipCard:
    """A clip with everything around it."""

    clip: Embedded
    badges: Sequence[str]
    figures: Sequence[tuple[str, str]]
    numbers: dict[str, float]
    curves: Sequence[Curve]


def clip_cards(data: ReportData, embedded: Sequence[Embedded], panels: Mapping[str, Panel]) -> list[ClipCard]:
    """A card per embedded clip."""
    entries = {str(entry.name): entry for entry in data.per_clip}
    return [clip_card(clip, panels[clip.name], entries.get(clip.name, ClipData()), data) for clip in embedded]


def clip_card(clip: Embedded, panel: Panel, entry: ClipData, data: ReportData) -> ClipCard:
    """A clip with its figures, curves and recognised defects."""
    numbers = {name: float(value or 0.0) for name, value in panel.figures.items() if is_number(value)}
    ordered = [name for name in data.metrics if name in numbers] + [name for name in numbers if name not in data.metrics]
    shown = [(data.title(name), figure(numbers[name], data.unit(name))) for name in ordered[:FIGURES]]
    badges = [defect_words(defect.name) for defect in data.defects if clip.name in defect.clips]
    names = sorted(entry.curves, key=lambda name: (CURVES.index(name) if name in CURVES else len(CURVES), name))
    curves = [clip_curve(name, entry, clip.frames, data) for name in names[: len(CURVES)]]
    return ClipCard(clip, badges, shown, numbers, [found for found in curves if found])


def clip_curve(name: str, entry: ClipData, frames: int, data: ReportData) -> Curve | None:
    """A figure per frame, with the reference's below it; None if the clip has no numbers."""
    own, reference = entry.curves[name], entry.reference_curves.get(name)
    series = [*([("s-ref", reference)] if reference else []), ("s-test", own)]
    numbers = [x for x in own if x is not None]
    title = data.title(name)
    about = f"{title} per frame, {figure(min(numbers, default=None))} to {figure(max(numbers, default=None))}"
    svg = cell_charts.curve(series, frames, about)
    if svg is None:
        return None
    unit = data.unit(name)
    both = [float(x) for _, values in series for x in values if x is not None]
    return Curve(title, figure(min(both), unit), figure(max(both), unit), svg, bool(reference))


def clips_note(data: ReportData, given: int, shown: int, limit: float) -> str:
    """Which clips the page shows, and why not all.

    Args:
        data: of the report.
        given, shown: number of clips that the report got, and that fit.
        limit: of the page, MB.
    """
    total = max(data.clip_count, given)
    if not given:
        return "No clip is shown: none was handed to the report."
    why = f"; more would make this file larger than {limit:g} MB" if shown < given else ""
    left = "; the others were not handed to the report" if not why and given < total else ""
    return f"{_which(shown, total)}{why}{left}."


def order_words(data: ReportData, by: str | None, shown: int) -> str:
    """How the clips are sorted, behind the heading of their section; empty if they are not."""
    return f", worst {data.title(by)} first" if by and shown > 1 else ""


def _which(shown: int, total: int) -> str:
    if shown < total:
        return f"{count(shown, 'clip')} of {total}"
    return f"All {count(total, 'clip')}" if total > 1 else "The only clip"


def orders(cards: Sequence[ClipCard], data: ReportData) -> list[tuple[str, str, str]]:
    """Name, title and direction of every metric that can sort the clips shown."""
    return [
        (name, data.title(name), metric.better)
        for name, metric in data.metrics.items()
        if metric.better in BADNESS and len(cards) > 1 and all(name in card.numbers for card in cards)
    ]
