"""From what the plan needs to statistics: one sampling pass of the real pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from reelquant.clock import BOTH, SECOND, Clock, Pairs, holds_twice, timestep_reader
from reelquant.models.sampling import sample
from reelquant.observe import Geometry, InputStatistics, Steps, Watched, observe
from reelquant.recipes.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from reelquant.recipes.journal import Journal


@dataclass(eq=False)
class Calibration:
    """What one sampling pass left.

    Attributes:
        steps: timesteps seen and an example of the denoiser's arguments.
        inputs: statistics by layer name; layers that share input and geometry share the object.
        prompts: the texts that were sampled.
        references: final latents of the float pipeline on held-out prompts, by what they were sampled with.
    """

    steps: Steps
    inputs: Mapping[str, InputStatistics]
    prompts: tuple[str, ...]
    references: dict[str, Tensor] = field(default_factory=dict)

    @property
    def pairs(self) -> Pairs | None:
        """How guidance calls came, or None if there were none, or nobody looked."""
        seen = self.steps.halves
        return "batched" if seen[BOTH] else "sequential" if seen[SECOND] else None

    def suffices(self, plan: Plan) -> bool:
        """True if another plan for the same float model finds everything it needs here."""
        return all(self._suffices(plan, row) for row in plan.quantized)

    def _suffices(self, plan: Plan, row: LayerPlan) -> bool:
        found = self.inputs.get(row.layer.name)
        if found is None:
            return False
        return found.serves(_watched(plan, row, [row], found.geometry, torch.Generator(), (1, 1)))


class Part(NamedTuple):
    """A denoiser that is observed, its plan, and the journal that keeps its statistics; None for memory."""

    denoiser: nn.Module
    plan: Plan
    journal: Journal | None = None


def calibrate(
    pipe: Any,
    denoiser: nn.Module,
    plan: Plan,
    prompts: Sequence[str],
    *,
    seed: int,
    arguments: dict[str, Any],
    on_step: Callable[[], None],
) -> Calibration:
    """Sample ``prompts`` once and gather what the plan's layers need.

    Raises:
        CalibrationError: no prompts, no denoiser calls, or values that are not finite.
    """
    return calibrate_together(pipe, [Part(denoiser, plan)], prompts, seed=seed, arguments=arguments, on_step=on_step)[0]


def calibrate_together(
    pipe: Any,
    parts: Sequence[Part],
    prompts: Sequence[str],
    *,
    seed: int,
    arguments: dict[str, Any],
    on_step: Callable[[], None],
) -> list[Calibration]:
    """The same for several denoisers of one pipeline in one sampling pass: each sees its own part of the trajectory.

    Raises:
        CalibrationError: as :func:`calibrate`; also if one of the denoisers is never called.
    """
    recipe = parts[0].plan.recipe
    batch = recipe.calibrate.batch if recipe.calibrate else 4
    size = arguments.get("num_inference_steps") or 50, -(-len(prompts) // batch)
    found: list[Calibration] = []

    def run(rest: Sequence[Part]) -> None:
        if not rest:
            sample(pipe, prompts, seed=seed, batch=batch, output="latent", on_step=on_step, **arguments)
            return
        denoiser, plan, journal = rest[0]
        generator = torch.Generator().manual_seed(seed)
        make = functools.partial(_watch, plan, denoiser, generator, size)
        watched, inputs = make() if journal is None else journal.keep(make, generator)
        reader = timestep_reader(denoiser, plan.map.timestep_argument or "timestep")
        watch_pairs = {"half_of": _half_reader(denoiser, plan)} if plan.recipe.guidance == "apart" else {}
        steps = observe(denoiser, reader, watched, lambda: run(rest[1:]), **watch_pairs)
        found.insert(0, Calibration(steps, inputs, tuple(prompts)))

    run(parts)
    return found


def _half_reader(denoiser: nn.Module, plan: Plan) -> Callable[[tuple[Any, ...], dict[str, Any]], int]:
    """Which half of a guidance pair a call computes: both if it holds its latents twice, the second if the call before had the same."""
    read = timestep_reader(denoiser, plan.map.latent_argument or "hidden_states")
    clock = Clock([], pairs="sequential")

    def half_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        latent = read(args, kwargs).detach().cpu()
        if bool(holds_twice(latent)):
            return BOTH
        clock.look(latent)
        return int(clock.which)

    return half_of


def templates(plan: Plan, denoiser: nn.Module, size: tuple[int, int]) -> dict[str, InputStatistics]:
    """Empty statistics of everything that the plan's layers read, for their sizes; ``size`` is steps and sampler runs."""
    return _watch(plan, denoiser, torch.Generator(), size)[0]


def _watch(
    plan: Plan, denoiser: nn.Module, generator: torch.Generator, size: tuple[int, int]
) -> tuple[dict[str, InputStatistics], dict[str, InputStatistics]]:
    """Statistics to fill (one per shared input and geometry) and the layer -> statistics table."""
    watched: dict[str, InputStatistics] = {}
    inputs: dict[str, InputStatistics] = {}
    keys: dict[tuple[str, Geometry], str] = {}
    groups = {name: group.name for group in plan.map.groups for name in group.layers}
    modules = dict(denoiser.named_modules())
    for row in plan.quantized:
        geometry = Geometry.of(modules[row.layer.name])
        key = (groups[row.layer.name], geometry)
        first = keys.setdefault(key, row.layer.name)
        if first == row.layer.name:
            members = [other for other in plan.quantized if groups[other.layer.name] == key[0]]
            watched[first] = InputStatistics.for_input(_watched(plan, row, members, geometry, generator, size))
        inputs[row.layer.name] = watched[first]
    return watched, inputs


def _watched(
    plan: Plan, row: LayerPlan, members: list[LayerPlan], geometry: Geometry, generator: torch.Generator, size: tuple[int, int]
) -> Watched:
    """What is known of the input that ``members`` share, the first of them being ``row``."""
    frames = max((m.input.granularity.size for m in members if m.input and m.input.granularity.kind == "frame"), default=1)
    wanted = frozenset().union(*(needs(plan, member) for member in members))
    steps, parts = size
    return Watched(row.layer.name, geometry, row.layer.channel_axis, frames, row.layer.role, steps * parts, generator, wanted, steps, parts)


def needs(plan: Plan, row: LayerPlan) -> frozenset[str]:
    """Statistics that a layer's role, its transforms and its solver ask for."""
    found = frozenset({"features"} if row.layer.role == "temporal" else ())
    found |= frozenset({"halves"} if plan.recipe.guidance == "apart" else ())
    for number in row.steps:
        step = plan.recipe.steps[number]
        found |= step.mechanism(step.choices()[0]).needs
    return found if row.input else found - {"rotated"}  # nothing is rotated for an input that is not rounded
