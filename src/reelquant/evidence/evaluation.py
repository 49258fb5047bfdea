"""From rows and features to an evaluation: means, intervals, the noise floor beside them, verdicts, report.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelquant._errors import CheckpointError, printable
from reelquant._markup import table
from reelquant._numbers import count, figure, significant
from reelquant._sums import OWN, json_sum
from reelquant.evidence import distribution
from reelquant.evidence.defects import diagnose
from reelquant.evidence.fidelity import Interval, bootstrap
from reelquant.evidence.gate import Limit, Verdict, around
from reelquant.evidence.metrics import FEW, METRICS, Metric
from reelquant.evidence.store import Store, write_json

SCHEMA = 1
PAIRED_FLOORS = ("bf16", "rounded", "float32", "compiled")  # the float pipeline again from the same noise, computed otherwise
DRAWN_FLOOR = "reseed"  # the float pipeline again from other noise
DISTANCES = {
    "fvd": ("i3d", distribution.frechet),
    "fid": ("inception", distribution.frechet),
    "kid": ("inception", lambda reference, test: distribution.kernel_distance(reference, test)[0]),
}
LATENTS = "latent_error"
SHOWN = 4  # figures in one line about an evaluation
TO_DATA = "_data"  # how names of distances to real clips end
GROUPS = {"i3d": 20, "inception": 6}  # of the jackknife; distances of 2048 columns take seconds each


@dataclass
class Result:
    """One figure of the test clips, with the reference and the noise floor beside it.

    Attributes:
        metric: what it is.
        interval: mean over clips, or distance of the sets, with its 95 % interval; None if it is missing.
        reference: the reference's own figure, for figures that a clip has alone.
        floor: the same figure of the float pipeline run again, by variant.
        within_floor: no worse than the floor's interval allows; None if there is no floor or neither direction is
            better.
        allowed: what the floor's interval allows; None like ``within_floor``.
        missing: the reason why a value is missing, with the command that helps.
        to_data: a distance to real clips rather than to the reference's.
    """

    metric: Metric
    interval: Interval | None = None
    reference: float | None = None
    floor: dict[str, Interval] = field(default_factory=dict)
    within_floor: bool | None = None
    allowed: Limit | None = None
    missing: str | None = None
    to_data: bool = False

    def figure(self, value: float | None) -> str:
        """A value of this metric for people."""
        return figure(value, self.metric.unit, self.metric.digits)

    @property
    def words(self) -> str:
        """The figure for people; a dash if it is missing."""
        return self.figure(None if self.interval is None else self.interval.mean)

    @property
    def range(self) -> str:
        """The interval for people; empty if the figure is missing."""
        ends = () if self.interval is None else (self.interval.low, self.interval.high)
        return " to ".join(figure(end, "", self.metric.digits) for end in ends)

    def _limit_digits(self, limit: Limit) -> int:
        """Decimals that leave two digits of a small limit."""
        ends = [abs(end) for end in (limit.low, limit.high) if end]
        return max(self.metric.digits, min(6, significant(min(ends, default=1.0)) - 1))

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        about = {name: getattr(self.metric, name) for name in ("title", "kind", "unit", "better", "about", "digits")}
        bounds = _bounds(self.interval) if self.interval else {"value": None, "low": None, "high": None}
        floor = {variant: _bounds(interval) for variant, interval in self.floor.items()}
        limit = None if self.allowed is None else self.allowed.words(self._limit_digits(self.allowed))
        beside = {"reference": self.reference, "floor": floor, "within_floor": self.within_floor, "floor_limit": limit}
        return about | bounds | beside | {"missing": self.missing}


def _bounds(interval: Interval) -> dict[str, float]:
    return {"value": interval.mean, "low": interval.low, "high": interval.high}


@dataclass(repr=False)
class Evaluation:
    """The result of an evaluation: figures, verdict, report.

    Attributes:
        metrics: results by name; those that could not be measured say why.
        data: the content of ``report.json`` (schema: docs/report.md).
        verdict: of the gate; None if none was asked for.
        near_lossless: every figure within the noise floor; None if no floor was measured.
        folder: where clips and the report lie; None if nothing was kept.
    """

    metrics: dict[str, Result]
    data: dict[str, Any]
    verdict: Verdict | None = None
    near_lossless: bool | None = None
    folder: Path | None = None

    @property
    def passed(self) -> bool:
        """Whether the gate lets it through; True if there is none."""
        return self.verdict is None or self.verdict.passed

    def __getitem__(self, name: str) -> float | None:
        """The value of a metric; None if it is missing."""
        found = self.metrics[name].interval
        return None if found is None else found.mean

    def __repr__(self) -> str:
        measured = [f"{result.metric.title} {result.words}" for result in self.metrics.values() if result.interval is not None]
        more = [f"{len(measured) - SHOWN} more"] if len(measured) > SHOWN else []
        figures = ", ".join([*measured[:SHOWN], *more]) or "nothing measured"
        return printable(f"Evaluation({self._sides}: {figures}; {self._gate})")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        head = ("metric", "value", "95 % interval", "noise floor", "within it")
        answers = {True: "yes", False: "no", None: ""}
        rows = [
            (
                result.metric.title,
                result.words,
                result.range or result.missing or "",
                ", ".join(f"{name} {result.figure(floor.mean)}" for name, floor in result.floor.items()),
                answers[result.within_floor],
            )
            for result in self.metrics.values()
        ]
        kept = [f"Report: {self.folder / 'report.html'}"] if self.folder is not None else []
        failures = [failure.sentence for failure in self.verdict.failures] if self.verdict is not None else []
        return table(f"{self._sides}; {self._gate}", rows, head, [*failures, *self.data.get("warnings", ()), *kept])

    @property
    def _sides(self) -> str:
        test, reference = (self.data.get(side, {}).get("name") or side for side in ("test", "reference"))
        return f"{test} against {reference}, {count(self.data.get('clips') or 0, 'clip')}"

    @property
    def _gate(self) -> str:
        return "no gate" if self.verdict is None else f"gate {self.verdict.preset}: {'passed' if self.passed else 'missed'}"

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return self.data

    def summary(self) -> str:
        """A Markdown summary to paste into a pull request."""
        from reelquant.evidence.report.markdown import summary

        return summary(self.data)

    def save(self, path: str | Path) -> None:
        """Write ``report.json``."""
        write_json(Path(path), self.data)


# --- figures over clips -----------------------------------------------------------------------------------------------


@dataclass
class Sets:
    """The measured variants of one evaluation.

    Attributes:
        store: where rows and features are.
        names: of the clips, by variant; ``test`` and ``reference`` are always there, ``data`` if real clips were given.
        paired: whether clips of equal names belong together.
    """

    store: Store
    names: Mapping[str, Sequence[str]]
    paired: bool = True

    def __post_init__(self) -> None:
        self.rows = {variant: self.store.rows(variant) for variant in self.names}

    @property
    def floors(self) -> list[str]:
        """Variants that are the float pipeline run again."""
        return [name for name in (*PAIRED_FLOORS, DRAWN_FLOOR) if name in self.names]

    def values(self, variant: str, metric: str) -> list[float]:
        """The figure of every clip that has it."""
        rows = self.rows.get(variant, {})
        return [rows[name]["figures"][metric] for name in self.names[variant] if metric in rows.get(name, {"figures": {}})["figures"]]

    def mean(self, variant: str, metric: str) -> Interval | None:
        """Mean over clips with its bootstrap interval."""
        values = self.values(variant, metric)
        return bootstrap(values) if values else None

    def distance(self, variant: str, metric: str) -> Interval | None:
        """Distance of a variant's features to those of the reference or of real clips, with its jackknife interval."""
        source = METRICS[metric].source
        kind, distance = DISTANCES[source]
        other = "data" if metric.endswith(TO_DATA) else "reference"
        if other not in self.names or other == variant:
            return None
        first, second = self.features(other, kind), self.features(variant, kind)
        if len(first) < 2 or len(second) < 2:
            return None
        together = other == "reference" and self.paired and variant != DRAWN_FLOOR and len(first) == len(second)
        return Interval(*distribution.jackknife(first, second, distance, GROUPS[kind], together=together))

    def features(self, variant: str, kind: str) -> list[Tensor]:
        """What a network saw, a tensor per clip; empty unless every clip has been looked at."""
        names = self.names[variant]
        return [self.store.get(kind, variant, name) for name in names] if all(self.store.has(kind, variant, name) for name in names) else []


def results(sets: Sets, metrics: Sequence[str], missing: Mapping[str, str]) -> dict[str, Result]:
    """Every metric asked for, measured or missing.

    Args:
        sets: the variants.
        metrics: names.
        missing: why a source of figures, or one metric, gives nothing.
    """
    found = {}
    for name in metrics:
        metric = METRICS[name]
        reason = missing.get(name) or missing.get(metric.source)
        look = sets.distance if metric.kind == "distribution" else sets.mean
        result = Result(metric, None if reason else look("test", name), missing=reason, to_data=name.endswith(TO_DATA))
        if result.interval is None:
            result.missing = reason or "no clip gives this figure"
        else:
            own = look("reference", name)
            result.reference = None if own is None else own.mean
            result.floor = {variant: floor for variant in _floors(metric, sets.floors) if (floor := look(variant, name)) is not None}
            result.allowed = _allowed(name, result)
            result.within_floor = None if result.allowed is None else result.allowed.allows(result.interval.mean)
        found[name] = result
    return found


def _floors(metric: Metric, floors: Sequence[str]) -> list[str]:
    """Clips of other noise differ: compare only sets of them, and figures that need no reference."""
    return [name for name in floors if name != DRAWN_FLOOR or metric.kind in ("distribution", "text") or metric.better == "none"]


def _allowed(name: str, result: Result) -> Limit | None:
    """What is no worse than the far end of the floor's interval.

    Clips of the same noise are compared with float clips of the same noise, distances to real data with another draw
    of the float pipeline: that is what each of them would be if quantization changed nothing that matters.
    """
    same = [result.floor[floor] for floor in PAIRED_FLOORS if floor in result.floor]
    drawn = [result.floor[DRAWN_FLOOR]] if DRAWN_FLOOR in result.floor else []
    floors = (drawn or same) if result.to_data else (same or drawn)
    if not floors:
        return None
    low, high = min(floor.low for floor in floors), max(floor.high for floor in floors)
    shapes = {
        "higher": lambda: Limit(name, low=low),
        "lower": lambda: Limit(name, high=high),
        "zero": lambda: around(name, 0.0, max(abs(low), abs(high))),
        "one": lambda: around(name, 1.0, max(abs(low - 1), abs(high - 1))),
    }
    shape = shapes.get(result.metric.better)
    return shape() if shape else None


def near_lossless(found: Mapping[str, Result]) -> dict[str, Any] | None:
    """Whether every figure is within the noise floor; None if no figure has a floor."""
    judged = {name: result.within_floor for name, result in found.items() if result.within_floor is not None}
    if not judged:
        return None
    failed = [name for name, within in judged.items() if not within]
    worse = ", ".join(METRICS[name].title for name in failed)
    why = f"all {len(judged)} figures that have a noise floor are within it" if not failed else f"outside the noise floor: {worse}"
    return {"holds": not failed, "failed": failed, "judged": list(judged), "why": why}


def defects(sets: Sets) -> list[dict[str, Any]]:
    """Defects recognised in the test clips: name, clips, and the sentence about the strongest."""
    found: dict[str, list[tuple[float, str, str]]] = {}
    for name in sets.names["test"]:
        row = sets.rows["test"].get(name)
        for defect in diagnose({"tempo": 1.0} | row["figures"]) if row and "temporal" in row["sources"] else []:
            found.setdefault(defect.name, []).append((defect.strength, name, defect.sentence))
    return [{"name": defect, "clips": [clip for _, clip, _ in hits], "sentence": max(hits)[2]} for defect, hits in found.items()]


def trajectory(sets: Sets) -> dict[str, Any] | None:
    """Relative error of the latents after every step, mean over clips with intervals; None without stored latents."""
    variants = [name for name in ("test", *sets.floors) if name != DRAWN_FLOOR]
    curves = {name: [row["curves"][LATENTS] for row in sets.rows[name].values() if LATENTS in row["curves"]] for name in variants}
    curves = {name: lines for name, lines in curves.items() if lines}
    if "test" not in curves:
        return None
    described = {name: _curve(lines) for name, lines in curves.items()}
    return {
        "steps": list(range(1, len(described["test"]["mean"]) + 1)),
        "clips": len(curves["test"]),
        "test": described["test"],
        "floor": {name: line for name, line in described.items() if name != "test"},
        "about": "distance of the latents to the reference's after each denoising step, over their length",
    }


def _curve(lines: list[list[float]]) -> dict[str, list[float]]:
    columns = [bootstrap(list(column), resamples=500) for column in zip(*lines, strict=True)]
    return {name: [getattr(column, name) for column in columns] for name in ("mean", "low", "high")}


def bias(sets: Sets) -> dict[str, Any] | None:
    """FVD against the number of clips, for the largest of the sets that was asked for; None below 16 clips."""
    other = "data" if "data" in sets.names and sets.features("data", "i3d") else "reference"
    first, second = sets.features(other, "i3d"), sets.features("test", "i3d")
    count = min(len(first), len(second))
    if count < 16:
        return None
    sizes = [size for size in (8, 16, 32, 64, 128, 256, 512, 1024) if size <= count]
    sizes += [count] if count not in sizes else []
    reference, test = torch.cat(first), torch.cat(second)
    curve = distribution.bias_curve(reference, test, sizes)
    return {
        "metric": "fvd_data" if other == "data" else "fvd",
        "sizes": [point[0] for point in curve],
        "values": [point[1] for point in curve],
        "sd": [point[2] for point in curve],
        "extrapolated": distribution.extrapolated(curve[-4:]) if len(curve) > 3 else None,
    }


def warnings(found: Mapping[str, Result], sets: Sets) -> list[str]:
    """Limits of the figures that a reader has to know."""
    few = [METRICS[name].title for name, result in found.items() if METRICS[name].kind == "distribution" and result.interval is not None]
    count = min(len(names) for names in sets.names.values())
    if not few or count >= FEW:
        return []
    return [
        f"{', '.join(few)} of {count} clips: distances between sets are biased by their size below {FEW} clips; "
        "compare them only with distances of as many clips"
    ]


def clips_json(sets: Sets, prompts: Mapping[str, str], seeds: Mapping[str, int]) -> list[dict[str, Any]]:
    """Per clip: figures and curves of the test clip, curves of the reference."""
    return [_clip_json(sets, name, prompts.get(name), seeds.get(name)) for name in sets.names["test"]]


def _clip_json(sets: Sets, name: str, prompt: str | None, seed: int | None) -> dict[str, Any]:
    row = sets.rows["test"].get(name, {"figures": {}, "curves": {}})
    return {
        "name": name,
        "prompt": prompt,
        "seed": seed,
        "figures": row["figures"],
        "curves": row["curves"],
        "reference_curves": sets.rows["reference"].get(name, {"curves": {}})["curves"],
    }


def load(path: str | Path) -> dict[str, Any]:
    """Read a ``report.json``.

    Raises:
        CheckpointError: if the file cannot be read, is not a JSON object, or was changed.
    """
    hint = "delete it, or quantize again to get a new one"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read '{path}' ({error}); {hint}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"'{path}' must hold a JSON object, got {found!r:.60}; {hint}")
    if OWN in found and found[OWN] != json_sum(found):
        raise CheckpointError(f"'{path}' is not what was written: its SHA-256 sum differs; {hint}")
    return found
