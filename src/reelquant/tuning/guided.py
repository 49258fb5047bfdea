"""What a sampler is given at its steps: the answer of the denoiser after guidance."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from reelquant.reuse.recorded import gram, sampled


class Guided:
    """Guided answers, run by run.

    Guidance takes ``u + g (c - u)`` of the two halves that a denoiser answers. With ``g = 5`` an error of the difference counts 25 times as
    much as the same error of both halves, so inner products of guided answers say what a forecast of the answer costs, and those of the
    halves do not.
    """

    def __init__(self) -> None:
        self.runs: list[dict[float, Tensor]] = []

    def hear(self, answer: Any, timestep: Any) -> None:
        """The sampler makes a step; a timestep that does not fall begins another run."""
        if not isinstance(answer, Tensor):
            return
        time = float(torch.as_tensor(timestep).float().amax())
        if not self.runs or time >= min(self.runs[-1]):
            self.runs.append({})
        self.runs[-1][time] = sampled(answer)

    def gram(self, timesteps: Sequence[float]) -> Any:
        """Inner products of the answers at each two of these timesteps, ``[steps, steps]``, summed over runs; None if one is missing."""
        if not self.runs or any(time not in run for run in self.runs for time in timesteps):
            return None
        return gram([torch.stack([run[time] for time in timesteps]) for run in self.runs])


@contextmanager
def guided_answers(scheduler: Any) -> Iterator[Guided]:
    """Inside, what the scheduler's steps are given is noted."""
    heard, made, before = Guided(), scheduler.step, vars(scheduler).get("step")

    @functools.wraps(made)
    def step(*args: Any, **kwargs: Any) -> Any:
        answer = args[0] if args else kwargs.get("model_output")
        heard.hear(answer, args[1] if len(args) > 1 else kwargs.get("timestep"))
        return made(*args, **kwargs)

    scheduler.step = step
    try:
        yield heard
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before
