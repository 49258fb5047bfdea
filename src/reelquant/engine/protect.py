"""Which denoising steps get more precise activations: those a recipe names, or those that cost held-out clips most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reelquant._errors import RecipeError
from reelquant.engine.search import latent_psnr


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
