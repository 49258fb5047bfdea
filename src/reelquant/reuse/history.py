"""What a part gave at the steps at which it was computed, and what it is expected to give at another one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from reelquant._errors import RecipeError

ORDERS = (0, 1, 2)


def check_order(order: int) -> None:
    """Refuse an order of forecasts that is not offered.

    Raises:
        RecipeError: naming those that are.
    """
    if order not in ORDERS:
        raise RecipeError(f"'order' of a reuse is 0 (the last result), 1 (a line) or 2 (a parabola), got {order}")


class History:
    """Tensors of the last computed steps, oldest first.

    Paper: TaylorSeer (arXiv 2503.06923) forecasts features from finite differences of earlier steps. Ours is the polynomial through
    the last ``order + 1`` results, taken in the timestep instead of the step's number, so unevenly spaced steps count by their distance.
    With fewer results than that the order is lower.

    Args:
        order: of the polynomial; 0 repeats the last result.
    """

    def __init__(self, order: int) -> None:
        self.kept: deque[tuple[float, tuple[Tensor, ...]]] = deque(maxlen=order + 1)

    def __len__(self) -> int:
        return len(self.kept)

    def keep(self, timestep: float, tensors: Sequence[Tensor]) -> None:
        """Note what a computed step gave."""
        self.kept.append((timestep, tuple(tensors)))

    @property
    def last(self) -> tuple[Tensor, ...]:
        """What the last computed step gave."""
        return self.kept[-1][1]

    def at(self, timestep: float, fitted: Sequence[float] = ()) -> tuple[Tensor, ...]:
        """What is expected at a timestep.

        Args:
            fitted: weights of the results, oldest first, to use instead of the polynomial's; the last ones if there are fewer results.
        """
        shares = fitted[-len(self.kept) :] or weights([time for time, _ in self.kept], timestep)
        columns = zip(*(tensors for _, tensors in self.kept), strict=True)
        return tuple(_sum(shares, column) for column in columns)


def _sum(shares: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """``sum(shares * tensors)`` in the dtype of the tensors."""
    if not tensors[-1].is_floating_point() or (len(tensors) == 1 and shares[0] == 1.0):
        return tensors[-1]
    total = tensors[0] * shares[0]
    for share, tensor in zip(shares[1:], tensors[1:], strict=True):
        total.add_(tensor, alpha=share)
    return total


def weights(times: Sequence[float], timestep: float) -> list[float]:
    """Lagrange's weights: a polynomial through values at ``times`` has at ``timestep`` the value ``sum(weights * values)``."""
    found = []
    for number, own in enumerate(times):
        weight = 1.0
        for other in (*times[:number], *times[number + 1 :]):
            weight *= (timestep - other) / (own - other)
        found.append(weight)
    return found
