"""From clips on disk to a verdict and a report: the half that evaluating and comparing share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reelquant._errors import UnsupportedError
from reelquant._progress import Progress, Silent
from reelquant._version import __version__
from reelquant.evidence import evaluation
from reelquant.evidence.clips import Clip, find_clips
from reelquant.evidence.evaluation import PAIRED_FLOORS, SCHEMA, Evaluation, Result, Sets
from reelquant.evidence.gate import Verdict, check_preset, decide, parse_limits
from reelquant.evidence.machine import machine, peak_memory, versions
from reelquant.evidence.measure import Measuring
from reelquant.evidence.mechanisms import MECHANISMS, Pair, Tools, sources
from reelquant.evidence.metrics import METRICS, select
from reelquant.evidence.store import Store, write_json, write_text
from reelquant.evidence.text import CLIP

if TYPE_CHECKING:
    from reelquant.evidence.report import Panel

SHOWN = 12  # clips in the report


@dataclass
class Options:
    """What evaluating and comparing share; see :func:`evaluate`."""

    metrics: Sequence[str] = ("default",)
    output: Path | None = None
    weights: Path | None = None
    data: Path | None = None
    gate: str | None = None
    fail_under: Sequence[str] | Mapping[str, float] = ()
    clip_model: str = CLIP
    device: str = "cpu"
    reuse: Path | None = None
    sensitivity: Path | None = None
    fid_frames: int = 0
    speed: bool = False
    tests_after: int = 0  # that are evaluated after this one, for the expected time
    resume: bool = False
    force: bool = False
    shared: bool = False
    shown: int = SHOWN
    command: str | None = None
    progress: Progress = field(default_factory=Silent)

    def __post_init__(self) -> None:
        self.names = select(self.metrics)
        self.limits = parse_limits(self.fail_under)
        if self.gate is not None:
            check_preset(self.gate)

    @property
    def wanted(self) -> list[str]:
        """The metrics asked for, those with a limit of their own included."""
        asked = {*self.names, *(limit.metric for limit in self.limits)}
        return [name for name in METRICS if name in asked]


@dataclass
class Times:
    """Seconds per phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Time what happens inside."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - start, 2)


@dataclass(frozen=True)
class Subject:
    """What is judged.

    Attributes:
        clips: variant -> name -> clip; ``reference`` and ``test`` are always there.
        origin: the first fields of the report: kind, reference, test, prompts, seeds, call, quantization, grain_growth.
        prompts, seeds: by the name of the clip, as far as they are known.
        warnings: sentences for the report.
        paired: whether clips of equal names belong together.
        expected: seconds that sampling and measuring were expected to take; None if that was not estimated.
    """

    clips: Mapping[str, Mapping[str, Clip]]
    origin: Mapping[str, Any]
    prompts: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    paired: bool = True
    expected: float | None = None


def judge(options: Options, store: Store, subject: Subject, times: Times) -> Evaluation:
    """Measure every clip, compare the figures with the noise floor and the gate, and write the report if asked to."""
    with times.of("measure"):
        sets, missing = _measured(options, store, subject)
    with times.of("distances"):
        options.progress.phase("distances", 1)
        found = evaluation.results(sets, options.wanted, missing)
    defects = evaluation.defects(sets) if subject.paired else []
    verdict = _verdict(options, found, defects, len(sets.names["test"]))
    data = _report(options, subject, sets, found, defects, verdict, times)
    lossless = data["near_lossless"]
    folder = None if options.output is None else store.root
    made = Evaluation(found, data, verdict, None if lossless is None else lossless["holds"], folder)
    if folder is not None:
        options.progress.phase("write", 1)
        write_report(made, subject.clips, options.shown)
    return made


def seconds_to_measure(options: Options, clip: Clip, text: str | None) -> float:
    """How long it takes to measure a clip, found by measuring it against itself; networks are loaded before the clock starts.

    CLIP is left out: whether it can be had may take a minute to find out, and is found out later anyway.
    """
    tools = Tools(options.weights, options.device, options.clip_model, options.fid_frames)
    asked = [MECHANISMS[source] for source in sources(options.wanted) if source != "clip"]
    able = [one for one in asked if one.missing(tools, [text or ""]) is None]
    for one in able:
        if one.weights is not None:
            tools.network(one.weights)
    frames = clip.read()
    pair = Pair(frames, frames, text, (len(frames), len(frames)))
    start = time.perf_counter()
    for one in able:
        with suppress(UnsupportedError):  # measuring leaves it out, and says why
            if one.figures is not None:
                one.figures(tools, pair)
            if one.features is not None:
                one.features[1](tools, frames)
    return time.perf_counter() - start


def _measured(options: Options, store: Store, subject: Subject) -> tuple[Sets, dict[str, str]]:
    """Measure every clip; also why a source of figures gives nothing."""
    tools = Tools(options.weights, options.device, options.clip_model, options.fid_frames)
    measuring = Measuring(store, tools, sources(options.wanted), subject.prompts, options.progress)
    measuring.missing |= _impossible(options, subject)
    measuring.drop_unavailable()
    _measure(measuring, subject)
    names = {variant: list(found) for variant, found in subject.clips.items()}
    if options.data is not None:
        real = find_clips(options.data)
        measuring.alone("data", real, ("fvd", "fid", "kid"))
        names["data"] = list(real)
    return Sets(store, names, subject.paired), measuring.missing


def _verdict(
    options: Options,
    found: Mapping[str, Result],
    defects: Sequence[Mapping[str, Any]],
    clips: int,
) -> Verdict | None:
    """The gate's decision; None if neither a gate nor a limit was asked for."""
    if options.gate is None and not options.limits:
        return None
    values = {name: result.interval.mean for name, result in found.items() if result.interval is not None}
    missing = {name: result.missing for name, result in found.items() if result.missing}
    return decide(values, missing, defects, clips, options.gate, options.limits)


def _report(
    options: Options,
    subject: Subject,
    sets: Sets,
    found: Mapping[str, Result],
    defects: Sequence[Mapping[str, Any]],
    verdict: Verdict | None,
    times: Times,
) -> dict[str, Any]:
    """The content of ``report.json``."""
    distances = any(name in found and found[name].interval is not None for name in ("fvd", "fvd_data"))
    return {
        "schema": SCHEMA,
        "command": options.command,
        "tool_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **subject.origin,
        "clips": len(sets.names["test"]),
        "metrics": {name: result.to_json() for name, result in found.items()},
        "per_clip": evaluation.clips_json(sets, subject.prompts, subject.seeds),
        "trajectory": evaluation.trajectory(sets),
        "bias": evaluation.bias(sets) if distances else None,
        "near_lossless": evaluation.near_lossless(found),
        "gate": verdict.to_json() if verdict else None,
        "defects": defects,
        "warnings": [*subject.warnings, *evaluation.warnings(found, sets)],
        "machine": machine(),
        "versions": versions(),
        "seconds": times.seconds,
        "expected_seconds": subject.expected,
        "peak_memory_gb": peak_memory(),
    }


def _impossible(options: Options, subject: Subject) -> dict[str, str]:
    """Metrics that these clips cannot have, and why."""
    found = {}
    if subject.origin["kind"] == "compare":
        found["latents"] = "clips on disk have no latents; `reelquant evaluate` measures it"
    if not subject.paired:
        reason = "no clip has the same name in both folders"
        found |= {METRICS[name].source: reason for name in options.wanted if METRICS[name].kind != "distribution"}
    if options.data is None:
        reason = "needs real clips to compare with: --data DIR"
        found |= {name: reason for name in options.wanted if name.endswith("_data")}
    return found


def _measure(measuring: Measuring, subject: Subject) -> None:
    for source in list(measuring.sources):
        if source in measuring.missing:
            measuring.sources.remove(source)
    measuring.alone("reference", subject.clips["reference"])
    for variant, found in subject.clips.items():
        if variant in ("test", *PAIRED_FLOORS) and subject.paired:
            measuring.pairs(variant, subject.clips["reference"], found)
            measuring.latents(variant, found)
        elif variant != "reference":
            measuring.alone(variant, found)


def write_report(made: Evaluation, clips: Mapping[str, Mapping[str, Clip]], shown: int) -> None:
    """``report.json``, ``report.html`` and ``summary.md`` into the evaluation's folder; ``clips`` by variant and name."""
    from reelquant.evidence.report import write

    assert made.folder is not None
    write_json(made.folder / "report.json", made.data)
    write_text(made.folder / "summary.md", made.summary())
    rows = [row for row in worst(made.data["per_clip"]) if row["name"] in clips["reference"]][:shown]
    floor = next((clips[name] for name in PAIRED_FLOORS if name in clips), {})
    panels = [_panel(row, clips["reference"], clips["test"], floor) for row in rows]
    write(made.data, [panel for panel in panels if panel is not None], made.folder / "report.html")


def _panel(row: Mapping[str, Any], reference: Mapping[str, Clip], test: Mapping[str, Clip], floor: Mapping[str, Clip]) -> Panel | None:
    """Clips side by side; None if they differ in size, as clips of folders that are compared as sets may."""
    from reelquant.evidence.report import Panel

    name = row["name"]
    both = [reference[name].read(), test[name].read(), *([floor[name].read()] if name in floor else [])]
    if len({clip.shape[1:] for clip in both}) > 1:
        return None
    frames = min(map(len, both))
    float_, quantized, *third = (clip[:frames] for clip in both)
    return Panel(name, row["prompt"], row["seed"], row["figures"], float_, quantized, floor=third[0] if third else None)


def worst(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Clips by PSNR, the lowest first; in order of their names where it was not measured."""
    return sorted(rows, key=lambda row: row["figures"].get("psnr", 0.0))
