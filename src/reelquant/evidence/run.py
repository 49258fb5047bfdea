"""Evaluate a quantized pipeline against its float original, and compare two folders of clips."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reelquant._errors import CalibrationError, CheckpointError, MeasurementError, RecipeError
from reelquant._remarks import remarks
from reelquant._sums import OWN
from reelquant.checkpoint import INDEX, METHOD, Stored
from reelquant.evidence import evaluation
from reelquant.evidence.causes import differences, refuse_pair
from reelquant.evidence.clips import Clip, find_clips, unequal_rates, unpaired
from reelquant.evidence.costs import ROUNDS, check_speed, folder_bytes, speed
from reelquant.evidence.evaluation import Evaluation
from reelquant.evidence.expected import Expected
from reelquant.evidence.grain import FLAT, growth
from reelquant.evidence.judging import Options, Subject, Times, judge, seconds_to_measure
from reelquant.evidence.machine import multiplies_bf16
from reelquant.evidence.mechanisms import MECHANISMS, Tools
from reelquant.evidence.metrics import METRICS
from reelquant.evidence.sampling import ClipSource, SamplingJob, Variant, floors
from reelquant.evidence.sensitivity_map import read_map
from reelquant.evidence.shared import SharedClips, sharing
from reelquant.evidence.store import Store
from reelquant.models.blank import QUANTIZATION, read_config
from reelquant.models.condition import Condition, Prompts, as_condition, fitted, texts_of
from reelquant.models.conditions import at_once, check_given, check_texts, no_texts, reads_texts, takes_prompt
from reelquant.models.defaults import missing, notice, required, undecided
from reelquant.models.described import described
from reelquant.models.origin import SOURCE
from reelquant.models.pipelines import locate, pipeline_class
from reelquant.models.prompts import bundled_prompts
from reelquant.models.sampling import folder_notes, notes
from reelquant.models.shapes import evaluation_prompts, flat_captions, understood
from reelquant.models.weight_files import component_folders

SEED = 50_000  # noise of the first clip


# --- two pipelines ----------------------------------------------------------------------------------------------------


def evaluate(
    test: Any,
    reference: Any,
    prompts: Prompts | None = None,
    *,
    clips: int = 16,
    seed: int = SEED,
    floor: Sequence[str] | None = None,
    grain_steps: Sequence[int] = (),
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
    files: str | None = None,
    options: Options | None = None,
    checked: bool = False,
    **call: Any,
) -> Evaluation | None:
    """Sample both pipelines and the noise floor, measure, judge, report; see :func:`reelquant.api.evaluate`.

    ``checked``: the caller has read all weights of this pair and found them whole.

    Returns:
        The evaluation; where processes share the clips, None in all but the first.
    """
    options = options or Options()
    _check_places(options)
    if clips < 1:
        raise RecipeError(f"clips: got {clips}; evaluate at least 1")
    if options.speed:
        check_speed(test, reference)
    check_described(test)
    own, kind = _notes(reference), pipeline_class(reference)
    call = own.get("call", {}) | {key: value for key, value in call.items() if value is not None}
    drawn = _drawn(prompts, own, clips, kind, call)
    texts = texts_of(drawn)
    seeds = [seed + i if one.seed is None else one.seed for i, one in enumerate(drawn)]
    float_ = ClipSource(reference, dtype, options.device, files=files)
    bundled = _bundled(float_, kind, drawn, call)
    call |= bundled
    batch = at_once(kind, call, batch or (4 if own else 1), drawn)
    check_given(kind, call, drawn)
    if grain_steps and not any(texts):
        raise RecipeError(f"grain_steps: flat scenes are asked for by their texts, and {kind.__name__} takes no prompt; leave it out")
    variants, proof = _variants(test, float_, floor, options), _proof(test)
    maps = [] if options.sensitivity is None else read_map(options.sensitivity, proof)
    if not checked:
        refuse_pair(reference, test, files)
    causes = [*differences(reference, test, files), *filter(None, [notice(kind, bundled)])]
    number = str(dtype).removeprefix("torch.")
    with remarks() as told, _store(options, _settings(variants, number, drawn, seeds, call, batch)) as (store, shared):
        times = Times()
        job = SamplingJob(store, drawn, seeds, call, batch, options.progress, shared)
        job, expected = _expecting(job, variants, options)
        for name, variant in variants.items():
            with times.of(f"sample {variant.words}"):
                job.make(name, variant)
        if shared is not None:
            if not job.take_over(variants):
                return None
            shared.end()
        job = replace(job, shared=None, progress=options.progress)
        grain = _grain(job, variants, grain_steps, own, times)
        origin = _origin(variants, number, job, proof, grain) | _counted(job)
        origin |= {"bytes": folder_bytes(test, reference, files), "speed": None, "sensitivity": maps}
        if options.speed:
            origin["speed"] = _speed(job, test, reference, files, options, times)
        named = (dict(zip(job.names, values, strict=True)) if any(values) else {} for values in (texts, seeds))
        warnings = [*causes, *told, *([sentence] if (sentence := job.saturation("test").sentence()) else [])]
        sets = {name: job.clips(name) for name in variants}
        seconds = None if expected is None else expected.seconds
        return judge(options, store, Subject(sets, origin, *named, warnings=warnings, expected=seconds), times)


def _expecting(job: SamplingJob, variants: Mapping[str, Variant], options: Options) -> tuple[SamplingJob, Expected | None]:
    """The job with a progress that tells how long it will take; where processes share the clips, nothing is told."""
    if job.shared is not None:
        return job, None
    calls = {f"sample {variant.words}": len(job.left(name, variant)) for name, variant in variants.items()}
    timed = 2 * (ROUNDS + 1) / job.batch if options.speed else 0.0  # one clip at a time
    first = job.names[0]

    def look() -> float:
        return seconds_to_measure(options, job.clips("reference")[first], as_condition(job.prompts[0]).text)

    expected = Expected(
        options.progress,
        calls,
        len(job.names) * (len(variants) + options.tests_after),
        look if hasattr(options.progress, "tell") else None,
        options.tests_after * (-(-len(job.names) // job.batch) + timed) + timed,
    )
    return replace(job, progress=expected), expected


def _speed(job: SamplingJob, test: Any, reference: Any, files: str | None, options: Options, times: Times) -> dict[str, Any]:
    """Times and memory of both pipelines, which make the first clip in turns."""
    with times.of("speed"):
        how = dict(device=options.device, files=files, progress=options.progress, call=job.call)
        return speed(job.store, test, reference, as_condition(job.prompts[0]), **how)


def _counted(job: SamplingJob) -> dict[str, Any]:
    """What was counted while the quantized clips were made."""
    seen = job.saturation("test")
    return {"saturation": seen.facts() if seen.layers else None, "reuse": job.reused("test").facts()}


def check_described(test: Any) -> None:
    """Read what the folder of the test says about its layers: a plug-in that is missing would show only after the float clips were made."""
    folder = Path(locate(test)) if isinstance(test, str | Path) else Path()
    for part in component_folders(folder) if (folder / INDEX).is_file() else ():
        if (stored := read_config(part).get(QUANTIZATION)) and stored.get("quant_method") == METHOD:
            Stored.from_json(stored)


def _check_places(options: Options) -> None:
    """Refuse real clips and a CLIP that are asked for and not there: they are read after all clips are made.

    Raises:
        MeasurementError, CheckpointError: naming the place.
    """
    if options.data is not None:
        find_clips(options.data)
    named = options.clip_model
    if named is not None and (named.startswith((".", "/", "~")) or named.count("/") > 1) and not Path(named).expanduser().is_dir():
        raise CheckpointError(f"no CLIP model at '{named}'; give a folder that transformers loads, or a hub id (owner/name)")


def _bundled(source: ClipSource, kind: type, drawn: list[Condition], call: Mapping[str, Any]) -> dict[str, Any]:
    """Pictures and clips that come with the library, where the pipeline needs some and none were given; it is opened only to find out."""
    found = required(kind, drawn, call)
    return missing(source.open(), drawn, call) if undecided(kind, drawn, dict(call) | found) else found


def _variants(
    test: Any,
    float_: ClipSource,
    floor: Sequence[str] | None,
    options: Options,
) -> dict[str, Variant]:
    """Both pipelines, and the float runs that show the noise floor."""
    quantized = ClipSource(test, float_.dtype, float_.device)
    asked = _default_floor(options, float_.dtype) if floor is None else [name for name in floor if name != "none"]
    both = {"reference": Variant(float_, words="float"), "test": Variant(quantized, words="quantized", counted=True)}
    return both | floors(asked, float_)


def _settings(
    variants: Mapping[str, Variant],
    dtype: str,
    drawn: list[Condition],
    seeds: list[int],
    call: Mapping[str, Any],
    batch: int,
) -> dict[str, Any]:
    """What a run that is resumed must have in common with this one."""
    sides = {name: variants[name].source.identity for name in ("reference", "test")}
    sampling = {"dtype": dtype, "prompts": texts_of(drawn), "seeds": seeds, "call": described(call), "batch": batch}
    own = [described(dict(one.inputs)) for one in drawn]
    sampling |= {"conditions": own if any(own) else None}  # also where there are none: the run before may have had some
    return {"kind": "evaluate", **sides, **sampling}


def _origin(
    variants: Mapping[str, Variant],
    dtype: str,
    job: SamplingJob,
    quantization: dict[str, Any] | None,
    grain: dict[str, Any] | None,
) -> dict[str, Any]:
    """The fields of the report that say where the clips come from."""
    return {
        "kind": "evaluate",
        "reference": {"name": variants["reference"].source.name, "dtype": dtype},
        "test": {"name": variants["test"].source.name, "recipe": (quantization or {}).get("recipe")},
        "prompts": texts if any(texts := texts_of(job.prompts)) else [],
        "conditions": own if any(own := [described(dict(as_condition(one).inputs)) for one in job.prompts]) else [],
        "floors": {name: _about(name, variant) for name, variant in variants.items() if variant.about},
        "seeds": job.seeds,
        "call": described(job.call),
        "quantization": quantization,
        "grain_growth": grain,
    }


def _about(name: str, variant: Variant) -> str:
    """What a floor is, and why it stands in for bfloat16 where it does."""
    stands_in = name == "rounded" and not multiplies_bf16(variant.source.device.partition(":")[0])
    why = "; this processor has no bfloat16 instructions, and a run in bfloat16 would take several times as long as the float clips"
    return variant.about + (why if stands_in else "")


def _grain(
    job: SamplingJob,
    variants: Mapping[str, Variant],
    steps: Sequence[int],
    own: Mapping[str, Any],
    times: Times,
) -> dict[str, Any] | None:
    """Noise in flat areas at several numbers of steps; None if no numbers were asked for."""
    if not steps:
        return None
    with times.of("grain against steps"):
        flat = flat_captions() if understood(own.get("prompts", ())) else FLAT
        return growth(job, {name: variants[name] for name in ("reference", "test")}, steps, flat)


def _notes(model: Any) -> dict[str, Any]:
    return folder_notes(locate(model)) if isinstance(model, str | Path) else notes(model)


def _drawn(prompts: Prompts | None, own: Mapping[str, Any], clips: int, kind: type, call: Mapping[str, Any]) -> list[Condition]:
    """One condition per clip: those given, captions for the bundled pipelines, or the bundled prompts; repeated to fill.

    Texts are empty where clips are made from none.
    """
    given: Prompts = [prompts] if isinstance(prompts, str) else list(prompts or ())
    if not takes_prompt(kind):
        check_texts(kind, texts_of(given))
    given = fitted(kind, given)
    if not reads_texts(kind, call, given):
        given = [one for one in given if as_condition(one).inputs] or no_texts(clips)
    elif prompts is None:
        given = evaluation_prompts(clips) if understood(own.get("prompts", ())) else bundled_prompts()
    if not given:
        raise CalibrationError("no prompts: give at least one text")
    whole = [as_condition(one) for one in given]
    again = [replace(one, seed=None) for one in whole]  # a seed of the file serves the first clip of its text only
    return [(whole if i < len(given) else again)[i % len(given)] for i in range(clips)]


def _default_floor(options: Options, dtype: torch.dtype) -> list[str]:
    """The float pipeline in the other precision, or rounded to it where that would take many times as long as the float clips.

    From other noise as well where sets of clips are compared.
    """
    tools = Tools(options.weights)
    sets = [METRICS[name].source for name in options.wanted if METRICS[name].kind == "distribution"]
    drawn = any(MECHANISMS[source].missing(tools, None) is None for source in sets)
    usual = ("bf16" if multiplies_bf16(options.device.partition(":")[0]) else "rounded") if dtype == torch.float32 else "compiled"
    return [usual, *(["reseed"] if drawn else [])]


def _proof(test: Any) -> dict[str, Any] | None:
    """The report that quantizing left in the folder of the pipeline; None without one, or if it names the source alone.

    Raises:
        CheckpointError: if it is damaged, or is not such a report.
    """
    from reelquant.evidence.report.data import ReportData

    file = Path(str(test)) / "report.json" if isinstance(test, str | Path) else Path()
    if not file.is_file():
        return None
    found = evaluation.load(file)
    try:
        ReportData.from_json({"quantization": found})
    except MeasurementError as error:
        raise CheckpointError(f"'{file}': {error}; delete it, or quantize again to get a new one") from None
    return found if found.keys() - {OWN, SOURCE} else None


# --- two folders ------------------------------------------------------------------------------------------------------


def compare(
    test: str | Path, reference: str | Path, prompts: Mapping[str, str] | None = None, *, options: Options | None = None
) -> Evaluation:
    """Measure a folder of clips against another; see :func:`reelquant.api.compare`."""
    options = options or Options()
    _check_places(options)
    with remarks() as told:
        sets = {"reference": find_clips(reference), "test": find_clips(test)}
    alone = unpaired(**sets)
    pairs = [name for name in sets["test"] if name in sets["reference"]]
    of_sets = [METRICS[name].kind == "distribution" for name in options.wanted]
    whole = all(of_sets)
    if not pairs and not any(of_sets):
        raise CalibrationError(
            f"no clip of '{test}' has the name of a clip of '{reference}' ({', '.join(alone[:4])} ...); "
            "clips are paired by name, or ask for metrics of whole sets: --metrics fvd,fid,kid"
        )
    if pairs and not whole:
        sets = {variant: {name: clips[name] for name in pairs} for variant, clips in sets.items()}
    settings = {"kind": "compare", **{variant: _identity(clips) for variant, clips in sets.items()}}
    subject = Subject(
        sets,
        _folders(reference, test, prompts or {}),
        dict(prompts or {}),
        warnings=[*told, *([] if whole else _left_out(alone)), *unequal_rates(**sets)],
        paired=not alone if whole else bool(pairs),
    )
    with _store(options, settings) as (store, _):
        return judge(options, store, subject, Times())


def _folders(reference: str | Path, test: str | Path, prompts: Mapping[str, str]) -> dict[str, Any]:
    """The fields of the report that say where the clips come from."""
    return {
        "kind": "compare",
        "reference": {"name": str(reference)},
        "test": {"name": str(test)},
        "prompts": list(prompts.values()),
        "seeds": [],
        "call": {},
        "quantization": None,
        "grain_growth": None,
    }


def _left_out(alone: Sequence[str]) -> list[str]:
    names = ", ".join(alone[:5])
    return [f"{len(alone)} clips have no partner of the same name and are left out: {names}"] if alone else []


def _identity(clips: Mapping[str, Clip]) -> list[str]:
    sizes = {name: sum(file.stat().st_size for file in clip.files) for name, clip in clips.items()}
    return [f"{name} {sizes[name]} {clip.files[0].stat().st_mtime_ns}" for name, clip in clips.items()]


@contextmanager
def _store(options: Options, settings: Mapping[str, Any]) -> Iterator[tuple[Store, SharedClips | None]]:
    """The folder that was asked for, or one that is deleted when the evaluation is done; and what processes share of its clips.

    Raises:
        RecipeError: if processes are to share and no folder was asked for, in which they could.
    """
    if options.output is None:
        if options.shared:
            raise RecipeError("processes share the clips of an evaluation in its folder, and none was given: output='...' (--output)")
        with tempfile.TemporaryDirectory(prefix="reelquant-") as folder:
            yield Store(Path(folder)), None
        return
    store = Store(options.output)

    def begin() -> None:
        store.begin(settings, resume=options.resume, force=options.force)
        if options.reuse is not None:
            store.borrow(options.reuse, settings)

    if not options.shared:
        try:
            begin()
            yield store, None
        except BaseException:
            store.leave()
            raise
        return
    with sharing(store, settings, begin, force=options.force) as shared:
        yield store, shared
