"""What a scheduler of diffusers knows of noise, found by asking it: levels, the clean clip in a prediction, its memory of past steps."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reelquant._errors import UnsupportedError

POSITION = ("_step_index", "_begin_index")
"""Where a scheduler says at which step it is; the older ones look at the timestep alone."""
TAKES = ("model_output", "timestep", "sample")


class Level(NamedTuple):
    """How much of a noisy clip is signal and how much is noise: ``alpha * clean + sigma * noise``."""

    alpha: float
    sigma: float


@dataclass(frozen=True)
class Prediction:
    """What the outputs of a denoiser mean.

    Attributes:
        clean: the estimate of the clean clip, from the output, the noisy clip and its level.
        output: the output that would give an estimate, from this estimate, the noisy clip and its level.
    """

    clean: Callable[[Tensor, Tensor, Level], Tensor]
    output: Callable[[Tensor, Tensor, Level], Tensor]


def _circle(level: Level) -> tuple[float, float, float]:
    """Length of a level, and the level over it: velocities belong to clips whose signal and noise have squares that add up to 1."""
    length = (level.alpha**2 + level.sigma**2) ** 0.5
    return length, level.alpha / length, level.sigma / length


def _clean_of_velocity(output: Tensor, noisy: Tensor, level: Level) -> Tensor:
    length, alpha, sigma = _circle(level)
    return alpha * noisy / length - sigma * output


def _velocity(clean: Tensor, noisy: Tensor, level: Level) -> Tensor:
    length, alpha, sigma = _circle(level)
    return (alpha * noisy / length - clean) / sigma


SAMPLE = Prediction(lambda output, noisy, level: output, lambda clean, noisy, level: clean)
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": Prediction(
        lambda output, noisy, level: (noisy - level.sigma * output) / level.alpha,
        lambda clean, noisy, level: (noisy - level.alpha * clean) / level.sigma,
    ),
    "v_prediction": Prediction(_clean_of_velocity, _velocity),
    "flow_prediction": Prediction(
        lambda output, noisy, level: noisy - level.sigma * output,
        lambda clean, noisy, level: (noisy - clean) / level.sigma,
    ),
    "sample": SAMPLE,
    "original_sample": SAMPLE,
}
"""``prediction_type`` of a scheduler's config -> what it means. A scheduler without one that has ``scale_noise`` does flow matching."""


def prediction_of(scheduler: Any) -> Prediction:
    """What outputs of the denoiser mean to this scheduler.

    Raises:
        UnsupportedError: if it does not say, or rescales them before.
    """
    name = scheduler.config.get("prediction_type", "flow_prediction" if hasattr(scheduler, "scale_noise") else None)
    if name not in PREDICTIONS or hasattr(scheduler, "precondition_outputs"):
        raise UnsupportedError(
            f"{type(scheduler).__name__} predicts '{name}', from which no estimate of the clean clip is known here; "
            f"known: {', '.join(PREDICTIONS)}, and flow matching"
        )
    return PREDICTIONS[name]


def check_scheduler(scheduler: Any) -> None:
    """Refuse schedulers whose steps cannot be taken one by one.

    Raises:
        UnsupportedError: saying which and why.
    """
    name = type(scheduler).__name__
    if not (hasattr(scheduler, "step") and hasattr(scheduler, "set_timesteps")) or not _adds_noise(scheduler):
        raise UnsupportedError(
            f"{name} has not all of step, set_timesteps and add_noise, so clips cannot change their size while it samples"
        )
    taken = tuple(one for one in inspect.signature(type(scheduler).step).parameters if one != "self")[: len(TAKES)]
    if taken != TAKES or getattr(scheduler, "order", 1) != 1:
        raise UnsupportedError(
            f"{name} takes ({', '.join(taken)}) and {getattr(scheduler, 'order', 1)} calls a step, and clips can change their size only "
            f"where a step is one call of ({', '.join(TAKES)}); use a scheduler like UniPC, DPM++, Euler or DDIM"
        )
    prediction_of(scheduler)


def _adds_noise(scheduler: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Noise of a level added to clean clips: of the clips, the noise, and the timesteps of the clips."""
    if hasattr(scheduler, "scale_noise"):
        return lambda clean, noise, timestep: scheduler.scale_noise(clean, timestep, noise)
    return scheduler.add_noise if hasattr(scheduler, "add_noise") else None


def level_at(scheduler: Any, index: int, timestep: Tensor) -> Level:
    """The level of the clip that enters a step.

    Args:
        scheduler: with its timesteps set.
        index: of the step in its timesteps.
        timestep: of the step, 0-d.
    """
    adds = _adds_noise(scheduler)
    assert adds is not None, "check_scheduler has seen it"
    before = {name: vars(scheduler)[name] for name in POSITION if name in vars(scheduler)}
    vars(scheduler).update({name: index if name == "_begin_index" else None for name in before})
    try:
        one, none, times = torch.ones(1, 1), torch.zeros(1, 1), torch.as_tensor(timestep).cpu().reshape(1)
        return Level(float(adds(one, none, times)), float(adds(none, one, times)))
    finally:
        vars(scheduler).update(before)


def memory_of(scheduler: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """All that a scheduler keeps from one step to the next, and its timesteps; containers are copied, tensors are not."""
    kept = {name: value for name, value in vars(scheduler).items() if name not in ("_internal_dict", *without)}
    return {name: copy.copy(value) if isinstance(value, list | dict) else value for name, value in kept.items()}


def recall(scheduler: Any, memory: Mapping[str, Any]) -> None:
    """Give a scheduler what :func:`memory_of` found."""
    vars(scheduler).update({name: copy.copy(value) if isinstance(value, list | dict) else value for name, value in memory.items()})
