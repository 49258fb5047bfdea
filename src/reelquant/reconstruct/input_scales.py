"""Static scales of an input as parameters: the stored ones times a factor that is learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from reelquant.kernels import InputQuant
from reelquant.reconstruct.through import GRADIENTS
from reelquant.stages import LayerWork

WIDTH, FREQUENCIES = 32, 8
"""Hidden numbers of the small function of the timestep, and how many sines and cosines it sees."""


class Factor(Protocol):
    """A module whose output multiplies scales."""

    def __call__(self) -> Tensor:
        """Logarithm of the factor, broadcast to ``[rows, units]``."""
        ...


class Free(nn.Module):
    """A factor for every row and unit, or for every unit and all rows alike."""

    def __init__(self, rows: int, units: int) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.zeros(rows, units))

    def forward(self) -> Tensor:
        return self.logarithm


class OfTimestep(nn.Module):
    """A factor for every row, a smooth function of its timestep: sines and cosines, one hidden layer, zero at the start.

    Args:
        timesteps: of the rows.
    """

    def __init__(self, timesteps: Tensor) -> None:
        super().__init__()
        span = (timesteps.amax() - timesteps.amin()).clamp(min=torch.finfo(torch.float32).tiny)
        phases = ((timesteps - timesteps.amin()) / span)[:, None] * torch.pi * torch.arange(FREQUENCIES)
        self.seen = torch.cat([phases.cos(), phases.sin()], 1)
        generator = torch.Generator().manual_seed(0)
        self.hidden = nn.Parameter(torch.randn(2 * FREQUENCIES, WIDTH, generator=generator) / FREQUENCIES**0.5)
        self.out = nn.Parameter(torch.zeros(WIDTH, 1))

    def forward(self) -> Tensor:
        return torch.relu(self.seen @ self.hidden) @ self.out


def _of_timestep(quant: Tensor, work: LayerWork) -> nn.Module:
    rows, steps = len(quant), len(work.timesteps)
    times = torch.tensor(list(work.timesteps), dtype=torch.float32)
    if rows == 1 or not steps:
        return Free(1, 1)  # one row serves all timesteps
    return OfTimestep(times.repeat_interleave(rows // steps) if rows >= steps else times[:rows])


FOLLOWS: dict[str, Callable[[Tensor, LayerWork], nn.Module]] = {
    "each": lambda scale, work: Free(*scale.shape),
    "all": lambda scale, work: Free(1, scale.shape[1]),
    "fitted": _of_timestep,
}
"""How learned scales follow the denoising step: each row by itself, all rows by one factor, or by a smooth function of the timestep."""


class InputScales(nn.Module):
    """The rounding of an input whose scales are ``stored * exp(factor)``.

    Args:
        scale: ``[rows, units]`` float32, the stored scales.
        follow: a name of :data:`FOLLOWS`.
        gradient: a name of :data:`reelquant.reconstruct.through.GRADIENTS`.
    """

    def __init__(self, scale: Tensor, work: LayerWork, follow: str, gradient: str) -> None:
        super().__init__()
        self.stored, self.rounded = scale.detach().clone(), GRADIENTS[gradient]
        self.factor = FOLLOWS[follow](self.stored, work)

    def scale(self) -> Tensor:
        """``[rows, units]`` float32; the stored ones, bit for bit, before anything is learned."""
        return self.stored * self.factor().exp()

    def of(self, quant: InputQuant) -> InputQuant:
        """How the input is rounded with these scales."""
        return replace(quant, scale=self.scale())
