"""What a stretch of blocks gives at every step of a few clips, as inner products: :mod:`reelquant.reuse.plans` plans with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reelquant.reuse.trajectory import Trajectory

ELEMENTS = 65_536
"""Values of a result that are looked at, of every call and tensor of a step."""


class Results:
    """Hears what stretches give while everything is computed, as their watcher.

    Args:
        last: the block whose output counts, where outputs of blocks are kept; of a chain its change counts.

    Attributes:
        times: the timestep by the number of the step.
    """

    def __init__(self, last: str) -> None:
        self.last, self.times = last, dict[int, float]()
        self.values: defaultdict[Any, dict[int, Tensor]] = defaultdict(dict)
        self.clip: Trajectory | None = None
        self.clips = 0

    def __call__(self, trajectory: Trajectory, name: Any, tensors: tuple[Tensor, ...]) -> None:
        if isinstance(name, tuple) and name[0] != self.last:
            return
        if trajectory is not self.clip:
            self.clip, self.clips = trajectory, self.clips + 1
        self.times[trajectory.step] = trajectory.timestep
        for number, tensor in enumerate(tensors):
            if tensor.is_floating_point():
                self.values[self.clips, name, trajectory.call, number][trajectory.step] = sampled(tensor)

    @property
    def timesteps(self) -> list[float] | None:
        """Of the steps in sampling order; None if some step between the first and the last was not heard."""
        steps = range(len(self.times))
        return [self.times[step] for step in steps] if sorted(self.times) == list(steps) else None

    def gram(self) -> np.ndarray:
        """Inner products of what the stretch gave at each two steps, ``[steps, steps]``, summed over clips and calls."""
        steps = len(self.times)
        columns = [torch.stack([found[step] for step in range(steps)]) for found in self.values.values() if len(found) == steps]
        return gram(columns) if columns else np.zeros((steps, steps))


def gram(columns: Sequence[Tensor]) -> np.ndarray:
    """Inner products of the rows of each ``[steps, values]``, summed: ``[steps, steps]``."""
    return torch.stack([column.double() @ column.double().T for column in columns]).sum(0).numpy()


def sampled(tensor: Tensor) -> Tensor:
    """Some of the values, the same ones every time, in float32 on the CPU."""
    flat = tensor.detach().flatten()
    stride = -(-flat.numel() // ELEMENTS)
    return flat[::stride].float().cpu()
