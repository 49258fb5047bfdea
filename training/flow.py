"""Flow matching, as all transformers here learn it: noise that fits its clips, noise levels, dropped captions, and the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Clock, Curve, Ema, Training, linear_decay
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from reelquant.models.shapes import Scene, random_caption


def matched_noise(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of the shape of ``[n, ...]`` latents; within the batch it goes to the latents that it is closest to."""
    noise = torch.randn(latents.shape, generator=generator)
    return noise[linear_sum_assignment(torch.cdist(latents.flatten(1), noise.flatten(1)).numpy())[1]]


def noise_levels(n: int, generator: torch.Generator) -> Tensor:
    """``[n]`` levels in (0, 1): logit-normal, a tenth uniform."""
    sigma = torch.sigmoid(torch.randn(n, generator=generator))
    return torch.where(torch.rand(n, generator=generator) < 0.1, torch.rand(n, generator=generator), sigma)


def some_captions(scenes: Sequence[Scene], generator: torch.Generator) -> list[str]:
    """A caption for each scene; a tenth are empty, for guidance."""
    captions = [random_caption(scene, generator) for scene in scenes]
    return ["" if empty else caption for caption, empty in zip(captions, torch.rand(len(scenes), generator=generator) < 0.1, strict=True)]


@dataclass(frozen=True)
class Plan:
    """How a transformer is trained.

    Attributes:
        average: decay of the average of the weights.
        warmup: steps until the learning rates are reached.
        decay: part of the time, at the end, over which they fall to zero.
        loss: what the running loss starts from.
        note: steps between rows of the curve.
        save: steps between checkpoints.
        batch: clips a step.
        micro: clips a forward.
    """

    average: float = 0.998
    warmup: int = 60
    decay: float = 0.45
    loss: float = 1.0
    note: int = 50
    save: int = 250
    batch: int = 32
    micro: int = 16


def train_flow(
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    draw: Callable[[int], tuple[Tensor, ...]],
    loss: Callable[[tuple[Tensor, ...]], Tensor],
    plan: Plan,
    file: Path,
    minutes: float,
    resume: bool = False,
) -> None:
    """Train until the planned time is over.

    Args:
        module: what moves.
        optimizers: of its parameters.
        draw: a batch of so many clips: tensors ``[n, ...]``.
        loss: mean loss of a part of a batch.
        plan: the schedule.
        file: checkpoint; the curve and the changed number of minutes lie beside it, ``NAME.csv`` and ``NAME-minutes.txt``.
        minutes: planned length.
        resume: go on from the checkpoint.
    """
    clock = Clock(minutes, file.with_name(f"{file.stem}-minutes.txt"))
    training = Training(module, Ema(module, plan.average), optimizers, file, clock)
    if resume:
        training.resume()
    curve, running = Curve(file.with_suffix(".csv"), append=resume), plan.loss

    def rate(step: int, progress: float) -> float:
        return min(1.0, (step + 1) / plan.warmup) * linear_decay(progress, decay=plan.decay)

    def backward(_step: int) -> None:
        nonlocal running
        for part in zip(*(x.split(plan.micro) for x in draw(plan.batch)), strict=True):
            share = len(part[0]) / plan.batch
            found = loss(part) * share
            found.backward()
            running += 0.02 * (found.item() - running * share)

    def after(step: int) -> None:
        if step % plan.note == 0:
            curve.add(seconds=clock.elapsed(), step=step, loss=running)
        if step % plan.save == 0:
            training.save()

    training.run(rate, backward, after)
    training.save()
