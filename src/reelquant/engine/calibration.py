"""From what the plan needs to statistics: one sampling pass of the real pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from reelquant.clock import BOTH, SECOND, Clock, Pairs, holds_twice, timestep_reader
from reelquant.engine.plan import LayerPlan, Plan
from reelquant.models.sampling import sample
from reelquant.nn import get_module
from reelquant.observe import ChannelRange, Features, Geometry, Gram, InputStatistics, Need, Rows, Steps, observe

if TYPE_CHECKING:
    from reelquant.streaming.journal import Journal

ROWS = 1024  # rows kept of every input, over all calls
GRAM_ROWS = 4096, 8  # rows that enter a second moment, over all calls: at least so many, and so many per column


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
        wanted = needs(plan, row)
        if found is None or (found.gram is None and "gram" in wanted) or (found.rotated is None and "rotated" in wanted):
            return False
        grain = None if row.input is None else row.input.granularity
        if plan.recipe.guidance == "apart" and found.halves is None:
            return False
        return grain is None or grain.kind != "frame" or grain.size == found.range.frames


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
    calls = -(-len(prompts) // batch) * (arguments.get("num_inference_steps") or 50)
    found: list[Calibration] = []

    def run(rest: Sequence[Part]) -> None:
        if not rest:
            sample(pipe, prompts, seed=seed, batch=batch, output="latent", on_step=on_step, **arguments)
            return
        denoiser, plan, journal = rest[0]
        generator = torch.Generator().manual_seed(seed)
        make = functools.partial(_watch, plan, denoiser, generator, calls)
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


def templates(plan: Plan, denoiser: nn.Module, calls: int) -> dict[str, InputStatistics]:
    """Empty statistics of everything that the plan's layers read in so many calls, for their sizes."""
    return _watch(plan, denoiser, torch.Generator(), calls)[0]


def _watch(
    plan: Plan, denoiser: nn.Module, generator: torch.Generator, calls: int
) -> tuple[dict[str, InputStatistics], dict[str, InputStatistics]]:
    """Statistics to fill (one per shared input and geometry) and the layer -> statistics table."""
    watched: dict[str, InputStatistics] = {}
    inputs: dict[str, InputStatistics] = {}
    keys: dict[tuple[str, Geometry], str] = {}
    for row in plan.quantized:
        geometry = Geometry.of(get_module(denoiser, row.layer.name))
        key = (plan.map.group_of(row.layer.name).name, geometry)
        first = keys.setdefault(key, row.layer.name)
        if first == row.layer.name:
            members = [other for other in plan.quantized if plan.map.group_of(other.layer.name).name == key[0]]
            watched[first] = _statistics(plan, row, members, geometry, generator, calls)
        inputs[row.layer.name] = watched[first]
    return watched, inputs


def _statistics(
    plan: Plan, row: LayerPlan, members: list[LayerPlan], geometry: Geometry, generator: torch.Generator, calls: int
) -> InputStatistics:
    frames = max((m.input.granularity.size for m in members if m.input and m.input.granularity.kind == "frame"), default=1)
    wanted = {need for member in members for need in needs(plan, member)}
    return InputStatistics(
        row.layer.name,
        geometry,
        ChannelRange(row.layer.channel_axis, geometry.padded, frames),
        Rows(geometry, max(8, _share(ROWS, calls)), generator),
        Gram(geometry, _share(max(GRAM_ROWS[0], GRAM_ROWS[1] * geometry.channels * geometry.taps), calls), generator)
        if "gram" in wanted
        else None,
        Features() if row.layer.role == "temporal" and not geometry.kernel else None,
        ChannelRange(row.layer.channel_axis, geometry.padded, frames) if "rotated" in wanted else None,
        _halves(plan, row, geometry, frames, rotated="rotated" in wanted),
    )


def _halves(
    plan: Plan, row: LayerPlan, geometry: Geometry, frames: int, *, rotated: bool
) -> tuple[InputStatistics, InputStatistics] | None:
    if plan.recipe.guidance != "apart":
        return None

    def half() -> InputStatistics:
        ranges = [ChannelRange(row.layer.channel_axis, geometry.padded, frames) for _ in range(2)]
        return InputStatistics(row.layer.name, geometry, ranges[0], rotated=ranges[1] if rotated else None)

    return half(), half()


def _share(rows: int, calls: int) -> int:
    return -(-rows // max(calls, 1))


def needs(plan: Plan, row: LayerPlan) -> frozenset[Need]:
    """Statistics that a layer's transforms and solver ask for."""
    found: frozenset[Need] = frozenset()
    for number in row.steps:
        step = plan.recipe.steps[number]
        found |= step.mechanism(step.choices()[0]).needs
    return found if row.input else found - {"rotated"}  # nothing is rotated for an input that is not rounded
