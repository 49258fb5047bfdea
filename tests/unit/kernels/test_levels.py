"""Inputs rounded to a table of levels, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reelquant.formats import Granularity, Int, Quantizer
from reelquant.formats.number import Levels
from reelquant.kernels import InputQuant, Operands, PackedWeight, Window
from reelquant.kernels.cpu import levels


def operands(table: torch.Tensor, zero: bool, moved: bool, *, steps: int = 3, width: int = 24, **more: Any) -> Operands:
    """A layer whose inputs are rounded to a table."""
    weight = PackedWeight(torch.zeros(4, width, dtype=torch.int8), Quantizer(Int(8), Granularity("channel"), torch.ones(4)), (4, width))
    points = torch.arange(steps).view(-1, 1).float() - 1 if zero else None
    numbers = InputQuant(Levels(table), Granularity("tensor"), torch.rand(steps, 1) + 0.1, points)
    shift, scale = (torch.randn(width).bfloat16(), (torch.rand(width) + 0.5).bfloat16()) if moved else (None, None)
    return Operands(weight, None, numbers, shift, scale, **more)


@pytest.mark.parametrize("count", [2, 17, 200, 256])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_levels_are_those_of_the_reference_bit_by_bit(count: int, zero: bool, moved: bool) -> None:
    given = operands(torch.randn(count).unique(), zero, moved)
    assert levels.refuses(given) is None
    rounding = levels.LevelInputs(given)
    assert given.input is not None and given.input.scale is not None
    for slot in range(3):
        x = torch.randn(2, 50, 24)
        x[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        table = given.input.format.table
        assert table is not None
        between = (table[:-1] + table[1:]) / 2 * given.input.scale[slot]  # numbers in the middle of two levels
        x[1] = between[torch.randint(len(between), (50, 24))]
        for dtype in (torch.float32, torch.bfloat16):
            one = x.to(dtype)
            assert torch.equal(rounding(one, slot).nan_to_num(9), given.quantized_input(one, slot).nan_to_num(9))
        assert rounding(x, slot)[0, 0, 0].isnan()
    assert torch.equal(rounding(torch.ones(24), torch.tensor(1)), given.quantized_input(torch.ones(24), 1))
    assert rounding(torch.ones(0, 24), 0).shape == (0, 24)


def test_other_inputs_are_left_to_torch() -> None:
    table = torch.randn(9).unique()
    assert "rotation" in str(levels.refuses(operands(table, False, False, rotate=True)))
    assert "linear" in str(levels.refuses(operands(table, False, False, window=Window((1,), (0, 0), (1,)))))
    given = operands(table, False, False)
    assert levels.refuses(Operands(given.weight, None)) == "inputs have no table of levels"
