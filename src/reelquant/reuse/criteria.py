"""What tells, while a clip is sampled, that a stretch has to be computed although its schedule would reuse it.

A criterion looks at a signal at every step, and measures its change as the mean absolute difference over the mean absolute value. The
change counts from the last computed step on, or it is added up from step to step.

Papers: the first-block cache of ParaAttention compares with the last computed step. TeaCache (arXiv 2411.19108) adds up changes of the
modulated input of the first block, through a polynomial that is fitted for each model; ours adds them up as they are, and looks at what
enters the stretch. SeaCache (arXiv 2602.18993) adds up changes of a filtered input: at every frequency the filter keeps the share that is
content and not noise. Ours filters the latents, whose rows, columns and frames are known for every model. The noise level is the timestep
over the first one, which holds for flow matching and is a stand-in elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reelquant._errors import RecipeError, nearest
from reelquant.reuse.trajectory import Trajectory

Taken = Mapping[Any, Any]
"""What the first block of a stretch takes, by position or keyword."""


@dataclass(frozen=True)
class Criterion:
    """How the change since the last computed step is measured.

    Attributes:
        signal: the tensor to look at, from what the first block takes and from the trajectory.
        adds: changes are added up from step to step; otherwise the signal is compared with that of the last computed step.
    """

    signal: Callable[[Taken, Trajectory], Tensor]
    adds: bool


@dataclass(frozen=True)
class Seen:
    """What is known of earlier steps: the signal to compare with, and the change up to it since the stretch was last computed."""

    signal: Tensor
    change: float = 0.0

    def changed(self, now: Tensor) -> float:
        """The change since the stretch was last computed; infinite if the signal has another shape."""
        if now.shape != self.signal.shape:
            return float("inf")
        before = self.signal.float()
        return self.change + float((now.float() - before).abs().mean()) / max(float(before.abs().mean()), torch.finfo(torch.float32).tiny)


def features(taken: Taken, _: Trajectory) -> Tensor:
    """What a block takes first of all tensors that are more than vectors: the hidden states. Embeddings of the timestep are vectors."""
    tensors = [value for value in taken.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return next((one for one in tensors if one.ndim > 2), tensors[0])


def content(_: Taken, trajectory: Trajectory) -> Tensor:
    """The latents through the Wiener filter of their noise level: frequency by frequency, times the share of power that is content.

    The power of content falls with the square of the frequency, as in natural pictures, and is that of the noise on average.
    """
    latent = trajectory.latent.float()
    noise = min(max(trajectory.timestep / trajectory.start if trajectory.start else 0.0, 0.0), 1.0)
    axes = tuple(range(2, latent.ndim)) if latent.ndim > 3 else (1,)  # [batch, channels, ...], or packed tokens [batch, tokens, channels]
    squares = torch.zeros((), device=latent.device)
    for axis in axes:
        shape = [-1 if one == axis else 1 for one in range(latent.ndim)]
        squares = squares + torch.fft.fftfreq(latent.shape[axis], device=latent.device).square().reshape(shape)
    power = 1 / (squares + 1 / max(latent.shape[axis] for axis in axes) ** 2)
    power = power / power.mean() * (1 - noise) ** 2
    filtered = torch.fft.ifftn(torch.fft.fftn(latent, dim=axes) * (power / (power + noise**2).clamp_min(1e-12)), dim=axes)
    return filtered.real


CRITERIA: dict[str, Criterion] = {
    "change": Criterion(features, adds=False),
    "sum": Criterion(features, adds=True),
    "content": Criterion(content, adds=True),
}
"""Name in recipes -> criterion."""


def check_criterion(name: str) -> None:
    """Refuse a criterion that is not offered.

    Raises:
        RecipeError: naming those that are.
    """
    if name not in CRITERIA:
        raise RecipeError(f"unknown 'criterion' of reuse 'blocks': '{name}'; {nearest(name, CRITERIA)}")
