"""How an error of the denoiser at one step has grown when the last step is done: noise is added to its output there, and sampled on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from reelquant.clock import ANY, BOTH
from reelquant.damage.kept import Kept
from reelquant.damage.rounding import outputs_disturbed
from reelquant.damage.scene import HALVES, Scene, Target, following, typical

POINTS = 8  # steps at which noise is added; between them the logarithm of the gain is interpolated
POWER = 1e-3  # of the noise over the variance of the output: small enough to act linearly, far above the rounding of float32


@dataclass(frozen=True)
class Gains:
    """Squared error of the final latents over their variance, per squared error of the denoiser's output over its variance.

    Attributes:
        steps: of an error at each step of the denoiser.
        halves: share of each half of guidance in that, ``first`` and ``second``; empty where guidance has no halves.
    """

    steps: tuple[float, ...]
    halves: dict[str, float]


def gains(scene: Scene, target: Target, kept: Kept) -> Gains:
    """Measure the gains of a denoiser: a sampling for each of some steps, and one for every half of guidance."""
    steps = len(target.timesteps)
    points = sorted({round(number) for number in np.linspace(0, steps - 1, min(steps, POINTS))})
    scene.progress.phase("gains of steps", len(points) + 2 * target.halves)
    measured = [_gain(scene, target, kept, f"step {step}", _at_step(target, step)) for step in points]
    found = tuple(float(one) for one in np.exp(np.interp(range(steps), points, np.log(measured))))
    powers = {}
    if target.halves:
        powers = {name: _gain(scene, target, kept, f"{name} half", _in_half(target, half)) for name, half in HALVES.items()}
    total = sum(powers.values())
    return Gains(found, {name: value / total for name, value in powers.items()})


def _gain(scene: Scene, target: Target, kept: Kept, name: str, due: Callable[[], int | None]) -> float:
    def measured() -> list[float]:
        with following(scene.targets), outputs_disturbed(target, POWER, 0, due):
            return scene.damages()

    found = kept.of(f"gain, {target.component}, {name}", measured)
    scene.progress.advance()
    return typical(found) / POWER


def _at_step(target: Target, step: int) -> Callable[[], int | None]:
    return lambda: ANY if target.step == step else None


def _in_half(target: Target, half: int) -> Callable[[], int | None]:
    """The calls of a half, or its rows where both halves are one call."""
    return lambda: half if target.half == BOTH else ANY if target.half == half else None
