"""What the pages of one test and of several share: templates, the content security policy, and the section of clips."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from reelquant import _numbers as numbers
from reelquant._errors import MeasurementError
from reelquant.evidence.report.clip_cards import ClipCard
from reelquant.evidence.report.panels import Embedded, Panel, best_gain, embed_within
from reelquant.evidence.report.sentences import defect_words

SCRIPTS = ("report.js", "blind.js")
FLOOR = "noise floor (float again)"


@dataclass(frozen=True)
class View:
    """One picture of a clip: its place in the video, its caption, and ``reference``, ``test``, ``difference`` or ``floor``."""

    k: int
    label: str
    kind: str


def views(panels: Sequence[Panel], reference: str, tests: Sequence[str], gain: int) -> list[View]:
    """What every clip of a page shows; see :meth:`~reelquant.evidence.report.panels.Panel.pictures`."""
    named = [(reference, "reference"), *((name, "test") for name in tests)]
    named += [(f"difference \u00d7{gain}", "difference")] if len(tests) == 1 else []
    named += [(FLOOR, "floor")] if panels and panels[0].floor is not None else []
    return [View(k, *one) for k, one in enumerate(named)]


def check_panels(panels: Sequence[Panel]) -> None:
    """Refuse clips that cannot stand on one page.

    Raises:
        MeasurementError: if two have one name, or some show more pictures than others.
    """
    names = [panel.name for panel in panels]
    if len(set(names)) != len(names):
        twice = sorted(name for name in set(names) if names.count(name) > 1)
        raise MeasurementError(f"clips of a report need different names; got several called {', '.join(twice[:4])}")
    if len({panel.count for panel in panels}) > 1:
        raise MeasurementError("clips of a report show equally many pictures; give each of them a noise floor, or none")


@dataclass(frozen=True)
class ClipSection:
    """The clips of a page.

    Attributes:
        cards: one per clip, the worst first.
        orders: name, title and direction of each metric that can sort them.
        order_words: how they are sorted now, behind the heading.
        views: the pictures of each clip.
        frames: of the longest clip.
        gain: amplification of the difference.
        fps: frames per second.
    """

    cards: Sequence[ClipCard]
    orders: Sequence[tuple[str, str, str]]
    order_words: str
    views: Sequence[View]
    frames: int
    gain: int
    fps: float


def embedded(panels: Sequence[Panel], limit_mb: float, raw: Mapping[str, Any], fps: float) -> tuple[int, list[Embedded]]:
    """The gain of the difference, and as many clips, in order, as fit into a page beside its data."""
    gain = best_gain(panels)
    spare = 150_000 + 6 * len(json.dumps(raw))  # more characters than the page takes without its clips
    return gain, embed_within(panels, gain, fps, max(0.0, limit_mb * 1e6 - spare))


# ---------------------------------------------------------------------------------------------------------------- files


@functools.cache
def resource(name: str) -> str:
    """A text file that lies beside this module."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def rendered(template: str, **given: Any) -> str:
    """A page from one of the templates that lie beside this module."""
    script, style = "".join(map(resource, SCRIPTS)), resource("report.css")
    given |= {"policy": policy(script, style), "script": Markup(script), "style": Markup(style)}
    return templates().get_template(template).render(**given)


def policy(script: str, style: str) -> str:
    """The content security policy: nothing is loaded, and only this script and this style sheet run."""
    hashes = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in (script, style)]
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; "
        "media-src blob:; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def templates() -> Environment:
    """Jinja with escaping on: only :class:`~markupsafe.Markup` made by this package is inserted as it is."""
    found = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(resource))
    found.filters["count"] = numbers.count
    found.filters["defect"] = defect_words
    return found
