"""The two verbs of evidence: evaluate a quantized pipeline against its float original, and compare two folders of clips."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from reelquant._errors import CalibrationError, RecipeError
from reelquant._progress import Progress, Silent
from reelquant._version import __version__
from reelquant.evidence import evaluation
from reelquant.evidence.clips import Clip, find_clips, unpaired
from reelquant.evidence.evaluation import PAIRED_FLOORS, SCHEMA, Evaluation, Sets
from reelquant.evidence.gate import check_preset, decide, parse_limits
from reelquant.evidence.grain import FLAT, growth
from reelquant.evidence.machine import machine, peak_memory, versions
from reelquant.evidence.measure import Measuring
from reelquant.evidence.mechanisms import MECHANISMS, Tools, sources
from reelquant.evidence.metrics import METRICS, select
from reelquant.evidence.sampling import Job, Source, Variant, floors
from reelquant.evidence.store import Store, write_json, write_text
from reelquant.evidence.text import CLIP
from reelquant.models.pipelines import locate
from reelquant.models.prompts import Prompt, bundled_prompts
from reelquant.models.sampling import folder_notes, notes
from reelquant.models.shapes import evaluation_prompts, flat_captions, understood

SEED = 50_000  # noise of the first clip
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
    fid_frames: int = 0
    resume: bool = False
    force: bool = False
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


# --- two pipelines ----------------------------------------------------------------------------------------------------


def evaluate(
    test: Any, reference: Any, prompts: Sequence[str | Prompt] | None = None, *, clips: int = 16, seed: int = SEED,
    floor: Sequence[str] | None = None, grain_steps: Sequence[int] = (), batch: int | None = None,
    dtype: torch.dtype = torch.float32, options: Options | None = None,
    **call: Any,
) -> Evaluation:  # fmt: skip
    """Sample both pipelines and the noise floor, measure, judge, report; see :func:`reelquant.api.evaluate`."""
    options = options or Options()
    if clips < 1:
        raise RecipeError(f"clips: got {clips}; evaluate at least 1")
    float_ = Source(reference, dtype, options.device)
    quantized = Source(test, dtype, options.device)
    own = _notes(reference)
    texts = _texts(prompts, own, clips)
    variants = floors(_default_floor(options, dtype) if floor is None else [name for name in floor if name != "none"], float_)
    everything = {
        "reference": Variant(float_, words="float"),
        "test": Variant(quantized, words="quantized"),
        **variants,
    }
    call = own.get("call", {}) | {key: value for key, value in call.items() if value is not None}
    numbers = [seed + i if text.seed is None else text.seed for i, text in enumerate(texts)]
    texts = [text.text for text in texts]
    batch = batch or (4 if own else 1)
    settings = {"kind": "evaluate", "reference": float_.identity, "test": quantized.identity, "dtype": str(dtype).removeprefix("torch."),
                "prompts": texts, "seeds": numbers, "call": call, "batch": batch}  # fmt: skip
    with _store(options, settings) as store:
        times = Times()
        job = Job(store, texts, numbers, call, batch, options.progress)
        for name, variant in everything.items():
            with times.of(f"sample {variant.words}"):
                job.make(name, variant)
        grain = None
        if grain_steps:
            with times.of("grain against steps"):
                flat = flat_captions() if understood(own.get("prompts", ())) else FLAT
                grain = growth(job, {name: everything[name] for name in ("reference", "test")}, grain_steps, flat)
        names = job.names
        facts = {
            "kind": "evaluate",
            "reference": {"name": float_.name, "dtype": settings["dtype"]},
            "test": {"name": quantized.name, "recipe": None},
            "prompts": texts, "seeds": numbers, "call": call,
            "quantization": _proof(test), "grain_growth": grain,
        }  # fmt: skip
        if facts["quantization"]:
            facts["test"]["recipe"] = facts["quantization"].get("recipe")
        made = {name: job.clips(name) for name in everything}
        return _judge(
            options,
            store,
            made,
            dict(zip(names, texts, strict=True)),
            dict(zip(names, numbers, strict=True)),
            facts,
            times,
        )


def _notes(model: Any) -> dict[str, Any]:
    return folder_notes(locate(model)) if isinstance(model, str | Path) else notes(model)


def _texts(prompts: Sequence[str | Prompt] | None, own: Mapping[str, Any], clips: int) -> list[Prompt]:
    """One text per clip: those given, captions of the bundled world for its pipelines, or the bundled video prompts; repeated to fill."""
    if prompts is not None:
        given: Sequence[str | Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        if not given:
            raise CalibrationError("no prompts: give at least one text")
    elif understood(own.get("prompts", ())):
        given = evaluation_prompts(clips)
    else:
        given = bundled_prompts()
    whole = [text if isinstance(text, Prompt) else Prompt(text) for text in given]
    again = [replace(text, seed=None) for text in whole]  # a seed of the file serves the first clip of its text only
    return [(whole if i < len(given) else again)[i % len(given)] for i in range(clips)]


def _default_floor(options: Options, dtype: torch.dtype) -> list[str]:
    """The float pipeline in the other precision; from other noise as well where sets of clips are compared."""
    tools = Tools(options.weights)
    sets = [METRICS[name].source for name in options.wanted if METRICS[name].kind == "distribution"]
    drawn = any(MECHANISMS[source].missing(tools, None) is None for source in sets)
    return ["bf16" if dtype == torch.float32 else "compiled", *(["reseed"] if drawn else [])]


def _proof(test: Any) -> dict[str, Any] | None:
    """The report that quantizing left in the folder of the pipeline."""
    file = Path(str(test)) / "report.json" if isinstance(test, str | Path) else Path()
    return evaluation.load(file) if file.is_file() else None


# --- two folders ------------------------------------------------------------------------------------------------------


def compare(
    reference: str | Path, test: str | Path, prompts: Mapping[str, str] | None = None, *, options: Options | None = None
) -> Evaluation:
    """Measure a folder of clips against another; see :func:`reelquant.api.compare`."""
    options = options or Options()
    sets = {"reference": find_clips(reference), "test": find_clips(test)}
    alone = unpaired(**sets)
    pairs = [name for name in sets["test"] if name in sets["reference"]]
    whole = all(METRICS[name].kind == "distribution" for name in options.wanted)
    notes = [] if whole or not alone else [f"{len(alone)} clips have no partner of the same name and are left out: {', '.join(alone[:5])}"]
    if not pairs and not whole and not any(METRICS[name].kind == "distribution" for name in options.wanted):
        raise CalibrationError(
            f"no clip of '{test}' is called like a clip of '{reference}' ({', '.join(alone[:4])} ...); "
            "clips are paired by name, or ask for metrics of whole sets: --metrics fvd,fid,kid"
        )
    if pairs and not whole:
        sets = {variant: {name: clips[name] for name in pairs} for variant, clips in sets.items()}
    settings = {"kind": "compare", "reference": _identity(sets["reference"]), "test": _identity(sets["test"])}
    with _store(options, settings) as store:
        facts = {
            "kind": "compare",
            "reference": {"name": str(reference)},
            "test": {"name": str(test)},
            "prompts": list((prompts or {}).values()),
            "seeds": [], "call": {}, "quantization": None, "grain_growth": None, "warnings": notes,
        }  # fmt: skip
        together = not alone if whole else bool(pairs)
        return _judge(options, store, sets, dict(prompts or {}), {}, facts, Times(), paired=together)


def _identity(clips: Mapping[str, Clip]) -> list[str]:
    return [f"{name} {sum(file.stat().st_size for file in clip.files)} {clip.files[0].stat().st_mtime_ns}" for name, clip in clips.items()]


# --- both -------------------------------------------------------------------------------------------------------------


@contextmanager
def _store(options: Options, settings: Mapping[str, Any]) -> Iterator[Store]:
    """The folder that was asked for, or one that goes when the evaluation is done."""
    if options.output is not None:
        store = Store(options.output)
        store.begin(settings, resume=options.resume, force=options.force)
        if options.reuse is not None:
            store.borrow(options.reuse, settings)
        yield store
        return
    with tempfile.TemporaryDirectory(prefix="reelquant-") as folder:
        yield Store(Path(folder))


def _judge(
    options: Options, store: Store, clips: Mapping[str, Mapping[str, Clip]], prompts: Mapping[str, str], seeds: Mapping[str, int],
    facts: dict[str, Any], times: Times, *, paired: bool = True,
) -> Evaluation:  # fmt: skip
    tools = Tools(options.weights, options.device, options.clip_model, options.fid_frames)
    measuring = Measuring(store, tools, sources(options.wanted), prompts, options.progress)
    measuring.missing |= _impossible(options, facts["kind"], paired)
    measuring.drop_unavailable()
    names = {variant: list(found) for variant, found in clips.items()}
    with times.of("measure"):
        _measure(measuring, clips, paired)
        if options.data is not None:
            real = find_clips(options.data)
            measuring.alone("data", real, ("fvd", "fid", "kid"))
            names["data"] = list(real)
    sets = Sets(store, names, paired)
    with times.of("distances"):
        options.progress.phase("distances", 1)
        found = evaluation.results(sets, options.wanted, measuring.missing)
    recognised = evaluation.defects(sets) if paired else []
    values = {name: result.interval.mean for name, result in found.items() if result.interval is not None}
    missing = {name: result.missing for name, result in found.items() if result.missing}
    judged = options.gate is not None or options.limits
    verdict = decide(values, missing, recognised, len(names["test"]), options.gate, options.limits) if judged else None
    lossless = evaluation.near_lossless(found)
    data = {
        "schema": SCHEMA, "command": options.command, "tool_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **{key: value for key, value in facts.items() if key != "warnings"},
        "clips": len(names["test"]),
        "metrics": {name: result.to_json() for name, result in found.items()},
        "per_clip": evaluation.clips_json(sets, prompts, seeds),
        "trajectory": evaluation.trajectory(sets),
        "bias": evaluation.bias(sets) if "fvd" in values or "fvd_data" in values else None,
        "near_lossless": lossless,
        "gate": verdict.to_json() if verdict else None,
        "defects": recognised,
        "warnings": facts.get("warnings", []) + evaluation.warnings(found, sets),
        "machine": machine(), "versions": versions(), "seconds": times.seconds, "peak_memory_gb": peak_memory(),
    }  # fmt: skip
    kept = options.output is not None
    made = Evaluation(found, data, verdict, None if lossless is None else lossless["holds"], store.root if kept else None)
    if kept:
        options.progress.phase("write", 1)
        write_report(made, clips["reference"], clips["test"], options.shown)
    return made


def _impossible(options: Options, kind: str, paired: bool) -> dict[str, str]:
    """Metrics that these clips cannot have, and why."""
    found = {}
    if kind == "compare":
        found["latents"] = "clips on disk have no latents; `reelquant evaluate` measures it"
    if not paired:
        reason = "no clip has the same name in both folders"
        found |= {METRICS[name].source: reason for name in options.wanted if METRICS[name].kind != "distribution"}
    if options.data is None:
        found |= {name: "needs real clips to compare with: --data DIR" for name in options.wanted if name.endswith("_data")}
    return found


def _measure(measuring: Measuring, clips: Mapping[str, Mapping[str, Clip]], paired: bool) -> None:
    for source in list(measuring.sources):
        if source in measuring.missing:
            measuring.sources.remove(source)
    measuring.alone("reference", clips["reference"])
    for variant, found in clips.items():
        if variant in ("test", *PAIRED_FLOORS) and paired:
            measuring.pairs(variant, clips["reference"], found)
            measuring.latents(variant, found)
        elif variant != "reference":
            measuring.alone(variant, found)


def write_report(made: Evaluation, reference: Mapping[str, Clip], test: Mapping[str, Clip], shown: int) -> None:
    """``report.json``, ``report.html`` and ``summary.md`` into the evaluation's folder."""
    from reelquant.evidence.report import html

    assert made.folder is not None
    write_json(made.folder / "report.json", made.data)
    write_text(made.folder / "summary.md", made.summary())
    panels = []
    for row in worst(made.data["per_clip"])[:shown]:
        if row["name"] in reference and row["name"] in test:
            float_, quantized = (one[row["name"]].read() for one in (reference, test))
            frames = min(len(float_), len(quantized))
            if float_.shape[1:] == quantized.shape[1:]:  # folders compared as sets alone may differ
                panels.append(html.Panel(row["name"], row["prompt"], row["seed"], row["figures"], float_[:frames], quantized[:frames]))
    html.write(made.data, panels, made.folder / "report.html")


def worst(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Clips by PSNR, the lowest first; in order of their names where it was not measured."""
    return sorted(rows, key=lambda row: row["figures"].get("psnr", 0.0))
