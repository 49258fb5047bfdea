"""Which denoiser calls rows are taken from, when not every call can be sampled."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

from reelquant.observe.call import Call

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class SampledCalls:
    """An even choice of at most ``most`` calls.

    The expected calls, those of the first step before those of the second, are cut into equal stretches, and one call of each is
    sampled. Its place in the stretch follows the golden ratio, so sampled calls spread over sampler runs, too. Calls beyond the expected
    ones fold back onto them.

    Attributes:
        steps: expected steps of a sampler run.
        parts: expected sampler runs.
        most: sampled calls, at most.
    """

    steps: int
    parts: int
    most: int

    @cached_property
    def _places(self) -> dict[int, int]:
        """Number of a call, step by step -> its number among the sampled ones."""
        calls = self.steps * self.parts
        edges = [calls * index // len(self) for index in range(len(self) + 1)]
        places = [low + int(index * GOLDEN % 1 * (high - low)) for index, (low, high) in enumerate(itertools.pairwise(edges))]
        return {place: index for index, place in enumerate(places)}

    def __len__(self) -> int:
        return max(min(self.steps * self.parts, self.most), 1)

    def place(self, call: Call) -> int | None:
        """Number of a call among the sampled ones; None if it is not sampled, as probes are not."""
        if call.probe:
            return None
        return self._places.get((call.step % self.steps) * self.parts + call.part % self.parts)

    def of(self, calls: int) -> int:
        """How many of so many calls are sampled."""
        return -(-calls * len(self) // (self.steps * self.parts))
