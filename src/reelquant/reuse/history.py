"""What a part gave at the steps at which it was computed, and what it is expected to give at another one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
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


class Rounded(NamedTuple):
    """A tensor in 8 bits.

    Attributes:
        codes: int8, in its shape.
        scale: in its dtype, one for every row of the last axis.
    """

    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Rounded:
        """The nearest codes; the largest value of a row is 127."""
        scale = (tensor.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(tensor.dtype).tiny)
        return cls((tensor.float() / scale.float()).round().to(torch.int8), scale)  # a bfloat16 has no place for 126.5

    def tensor(self) -> Tensor:
        """What the codes stand for."""
        return self.codes * self.scale


def kind(value: Any) -> Any:
    """Shape, dtype and device of a tensor, rounded or not; None for anything else."""
    if isinstance(value, Rounded):
        return value.codes.shape, value.scale.dtype, value.codes.device
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else None


class History:
    """Tensors of the last computed steps, oldest first.

    Paper: TaylorSeer (arXiv 2503.06923) forecasts features from finite differences of earlier steps. Ours is the polynomial through
    the last ``order + 1`` results, taken in the timestep instead of the step's number, so unevenly spaced steps count by their distance.
    With fewer results than that the order is lower.

    Args:
        order: of the polynomial; 0 repeats the last result.
        rounded: whether floating-point tensors are kept in 8 bits.
    """

    def __init__(self, order: int, *, rounded: bool = False) -> None:
        self.kept: deque[tuple[float, tuple[Tensor | Rounded, ...]]] = deque(maxlen=order + 1)
        self.rounded = rounded

    def __len__(self) -> int:
        return len(self.kept)

    def keep(self, timestep: float, tensors: Sequence[Tensor]) -> None:
        """Note what a computed step gave."""
        self.kept.append((timestep, tuple(Rounded.of(one) if self.rounded and _rounds(one) else one for one in tensors)))

    @property
    def last(self) -> tuple[Tensor, ...]:
        """What the last computed step gave."""
        return tuple(_opened(one) for one in self.kept[-1][1])

    @property
    def kinds(self) -> list[Any]:
        """Shape, dtype and device of what the last computed step gave, tensor by tensor."""
        return [kind(one) for one in self.kept[-1][1]]

    @property
    def bytes(self) -> int:
        """Of everything that is kept."""
        parts = (part for _, tensors in self.kept for one in tensors for part in (one if isinstance(one, Rounded) else (one,)))
        return sum(part.numel() * part.element_size() for part in parts)

    def at(self, timestep: float, fitted: Sequence[float] = ()) -> tuple[Tensor, ...]:
        """What is expected at a timestep.

        Args:
            fitted: weights of the results, oldest first, to use instead of the polynomial's; the last ones if there are fewer results.
        """
        shares = fitted[-len(self.kept) :] or weights([time for time, _ in self.kept], timestep)
        columns = zip(*(tensors for _, tensors in self.kept), strict=True)
        return tuple(_sum(shares, [_opened(one) for one in column]) for column in columns)


def _opened(one: Tensor | Rounded) -> Tensor:
    return one.tensor() if isinstance(one, Rounded) else one


def _rounds(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim > 0


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
