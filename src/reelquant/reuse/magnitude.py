"""A schedule from the size of what a stretch changes, measured on held-out clips.

Paper: MagCache (arXiv 2506.09045) finds that the size of the residual, from one step to the next, falls by a ratio that is nearly the same
for all texts and tokens. What reuse costs at a step is then how far the product of the ratios since the last computed step is from 1. Steps
are reused while the sum of these costs stays below a threshold. Theirs is measured on one text and decides while sampling; the ratios are
known beforehand, so ours plans the timesteps once, while quantizing. Norms are those of whole tensors (theirs: means over tokens).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reelquant._errors import UnsupportedError
from reelquant.reuse.reuse import Reuse, installed_reuse, put, remove_reuse
from reelquant.reuse.trajectory import Trajectory
from reelquant.stages import ModelWork


def norms(work: ModelWork, always: Reuse, facts: Mapping[str, Any]) -> dict[float, float]:
    """Timestep -> root of the mean square of what the stretch gives, over held-out clips in which all is computed.

    Args:
        always: a reuse that computes everything.
        facts: what it needs to know of the stretch.
    """
    squares: dict[float, list[float]] = defaultdict(list)

    def see(trajectory: Trajectory, _: Any, tensors: tuple[Tensor, ...]) -> None:
        squares[trajectory.timestep] += [float(tensor.float().square().mean()) for tensor in tensors]

    put(work.denoiser, "blocks", always, facts)
    try:
        for stretch in installed_reuse(work.denoiser)["blocks"].installed.stretches:
            stretch.watcher = see
        with work.timed("measure magnitudes", len(work.timesteps)), torch.no_grad():
            work.held_out_latents()
    finally:
        remove_reuse(work.denoiser)
    return {time: (sum(found) / len(found)) ** 0.5 for time, found in squares.items()}


def computed_at(sizes: Mapping[float, float], threshold: float, *, first: int, longest: int) -> list[float]:
    """The timesteps at which a stretch is computed, falling.

    Args:
        sizes: of what it gives, by timestep.
        threshold: of the summed cost of a pause.
        first: so many steps at the start are computed.
        longest: steps from one computed one to the next, at most.

    Raises:
        UnsupportedError: for a size that is no positive number.
    """
    times = sorted(sizes, reverse=True)
    if wrong := next((time for time in times if not 0 < sizes[time] < float("inf")), None):
        raise UnsupportedError(
            f"'magnitude' of reuse 'blocks' needs blocks that change something at every step, and at timestep {wrong:g} the size of their "
            f"change is {sizes[wrong]:g}; give a schedule instead"
        )
    found, cost = list(times[:first]), 0.0
    for number, time in enumerate(times[first:], start=first):
        last = times.index(found[-1])
        cost += abs(1 - sizes[time] / sizes[found[-1]])
        if cost > threshold or number - last >= longest:
            found.append(time)
            cost = 0.0
    return found
