"""From what the plan needs to statistics: one sampling pass of the real pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.clock import BOTH, SECOND, Pairs
from reelquant.discover import takes_timestep
from reelquant.engine.plan import LayerPlan, Plan
from reelquant.engine.recorder import Recorder, frames_reader, half_reader, timestep_reader_of
from reelquant.engine.texts import Texts
from reelquant.models.condition import Condition, Prompts
from reelquant.models.conditions import at_once
from reelquant.models.defaults import own_pictures
from reelquant.models.parts import METHODS, encode, seen
from reelquant.models.probes import own_size
from reelquant.models.sampling import partial, sample
from reelquant.nn import get_module, prepares_input
from reelquant.observe import Call, Geometry, InputStatistics, Recording, Steps, Watched, observe, observe_methods

STEPS = 50
"""Denoising steps of pipelines that are not told how many to take."""

Empty = tuple[dict[str, InputStatistics], dict[str, InputStatistics]]


class Keeper(Protocol):
    """Keeps statistics somewhere else than in memory."""

    def keep(self, make: Callable[[], Empty], generator: torch.Generator) -> tuple[dict[str, Any], Mapping[str, InputStatistics]]:
        """What to hang on the layers while sampling, and the statistics by layer name afterwards.

        Args:
            make: gives empty statistics: those to fill by the name of a layer, and those by every layer's name.
            generator: draws the rows that are sampled.
        """
        ...

    def saw(self, call: Call) -> None:
        """Hears of every call of the denoiser, before it is made."""
        ...

    def run(self) -> int | None:
        """The number of the sampler run that is going on, where runs before it may have been left out."""
        ...


@dataclass(eq=False)
class Calibration:
    """What one sampling pass left.

    Attributes:
        steps: timesteps seen and an example of the denoiser's arguments.
        inputs: statistics by layer name; layers that share input and geometry share the object.
        prompts: what was sampled.
        calls: recorded calls of the denoiser.
        installed: the stages that changed what the sampler computed, by their parameters.
        references: final latents of the float pipeline on held-out prompts, by what they were sampled with.
    """

    steps: Steps
    inputs: Mapping[str, InputStatistics]
    prompts: tuple[str | Condition, ...]
    calls: Recording = field(default_factory=Recording)
    installed: tuple[str, ...] = ()
    references: dict[str, Tensor] = field(default_factory=dict)

    @property
    def pairs(self) -> Pairs | None:
        """How guidance calls came, or None if there were none, or if the pass did not look."""
        seen = self.steps.halves
        return "batched" if seen[BOTH] else "sequential" if seen[SECOND] else None

    def suffices(self, plan: Plan, denoiser: nn.Module) -> bool:
        """True if another plan for the same float model finds everything it needs here."""
        if installed(plan) != self.installed or recorded_calls(plan) > len(self.calls):
            return False
        return all(self._serves(plan, row, denoiser) for row in plan.quantized)

    def _serves(self, plan: Plan, row: LayerPlan, denoiser: nn.Module) -> bool:
        seen = self.inputs.get(row.layer.name)
        if seen is None:
            return False
        geometry = Geometry.of(get_module(denoiser, row.layer.name))
        return seen.serves(_watched(row, [row], geometry, torch.Generator(), Expected(self.steps.calls, 1, 1)))


def installed(plan: Plan) -> tuple[str, ...]:
    """The stages that change what the sampler computes, in words that tell different parameters apart."""
    return tuple(repr(entry.stage) for entry in plan.acting("before_observing"))


def recorded_calls(plan: Plan) -> int:
    """How many calls of the float denoiser the stages want recorded."""
    return max((entry.stage.records for entry in plan.entries if not entry.stage.resamples), default=0)


class Part(NamedTuple):
    """A denoiser or VAE that is observed, its plan, and what keeps its statistics; None for memory."""

    denoiser: nn.Module
    plan: Plan
    keeper: Keeper | None = None

    @property
    def decodes(self) -> bool:
        """Whether it is a VAE, which is called without a timestep."""
        return all(hasattr(self.denoiser, name) for name in METHODS)


class Expected(NamedTuple):
    """How much sampling a pass will do: calls of the denoiser without guidance, steps of a run, runs of the sampler."""

    calls: int
    steps: int
    runs: int

    @classmethod
    def of(cls, prompts: int, batch: int, arguments: Mapping[str, Any]) -> Expected:
        """For so many prompts, so many at a time."""
        steps, runs = arguments.get("num_inference_steps") or STEPS, -(-prompts // batch)
        return cls(steps * runs, steps, runs)


def calibrate(
    pipe: Any,
    denoiser: nn.Module,
    plan: Plan,
    prompts: Prompts,
    *,
    seed: int,
    arguments: dict[str, Any],
    on_step: Callable[[], None],
) -> Calibration:
    """Sample ``prompts`` once and gather what the plan's layers need.

    Raises:
        CalibrationError: no prompts, no denoiser calls, or values that are not finite.
    """
    parts = [Part(denoiser, plan)]
    return calibrate_together(pipe, parts, Texts(list(prompts), []), seed=seed, arguments=arguments, on_step=on_step)[0]


def calibrate_together(
    pipe: Any,
    parts: Sequence[Part],
    texts: Texts,
    *,
    seed: int,
    arguments: dict[str, Any],
    on_step: Callable[[], None],
) -> list[Calibration]:
    """The same for several denoisers of one pipeline in one sampling pass: each sees its own part of the trajectory.

    VAEs see the decoding of all clips, what else the pipeline has for them, and then the encoding of these clips.

    Probes are sampled after the other texts, in runs of their own, and some of them in the pipeline's own size if that is another one.

    Raises:
        CalibrationError: as :func:`calibrate`; also if one of the denoisers is never called.
    """
    recipe = parts[0].plan.recipe
    batch = at_once(type(pipe), arguments, recipe.calibrate.batch if recipe.calibrate else 4, texts.written)
    gathered: list[Calibration] = []
    course = Course(Expected.of(len(texts.written), batch, arguments), seed, (*texts.written, *texts.probes))
    apart = partial()  # runs are made for others to read: what keepers keep counts, and nothing else
    vaes = [part.denoiser for part in parts if part.decodes and not apart]
    options = {"batch": batch, "output": "frames" if vaes else "latent", "on_step": on_step} | arguments

    def sampled(texts: Prompts, first: int, **size: int) -> None:
        if texts:
            made = sample(pipe, texts, seed=seed + first, first=first, **options | size)
            for vae in vaes:
                encode(vae, made)

    def run(rest: Sequence[Part]) -> None:
        rest = [part for part in rest if not apart or part.keeper is not None]
        if rest:
            gathered.insert(0, _observed(rest[0], course, lambda: run(rest[1:])))
            return
        sampled(texts.written, 0)
        course.probing = True
        if recipe.calibrate is not None and recipe.calibrate.probe_count and not apart:
            _show_pictures([part.denoiser for part in parts])
        some, size = _in_own_size(pipe, parts, texts.probes, arguments)
        sampled(texts.probes[some:], len(texts.written) + some)
        sampled(texts.probes[:some], len(texts.written), **size)

    run(parts)
    return gathered


def _in_own_size(pipe: Any, parts: Sequence[Part], probes: Prompts, arguments: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """How many probes are made in the pipeline's own size, and that size. Scales per frame fit one number of frames only."""
    rows = [row for part in parts for row in part.plan.quantized]
    given = any(isinstance(one, Condition) for one in probes)  # pictures and frames have a size already
    framed = any(row.specs.input is not None and row.specs.input.granularity.kind == "frame" for row in rows)
    size = None if not probes or given or framed else own_size(pipe, arguments)
    return (0, {}) if size is None else (size.count(len(probes)), size.call)


def _show_pictures(modules: Sequence[nn.Module]) -> None:
    """Encoders of pictures look at the bundled ones, too: few pictures calibrate, and others come later."""
    for module in modules:
        if not takes_timestep(module):
            with suppress(UnsupportedError):  # one that takes pictures of another form keeps the ranges of those that calibrated
                seen(module, own_pictures())


@dataclass
class Course:
    """One sampling pass.

    Attributes:
        expected: how much sampling its written texts take.
        seed: of the first clip, and of the choice of rows.
        texts: all that is sampled.
        probing: whether the texts that are being sampled are probes.
    """

    expected: Expected
    seed: int
    texts: tuple[str | Condition, ...]
    probing: bool = False


def _observed(part: Part, course: Course, run: Callable[[], None]) -> Calibration:
    """One denoiser's statistics while ``run`` samples."""
    denoiser, plan, keeper = part
    expected, seed = course.expected._replace(steps=1) if part.decodes else course.expected, course.seed
    generator = torch.Generator().manual_seed(seed)
    make = functools.partial(templates, plan, denoiser, generator, expected)
    watched, inputs = make() if keeper is None else keeper.keep(make, generator)
    how = {"probing": lambda: course.probing, "prepared": {name for name in watched if prepares_input(get_module(denoiser, name))}}
    if part.decodes:
        return Calibration(observe_methods(denoiser, METHODS, watched, run, **how), inputs, course.texts)
    reader = timestep_reader_of(denoiser, plan.map.timestep_argument or "timestep")
    halves, apart = _reads_half(inputs), partial()
    looks = {"half_of": half_reader(denoiser, plan)} if halves else {}
    recorder = Recorder.of(denoiser, plan, 0 if apart else recorded_calls(plan), expected.calls, halves=halves)
    how |= {"on_call": _Beginning(generator if takes_timestep(denoiser) else None, seed, keeper)}
    if keeper is not None:
        how |= {"part_of": lambda: keeper.run() if expected.steps > 1 else None, "whole": not apart}  # one timestep tells no runs apart
    with recorder.watching(denoiser, lambda: not course.probing):
        steps = observe(denoiser, reader, watched, run, frames_of=frames_reader(denoiser, plan), **looks, **how)
    return Calibration(steps, inputs, course.texts, recorder.recording(steps.timesteps), installed(plan))


class _Beginning:
    """Hears of every call of a denoiser. Rows of every run are drawn alike whatever came before it: another process may have made that."""

    def __init__(self, generator: torch.Generator | None, seed: int, keeper: Keeper | None) -> None:
        self.generator, self.seed, self.keeper, self.part = generator, seed, keeper, -1

    def __call__(self, call: Call) -> None:
        if self.generator is not None and call.part != self.part:
            self.generator.manual_seed(self.seed + call.part)
        self.part = call.part
        if self.keeper is not None:
            self.keeper.saw(call)


def _reads_half(inputs: Mapping[str, InputStatistics]) -> bool:
    empty = inputs.empty if hasattr(inputs, "empty") else inputs
    return any(member.reads_half for seen in empty.values() for member in seen.members.values())


def templates(plan: Plan, denoiser: nn.Module, generator: torch.Generator, expected: Expected) -> Empty:
    """Empty statistics to fill (one per shared input and geometry), and the table layer -> statistics."""
    watched: dict[str, InputStatistics] = {}
    inputs: dict[str, InputStatistics] = {}
    readers: dict[tuple[str, Geometry], list[LayerPlan]] = {}
    groups = {name: group.name for group in plan.map.groups for name in group.layers}
    modules = dict(denoiser.named_modules())
    for row in plan.quantized:
        geometry = Geometry.of(modules[row.layer.name])
        readers.setdefault((groups[row.layer.name], geometry), []).append(row)
    members = {key: [row for (group, _), rows in readers.items() if group == key for row in rows] for key, _ in readers}
    for (group, geometry), rows in readers.items():
        of = _watched(rows[0], members[group], geometry, generator, expected)
        watched[rows[0].layer.name] = InputStatistics.for_input(of)
        inputs |= dict.fromkeys((row.layer.name for row in rows), watched[rows[0].layer.name])
    order = [row.layer.name for row in plan.quantized]
    return {name: watched[name] for name in order if name in watched}, {name: inputs[name] for name in order}


def _watched(row: LayerPlan, members: Sequence[LayerPlan], geometry: Geometry, generator: torch.Generator, expected: Expected) -> Watched:
    grains = [member.input.granularity for member in members if member.input]
    return Watched(
        name=row.layer.name,
        geometry=geometry,
        channel_axis=row.layer.channel_axis,
        frames=max((grain.size for grain in grains if grain.kind == "frame"), default=1),
        role=row.layer.role,
        calls=expected.calls,
        generator=generator,
        wanted=frozenset().union(*(member.needs for member in members)),
        steps=expected.steps,
        parts=expected.runs,
    )
