"""Where a sampler is, found out from the calls of its denoiser alone."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reelquant.reuse.history import History, kind


@dataclass(eq=False)
class Trajectory:
    """One run of a sampler, from noise to latents.

    A new one begins when the timestep rises, or when the latents change in shape, dtype or device, or within a step.

    Attributes:
        timestep, latent: of the last call.
        start: the timestep of the first step.
        before: the timestep of the step before; None in the first.
        step: the number of the step, counted from 0.
        call: the number of the call in this step: the two halves of guidance are two calls, or one.
        histories: what was computed, by what it belongs to and the number of the call.
        notes: what else members need to know of it.
    """

    timestep: float
    latent: Tensor
    before: float | None = None
    step: int = 0
    call: int = 0
    histories: dict[Hashable, History] = field(default_factory=dict)
    notes: dict[Hashable, Any] = field(default_factory=dict)
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.timestep

    def goes_on(self, timestep: float, latent: Tensor) -> bool:
        """Take one more call, unless it belongs to another trajectory. Two calls of a step have the same latents."""
        again = timestep == self.timestep
        if timestep > self.timestep or kind(latent) != kind(self.latent) or (again and not torch.equal(latent, self.latent)):
            return False
        if again:
            self.call += 1
        else:
            self.step, self.call, self.before = self.step + 1, 0, self.timestep
        self.timestep, self.latent = timestep, latent
        return True
