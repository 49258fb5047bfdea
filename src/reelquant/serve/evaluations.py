"""The evaluations in a served folder: the verdict of each, and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelquant._errors import CheckpointError, nearest
from reelquant._numbers import figure
from reelquant.serve.files import read_object
from reelquant.serve.folder import PAGE, REPORT, Folder

KEYS = (("psnr", "PSNR"), ("ssim", "SSIM"), ("motion_deviation", "motion"))  # figures of the list, as far as they were measured


@dataclass(frozen=True)
class Row:
    """One evaluation.

    Attributes:
        name: of its folder, relative to the served one.
        title: what was compared.
        tone: ``good``, ``bad`` or ``none``.
        verdict: of the gate, and whether quantization stays within the noise floor.
        figures: names and values.
        about: clips, recipe, date.
    """

    name: str
    title: str
    tone: str
    verdict: str
    figures: list[tuple[str, str]]
    about: str


def rows(folder: Folder) -> list[Row]:
    """Every evaluation, newest first. The page's own JSON is read; a field of another shape counts as missing."""
    return [_row(name, read_object(folder.root / name / REPORT)) for name in folder.evaluations()]


def report(folder: Folder, name: str) -> Path:
    """The HTML file of an evaluation.

    Raises:
        CheckpointError: if there is none, or it lies outside of the folder.
    """
    path = folder.inside(f"{name}/{PAGE}")
    known = folder.evaluations()
    if name not in known or path != folder.root / name / PAGE:
        raise CheckpointError(f"no evaluation '{name:.200}' in the served folder; {nearest(name, known)}")
    return path


def _row(name: str, data: Mapping[str, Any]) -> Row:
    test, reference, gate, lossless = (_part(data, key) for key in ("test", "reference", "gate", "near_lossless"))
    passed, holds = gate.get("passed") is True, lossless.get("holds")
    tone = ("good" if passed else "bad") if gate else "none"
    verdict = [f"gate {gate.get('preset')} {'passed' if passed else 'failed'}"] if gate else []
    verdict += ["near-lossless" if holds else "not near-lossless"] if isinstance(holds, bool) else []
    defects = data.get("defects")
    verdict += [f"{one.get('name')} seen" for one in defects[:2] if isinstance(one, dict)] if isinstance(defects, list) else []
    metrics = _part(data, "metrics")
    figures = [
        (title, figure(_part(metrics, key).get("value"), _part(metrics, key).get("unit") or "")) for key, title in KEYS if key in metrics
    ]
    about = [f"{data.get('clips')} clips", str(test.get("recipe") or ""), str(data.get("created") or "")[:16].replace("T", " ")]
    title = f"{_last(test.get('name'))} against {_last(reference.get('name'))}"
    return Row(name, title, tone, ", ".join(filter(None, verdict)) or "no gate", figures, " · ".join(filter(None, about)))


def _part(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = data.get(key)
    return found if isinstance(found, dict) else {}


def _last(name: Any) -> str:
    return str(name or "unknown").rstrip("/").rsplit("/", 1)[-1]
