"""What every place of attention gives at every step: inner products, which :mod:`reelquant.reuse.attention.planned` plans with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.nn import AttentionCall
from reelquant.nn.around.attention_running import Where
from reelquant.reuse.attention.following import Following
from reelquant.stages import ModelWork

ELEMENTS = 65_536
"""Values of an output that inner products are taken of, of every call."""

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Recorded:
    """What plans are made from.

    Attributes:
        timesteps: of the sampler's steps, in sampling order.
        grams: by place, ``[steps, steps]`` inner products of its outputs, summed over clips and calls.
        multiplications: by place, those of one step.
    """

    timesteps: tuple[float, ...]
    grams: Mapping[str, Array]
    multiplications: Mapping[str, float]


class Outputs(Following):
    """Computes everything, and takes inner products of what places give at all steps."""

    def __init__(self, model: nn.Module, names: Mapping[str, Any], sites: Sequence[str]) -> None:
        self.timesteps: dict[int, float] = {}
        self.products: defaultdict[str, defaultdict[tuple[int, int], float]] = defaultdict(lambda: defaultdict(float))
        self.multiplications: Counter[str] = Counter()
        super().__init__(model, names, sites)

    def attend(self, call: AttentionCall, where: Where) -> Tensor:
        output = self.compute(call, where)
        if (found := self.placed(call, where)) is not None:
            place, trajectory = found
            site = self.names[where.row]
            self.timesteps[place.step] = place.timestep
            self.multiplications[site] += call.multiplications
            some = output.flatten()[:: max(output.numel() // ELEMENTS, 1)].float()
            known = trajectory.notes.setdefault(("outputs", place.name, place.half), {})
            known[place.step] = some
            for step, other in known.items():
                self.products[site][step, place.step] += float(some @ other) * output.numel() / some.numel()
        return output

    def gram(self, site: str) -> Array:
        """Inner products of a place, ``[steps, steps]``."""
        steps = len(self.timesteps)
        found = np.zeros((steps, steps))
        for (one, other), value in self.products[site].items():
            found[one, other] = found[other, one] = value
        return found


def record(work: ModelWork, names: Mapping[str, Any], sample: Callable[[], object]) -> Recorded:
    """Sample a few clips, and take inner products of what attention gives.

    Raises:
        UnsupportedError: if the sampler's timesteps do not fall.
    """
    outputs = Outputs(work.denoiser, names, [site.name for site in work.map.attention])
    try:
        sample()
    finally:
        outputs.remove()
    times = [outputs.timesteps[step] for step in sorted(outputs.timesteps)]
    if len(times) < 2:
        raise UnsupportedError(f"reuse 'attention' needs a sampler with falling timesteps, and '{work.component}' was called at {times}")
    called = [site for site in outputs.names if outputs.multiplications[site]]
    counts = {site: outputs.multiplications[site] / len(times) for site in called}
    return Recorded(tuple(times), {site: outputs.gram(site) for site in called}, counts)
