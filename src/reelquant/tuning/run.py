"""Find out at which steps of a quantized pipeline its blocks need not be computed, for a wanted speed or a wanted quality."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from reelquant._errors import RecipeError, UnsupportedError
from reelquant._progress import Progress, Silent, tell
from reelquant._version import __version__
from reelquant.checkpoint import check_target, check_writable, keeping_work, refuse_source, save
from reelquant.evidence.networks.weights import check_place
from reelquant.evidence.sampling import ClipSource
from reelquant.evidence.store import write_json, write_text
from reelquant.models.condition import Prompts
from reelquant.models.pipelines import locate, open_pipeline
from reelquant.models.sampling import check_call, sample
from reelquant.nn import quantized_layers
from reelquant.reuse import BlockReuse, put
from reelquant.reuse.blocks import chain_of
from reelquant.tuning.curve import draw
from reelquant.tuning.kept import KeptFigures
from reelquant.tuning.material import material
from reelquant.tuning.recording import LEAST_STEPS, Clips, Seconds, Site, record, reusing, site_of
from reelquant.tuning.sampled import Sample, Sampler
from reelquant.tuning.search import Goal, Search
from reelquant.tuning.shared import together
from reelquant.tuning.trials import Trial, Trials, name_of
from reelquant.tuning.written import recipe_text, report_of

RECORDED = 4  # clips that schedules are planned from
SEARCHED = 8  # schedules that are sampled
WORK = ".tuning"
ALL = (0.0, 1.0)  # of the blocks


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        stage: the reuse that was chosen; None if no schedule kept the limits.
        chosen: its trial.
        trials: everything that was tried, from the most computed steps to the fewest.
        seconds: of calls of the denoiser, and of what lies around them.
        speedup: of a whole clip, measured in turns; None without a choice.
        output: the pipeline with the schedule; None without a choice.
        work: where trials, their clips, the curve and the recipe lie.
        reference: name of the float pipeline that trials were held against; None for the same pipeline without reuse.
    """

    stage: BlockReuse | None
    chosen: Trial | None
    trials: tuple[Trial, ...]
    seconds: Seconds
    speedup: float | None
    output: Path | None
    work: Path
    reference: str | None = None

    @property
    def cliff(self) -> tuple[Trial, Trial] | None:
        """The two neighbouring trials between which PSNR falls most for each step less; None with fewer than three."""
        counts = dict.fromkeys(len(trial.computed) for trial in self.trials)
        best = [max((one for one in self.trials if len(one.computed) == count), key=lambda one: one.figures["psnr"]) for count in counts]
        pairs = list(itertools.pairwise(best))
        return max(pairs, key=_fall) if len(pairs) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "stage": None if self.stage is None else {"reuse": "blocks", **asdict(self.stage)},
            "chosen": None if self.chosen is None else asdict(self.chosen),
            "speedup": self.speedup,
            "trials": [asdict(trial) for trial in self.trials],
            "seconds": asdict(self.seconds),
            "output": None if self.output is None else str(self.output),
            "reference": self.reference,
        }


def _fall(pair: tuple[Trial, Trial]) -> float:
    """By how much PSNR falls for each step that is computed less."""
    more, fewer = pair
    return (more.figures["psnr"] - fewer.figures["psnr"]) / (len(more.computed) - len(fewer.computed))


def tune(
    model: str | Path,
    output: str | Path,
    prompts: Prompts | None = None,
    *,
    goal: Goal | None = None,
    component: str | None = None,
    stretch: tuple[float, ...] = ALL,
    clips: int = 8,
    recorded: int = RECORDED,
    searched: int = SEARCHED,
    held_out: Prompts | None = None,
    reference: str | Path | None = None,
    weights: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    force: bool = False,
    shared: bool = False,
    progress: Progress | None = None,
    call: Mapping[str, Any] | None = None,
) -> Tuned:
    """Find a schedule, try it out, and write the pipeline with it; see :func:`reelquant.tune`."""
    goal, progress, output = goal or Goal(), progress or Silent(), Path(output)
    _check(model, output, reference, clips, recorded, searched, force=force)
    _ = BlockReuse(stretch=stretch)
    check_place(weights)
    number = dtype or torch.float32
    pipe = open_pipeline(model, dtype=number, device=device)
    site = _site(model, pipe, component)
    if tuple(stretch) == ALL and chain_of(site.denoiser, site.map.blocks) is None:
        stretch = ()  # outputs of all blocks are forecast like the answer that is made of them, and the answer costs nothing
    against = None if reference is None else ClipSource(reference, number, device)
    work, call = output.with_name(output.name + WORK), {name: value for name, value in (call or {}).items() if value is not None}
    check_call(type(pipe), call)
    made_from = material(pipe, prompts, held_out, recorded, clips, call)
    trajectories, judged = made_from.recorded, made_from.judged
    _check_steps(trajectories.steps(pipe))
    identity = (Path(str(model)).name, ClipSource(model).identity)
    settings = [identity, trajectories.texts, call, stretch, site.component]
    facts = {"tried": judged.texts, "goal": repr(goal), "settings": settings, "version": __version__}
    facts |= {} if against is None else {"reference": against.identity}
    with together(work, facts, shared=shared) as processes:
        known = KeptFigures(work / "steps.jsonl", settings, "step", "damage")
        errors, seconds = record(pipe, site, stretch, trajectories, progress, known.of, known.keep, processes, made_from.further)
        networks = None if weights is None else Path(weights)
        held = dict(gate=goal.preset, limits=goal.limits, weights=networks, reference=against)
        trials = Trials(
            pipe, site, work / "trials", identity, judged.prompts, judged.seeds, call, **held, progress=progress, shared=processes
        )
        search = Search(stretch, errors, seconds, trials)
        figures = KeptFigures(work / "sampled.jsonl", [identity, made_from.sampled.texts, call, site.component], "schedule", "psnr")
        learn(search, Sampler(pipe, site, made_from.sampled, figures, processes, progress), searched)
        trials.base()

        def timed(stage: BlockReuse) -> float:
            return processes.once(f"time-{name_of(stage)}", lambda: in_turns(pipe, site, stage, trajectories, progress))

        chosen, speedup = _chosen(search, goal, timed)
        stage = None if chosen is None else search.stage(chosen.computed, chosen.order)
        written = None if stage is None else output.absolute()
        made = Tuned(stage, chosen, search.tried_all(), seconds, speedup, written, work, against and against.name)
        if processes.first:
            _write(made, pipe, site, model, force=force)
    return made


def _check(model: str | Path, output: Path, reference: str | Path | None, clips: int, recorded: int, searched: int, *, force: bool) -> None:
    """What can be told before anything is opened: numbers, and whether the output may be written."""
    if min(clips, recorded) < 1:
        raise RecipeError(f"tune records and tries out at least one clip, got {recorded} to record and {clips} to try")
    if searched < 0:
        raise RecipeError(f"'search' is a number of schedules, 0 for none, got {searched}")
    check_target(output, force=force)
    for read in (model, *(() if reference is None else (reference,))):
        locate(read)
        refuse_source(output, read)
    check_writable(output)


def _site(model: str | Path, pipe: Any, component: str | None) -> Site:
    """The denoiser that is tuned, which has to be quantized."""
    site = site_of(pipe, component)
    if not quantized_layers(site.denoiser):
        raise UnsupportedError(
            f"'{model}' is not quantized, and a schedule fits the model that it was found on: quantize it first, "
            f"for example reelquant quantize {model} -r w8a16 -o out"
        )
    return site


def _check_steps(steps: int) -> None:
    if steps < LEAST_STEPS:
        raise UnsupportedError(
            f"clips are made in {steps} steps, and with fewer than {LEAST_STEPS} nothing can be left out; "
            "make them in more steps, or leave a pipeline for so few steps as it is"
        )


def learn(search: Search, sampler: Sampler, most: int) -> list[Sample]:
    """Sample so many schedules, and plan with the kind of errors that expects their figures best."""
    proposed = search.proposals(most)
    if len(proposed) < 2:
        return []
    lasts = sum(search.seconds.of_clip(search.steps, len(steps)) for steps in [range(search.steps), *proposed]) * len(sampler.clips.seeds)
    tell(sampler.progress, f"{len(proposed)} schedules are sampled on {len(sampler.clips.seeds)} clips each: about {lasts:.0f} s")
    found = sampler.psnr([search.stage(steps, 1) for steps in proposed])
    samples = [Sample(steps, 1, tuple(psnr)) for steps, psnr in zip(proposed, found, strict=True)]
    search.believe(samples)
    return samples


def _write(made: Tuned, pipe: Any, site: Site, model: str | Path, *, force: bool) -> None:
    """What was found, as files; and the pipeline with the schedule, if there is one."""
    write_json(made.work / "tuning.json", made.to_json())
    with keeping_work(made.work):
        draw(made.trials, made.chosen, made.work / "curve.png", made.reference or "the pipeline without reuse")
    if made.stage is not None and made.output is not None:
        write_text(made.work / "recipe.yaml", recipe_text(site.denoiser, made.stage))
        put(site.denoiser, "blocks", made.stage, made.stage.facts(site))
        save(pipe, made.output, report_of(model), force=force)


def _chosen(search: Search, goal: Goal, timed: Any) -> tuple[Trial | None, float | None]:
    """The trial that serves the goal, and how much faster it makes a clip."""
    times: dict[tuple[int, ...], float] = {}

    def measured(trial: Trial) -> float:
        if trial.computed not in times:
            times[trial.computed] = timed(search.stage(trial.computed, trial.order))
        return times[trial.computed]

    chosen = search.fastest() if goal.speedup is None else search.fast_enough(goal.speedup, measured)
    return (chosen, measured(chosen)) if chosen is not None and chosen.passed else (None, None)


def in_turns(pipe: Any, site: Site, stage: BlockReuse, clips: Clips, progress: Progress, rounds: int = 3) -> float:
    """How many times faster a clip is made with the reuse: the median of ratios of neighbouring runs."""
    ratios = []
    progress.phase("time", rounds)
    for number in range(rounds):
        spent: dict[bool, float] = {}
        for reuses in ((False, True), (True, False))[number % 2]:
            with reusing(site, stage if reuses else None):
                began = time.perf_counter()
                sample(pipe, clips.prompts[:1], seeds=clips.seeds[:1], **clips.call)
                spent[reuses] = time.perf_counter() - began
        ratios.append(spent[False] / spent[True])
        progress.advance()
    return statistics.median(ratios)
