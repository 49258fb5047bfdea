"""The table of several tests: a row each, as text for notebooks, Markdown and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reelquant._markup import escaped
from reelquant._numbers import NOTHING, count, figure, size
from reelquant.evidence.metrics import METRICS
from reelquant.evidence.report.data import Number, Part, ReportData, SideData
from reelquant.evidence.report.sentences import defect_words

HEADS = ("test", "weights", "quality", "worst clip", "motion", "speed", "gate")
GATE = {True: "passed", False: "failed", None: "no gate"}
MOTION = "motion_deviation"


class WorstData(Part):
    """The clip that a test changes most."""

    name: str | None = None
    value: Number = None


class TestData(ReportData):
    """A test: what is kept of its report, and where the whole of it lies."""

    name: str = "unnamed"
    folder: str | None = None
    worst_clip: WorstData = WorstData()

    @property
    def stored(self) -> float | None:
        """Bytes of all weights, or of the denoiser where only those are known."""
        return self.bytes.test or (self.quantization.bytes_model if self.quantization else None)

    @property
    def smaller(self) -> float | None:
        """How many times smaller than float."""
        before = self.bytes.reference if self.bytes.test else (self.quantization.bytes_model_float if self.quantization else None)
        return before / self.stored if before and self.stored else None

    @property
    def speedup(self) -> float | None:
        """How many times as fast as float a clip is made; None if that was not measured."""
        return None if self.speed is None else self.speed.speedup.median


class SeveralData(Part):
    """The content of the ``report.json`` of several tests."""

    tool_version: str | None = None
    created: str | None = None
    command: str | None = None
    reference: SideData = SideData()
    clips: Number = None
    quality: str | None = None
    tests: tuple[TestData, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A cell: what is shown, a smaller line below it, and what it is sorted by (empty: unknown)."""

    text: str
    more: str = ""
    value: Any = ""


def summary_cells(data: SeveralData) -> list[list[Cell]]:
    """A row for each test, a cell for each of :data:`HEADS`."""
    return [_row(data, test) for test in data.tests]


def _row(data: SeveralData, test: TestData) -> list[Cell]:
    name = data.quality or ""
    unit, digits = (METRICS[name].unit, METRICS[name].digits) if name in METRICS else ("", None)
    quality, motion = test.metrics.get(name), test.metrics.get(MOTION)
    worst = test.worst_clip
    speed = test.speed.speedup if test.speed else None
    gate = test.gate.passed if test.gate else None
    return [
        Cell(test.name, (test.test.recipe or "") if test.test.recipe != test.name else "", test.name),
        Cell(size(test.stored), f"{test.smaller:.2f}\u00d7 smaller" if test.smaller else "", _plain(test.stored)),
        Cell(figure(quality.value, unit, digits), quality.range_text(digits), _plain(quality.value)) if quality else Cell(NOTHING),
        Cell(figure(worst.value, unit, digits), f"clip {worst.name}" if worst.name else "", _plain(worst.value)),
        Cell(_signed(motion.value), "", _plain(abs(motion.value or 0.0))) if motion else Cell(NOTHING),
        Cell(f"{speed.median:.2f}\u00d7", f"{figure(speed.low)} to {figure(speed.high)}", speed.median)
        if speed and speed.median is not None
        else Cell(NOTHING, "not measured"),
        Cell(GATE[gate], _missed(test), GATE[gate]),
    ]


def _plain(value: Any) -> Any:
    return "" if value is None else value


def _signed(share: float | None) -> str:
    """A deviation as a change in per cent."""
    if share is None:
        return NOTHING
    text = figure(100 * share, "%", 1)
    return f"+{text}" if share > 0 and not text.startswith("0.0") else text


def _missed(test: TestData) -> str:
    failures = test.gate.failures if test.gate else ()
    found = [name for failure in failures for name in (failure.looks_like or test.title(failure.metric)).split(", ")]
    names = list(dict.fromkeys(map(defect_words, found)))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def heads(data: SeveralData) -> tuple[str, ...]:
    """Headings of the columns, with the name of the metric."""
    quality = METRICS[data.quality].title if data.quality in METRICS else "quality"
    return ("test", "weights", quality, "worst clip", "motion", "speed", "gate")


def summary_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """The table as text."""
    return [
        [cell.text + (f" ({cell.more})" if cell.more else "") for cell in row] for row in summary_cells(SeveralData.model_validate(data))
    ]


def markdown(data: Mapping[str, Any]) -> str:
    """A summary to paste into a pull request."""
    found = SeveralData.model_validate(data)
    reference = " ".join(filter(None, (found.reference.name, found.reference.dtype)))
    lines = [f"### {count(len(found.tests), 'quantized pipeline')} against {escaped(reference or 'float')}", ""]
    lines += [f"| {' | '.join(heads(found))} |", f"|---|{'---:|' * (len(HEADS) - 2)}---|"]
    lines += [f"| {' | '.join(escaped(text) for text in row)} |" for row in summary_rows(data)]
    clips = count(int(found.clips or 0), "clip")
    return "\n".join([*lines, "", f"{clips}, the same texts and noise for all; intervals are 95 % over clips.", ""])
