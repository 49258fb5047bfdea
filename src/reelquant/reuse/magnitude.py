"""A schedule from the size of what a stretch changes, measured on held-out clips.

Paper: MagCache (arXiv 2506.09045) finds that the size of the residual, from one step to the next, falls by a ratio that is nearly the same
for all texts and tokens. What reuse costs at a step is then how far the product of the ratios since the last computed step is from 1. Steps
are reused while the sum of these costs stays below a threshold. Theirs is measured on one text and decides while sampling; the ratios are
known beforehand, so ours plans the timesteps once, while quantizing. Norms are those of whole tensors (theirs: means over tokens).
"""

from __future__ import annotations

import numpy as np

from reelquant._errors import UnsupportedError
from reelquant.reuse.plans import Errors


def computed_at(errors: Errors, threshold: float, *, first: int, longest: int) -> list[float]:
    """The timesteps at which a stretch is computed, falling.

    Args:
        errors: what was recorded of the stretch at every step.
        threshold: of the summed cost of a pause.
        first: so many steps at the start are computed.
        longest: steps from one computed one to the next, at most.

    Raises:
        UnsupportedError: if the stretch changes nothing at some step.
    """
    sizes = np.sqrt(np.diag(errors.gram))
    if (still := next((number for number, size in enumerate(sizes) if not size > 0), None)) is not None:
        raise UnsupportedError(
            f"'magnitude' of reuse 'blocks' needs blocks that change something at every step, and at timestep "
            f"{errors.timesteps[still]:g} they change nothing; give a schedule instead"
        )
    steps, cost = list(range(min(first, len(sizes)))), 0.0
    for step in range(len(steps), len(sizes)):
        cost += abs(1 - sizes[step] / sizes[steps[-1]])
        if cost > threshold or step - steps[-1] >= longest:
            steps.append(step)
            cost = 0.0
    return [round(errors.timesteps[step], 4) for step in steps]
