"""What a kernel is: a row of the tables that :mod:`reelquant.kernels` selects from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reelquant.kernels.features import not_taken
from reelquant.kernels.operands import Operands, Runner


@dataclass(frozen=True)
class Kernel:
    """A way to compute layers.

    Attributes:
        name: what reports print.
        takes: names of the features (:attr:`Operands.features`) that it computes.
        refuses: why it cannot compute a layer whose features it takes, or None if it can.
        prepare: builds what computes the layer, weights repacked once. A runner with a method ``codes()`` holds the weight itself and
            gives it back as it is stored; the layer then drops its own copy.
        low_bit: whether products of rounded inputs are integer products; if not, such a layer is only simulated.
    """

    name: str
    takes: frozenset[str]
    refuses: Callable[[Operands], str | None]
    prepare: Callable[[Operands], Runner]
    low_bit: bool = True

    def declines(self, operands: Operands) -> str | None:
        """Why this kernel does not compute a layer, or None if it does; features that it does not know come first."""
        unknown = not_taken(operands.features, self.takes)
        return self.refuses(operands) if unknown is None else f"it does not take {unknown}"
