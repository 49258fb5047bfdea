"""One format per layer under a budget: the problem that every allocator solves, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Picks = list[int]  # the number of a format for every layer


@dataclass(frozen=True, eq=False)
class Problem:
    """Find the picks of least damage whose size is within the budget.

    Attributes:
        damage: ``[layers, formats]``, what each format does in each layer alone; damages of different layers add up.
        sizes: ``[layers, formats]``, what it takes.
        budget: in the unit of ``sizes``; at least the sum of the smallest ones.
        trial: measures what picks of all layers together do, in the unit of ``damage``; None where nothing can be tried.
        tried: picks that were tried before, with what they did.
        seed: of members that draw.
    """

    damage: np.ndarray
    sizes: np.ndarray
    budget: float
    trial: Callable[[Sequence[int]], float] | None = None
    tried: Sequence[tuple[Sequence[int], float]] = ()
    seed: int = 0

    @property
    def layers(self) -> int:
        return len(self.damage)

    @property
    def formats(self) -> int:
        return self.damage.shape[1]

    def predicted(self, picks: Sequence[int]) -> float:
        """Sum of the damages."""
        return float(self.damage[np.arange(self.layers), list(picks)].sum())

    def size(self, picks: Sequence[int]) -> float:
        """What these picks take."""
        return float(self.sizes[np.arange(self.layers), list(picks)].sum())

    def fits(self, picks: Sequence[int]) -> bool:
        """Whether they are within the budget, to rounding of the sum."""
        return self.size(picks) <= self.budget * (1 + 1e-12)

    def smallest(self) -> Picks:
        """The smallest format of every layer; of equal ones, that of least damage."""
        return [int(np.lexsort((self.damage[layer], self.sizes[layer]))[0]) for layer in range(self.layers)]

    def uniform(self) -> Picks | None:
        """The best format for all layers within the budget; None if every one is too large."""
        fitting = [one for one in ([number] * self.layers for number in range(self.formats)) if self.fits(one)]
        return min(fitting, key=self.predicted, default=None)

    def starts(self) -> list[Picks]:
        """Where a search begins: everything small, and the best format for all. What only improves them is never worse than uniform."""
        uniform = self.uniform()
        return [self.smallest(), *([uniform] if uniform is not None else [])]
