"""Inputs of linear layers rounded to a table of levels (the features of timesteps), in one pass instead of torch's twenty."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reelquant.formats.number import LevelFormat
from reelquant.kernels.cpu import loops
from reelquant.kernels.cpu.options import EXACT, compiled
from reelquant.kernels.operands import Operands

HALVES = (128, 64, 32, 16, 8, 4, 2, 1)
MOST = sum(HALVES)  # middles between the levels of 8 bits


def refuses(operands: Operands) -> str | None:
    """Why these inputs are rounded by torch, or None."""
    numbers = operands.input
    if numbers is None or not isinstance(numbers.format, LevelFormat):
        return "inputs have no table of levels"
    if numbers.scale is None or numbers.granularity.kind != "tensor" or operands.window is not None or operands.rotate:
        return "tables are looked up for linear layers with one static scale and no rotation"
    return None


class LevelInputs:
    """``operands.quantized_input(x, slot)`` of such a layer, with the very same roundings."""

    def __init__(self, operands: Operands) -> None:
        numbers = operands.input
        assert numbers is not None and isinstance(numbers.format, LevelFormat) and numbers.scale is not None
        table = numbers.format.table.float()
        self.levels, self.middles = table.numpy(), np.full(MOST, np.inf, np.float32)
        self.middles[: len(table) - 1] = ((table[1:] + table[:-1]) / 2).numpy()
        self.shift, self.scale = (loops.NONE if one is None else one.float().numpy() for one in (operands.shift, operands.scale))
        self.units = [np.float32(one) for one in numbers.scale[:, 0].tolist()]
        zeros = None if numbers.zero_point is None else numbers.zero_point[:, 0].tolist()
        self.zeros = [np.float32(one) for one in zeros or [0.0] * len(self.units)]

    def __call__(self, x: Tensor, slot: int | Tensor) -> Tensor:
        index = 0 if len(self.units) == 1 else int(slot)
        out = torch.empty(x.shape, dtype=torch.float32)
        data = loops.view(x.float().contiguous()).reshape(-1, x.shape[-1])
        numbers = self.shift, self.scale, self.units[index], self.zeros[index], self.middles, self.levels
        loops.spread(to_levels, len(data), data.size, data, *numbers, out.numpy().reshape(data.shape))
        return out


@compiled(**EXACT)
def to_levels(start, stop, x, shift, scale, unit, zero, middles, levels, out):  # type: ignore[no-untyped-def]
    """``out = (level nearest to (x - shift) / scale / unit + zero, less zero) * unit``; NaN stays NaN.

    Args:
        x: ``[rows, channels]`` float32.
        shift, scale: ``[channels]`` float32, or empty.
        middles: ``[MOST]`` float32, between two levels, then infinities; a number in the middle gets the lower one.
        levels: sorted, float32.
        out: ``[rows, channels]`` float32, written.
    """
    for i in range(start, stop):
        for j in range(x.shape[1]):
            value = x[i, j]
            if shift.shape[0]:
                value = value - shift[j]
            if scale.shape[0]:
                value = value / scale[j]
            value = value / unit + zero
            first = 0
            for half in HALVES:  # how many middles are smaller, without a branch that cannot be foretold
                first += half if middles[first + half - 1] < value else 0
            out[i, j] = (levels[first] - zero) * unit if value == value else value
