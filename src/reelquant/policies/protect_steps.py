"""More precise activations at some denoising steps: those that a recipe names, or those whose rounding costs held-out clips most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from reelquant._errors import CalibrationError, RecipeError, nearest
from reelquant.clock import Clock, Inputs
from reelquant.formats.criteria import latent_psnr
from reelquant.policies.step_policy import is_policy, read_policy
from reelquant.stages import ModelWork, Stage


@dataclass(frozen=True)
class ProtectSteps(Stage):
    """Denoising steps that get more precise activations, from the same stored weights.

    Attributes:
        steps: of the sampler that calibrates, from 0, or from -1 backwards; or ``auto``: found by what each step does to
            held-out clips.
        inputs: ``float`` rounds no inputs at these steps, ``8-bit`` rounds them to eight bits where the recipe says fewer (small floats
            become integers where their scales are found at run time, and stay as they are where these are static).
        share: ``auto`` protects at most this share of the steps, in (0, 1].
    """

    steps: tuple[int, ...] | Literal["auto"] = "auto"
    inputs: Inputs = "float"
    share: float = 0.2
    key: ClassVar[str | None] = "protect_steps"
    default_on: ClassVar[str] = "*"
    takes_on: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.steps, str) and self.steps != "auto":
            raise RecipeError(f"protect_steps.steps is 'auto' or a list of steps, got {self.steps!r}")
        if self.inputs not in get_args(Inputs):
            raise RecipeError(f"protect_steps.inputs cannot be '{self.inputs}'; {nearest(self.inputs, get_args(Inputs))}")
        if not 0 < self.share <= 1:
            raise RecipeError(f"protect_steps.share lies in (0, 1], got {self.share}")

    @classmethod
    def parse_key(cls, value: Any) -> Mapping[str, Any] | None:
        if is_policy(value):
            return super().parse_key(read_policy(value))
        return super().parse_key({"steps": value} if isinstance(value, str | list | tuple) else value)

    def held_out_runs(self, steps: int) -> int:
        return steps + 1 if self.steps == "auto" else 0

    def before_choosing(self, work: ModelWork) -> None:
        if isinstance(self.steps, tuple):
            _clock(work).protect(slots_of(self.steps, work.sampled, work.timesteps), self.inputs)

    def after_installing(self, work: ModelWork) -> None:
        clock = _clock(work)
        if self.steps == "auto":
            work.report.steps = self._measured(work, clock)
            clock.protect([error.step for error in work.report.steps if error.protected], self.inputs)
        work.report.protected = list(clock.protected_slots)

    def _measured(self, work: ModelWork, clock: Clock) -> list[StepError]:
        def latents(slots: Sequence[int]) -> Tensor:
            clock.protect(slots, self.inputs)
            try:
                return work.held_out_latents(on_step=None)
            finally:
                work.advance()

        with work.timed("measure steps", self.held_out_runs(len(work.timesteps))):
            return measure_steps(work.timesteps, latents, self.share)


def _clock(work: ModelWork) -> Clock:
    if work.clock is None:
        raise CalibrationError(f"protect_steps follows the timestep, and '{work.component}' is called without one; drop protect_steps")
    return work.clock


@dataclass(frozen=True)
class StepError:
    """What rounding at one step alone does to the final latents of held-out clips.

    Attributes:
        step: index into the denoiser's calibrated timesteps.
        timestep: of that step, in model units.
        psnr: of the latents to those without any rounding of activations, dB.
        protected: whether the step was chosen.
    """

    step: int
    timestep: float
    psnr: float
    protected: bool


def slots_of(steps: Sequence[int], sampled: Sequence[float], timesteps: Sequence[float]) -> tuple[int, ...]:
    """Slots of a denoiser that runs at ``timesteps``, for steps of a sampler that runs through ``sampled``.

    With two experts the sampler's steps go on from one to the other, and each protects its own.

    Raises:
        RecipeError: if the sampler has no such step.
    """
    for step in steps:
        if step not in range(-len(sampled), len(sampled)):
            raise RecipeError(
                f"protect_steps names step {step}, the sampler that calibrates takes {len(sampled)} (0 to {len(sampled) - 1})"
            )
    wanted = {sampled[step] for step in steps}
    return tuple(slot for slot, timestep in enumerate(timesteps) if timestep in wanted)


def measure_steps(timesteps: Sequence[float], latents: Callable[[Sequence[int]], Tensor], share: float) -> list[StepError]:
    """Round at one step at a time, and choose the steps whose error is above the mean, the largest first.

    Args:
        timesteps: of the denoiser.
        latents: final latents of held-out clips with these steps protected.
        share: at most this share of the steps is chosen (one at least).
    """
    every = range(len(timesteps))
    reference = latents(every)
    psnr = [latent_psnr(reference, latents([other for other in every if other != step])) for step in every]
    errors = 10 ** (-torch.tensor(psnr, dtype=torch.float64) / 10)
    most = max(int(share * len(timesteps)), 1)
    chosen = {step for step in errors.argsort(descending=True)[:most].tolist() if errors[step] > errors.mean()}
    return [StepError(step, timesteps[step], psnr[step], step in chosen) for step in every]
