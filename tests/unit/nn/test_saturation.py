"""Counting what quantized layers clip, on layers that are small enough to count by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelquant.formats import Granularity, Int, bind
from reelquant.nn import Saturation
from tests.single import build

WEIGHT = {"format": "int8", "granularity": "channel"}


def layer(input: Any, seen: Tensor, kind: nn.Module | None = None) -> nn.Module:
    """A model of one layer, calibrated on this input."""
    model = nn.Sequential(kind or nn.Linear(seen.shape[-1], 3))
    model[0] = build(model, ["0"], [seen], WEIGHT, input).layers["0"]
    return model


def counted(model: nn.Module, *inputs: Tensor) -> Saturation:
    """What is counted while the model computes these inputs."""
    found = Saturation()
    with found.counting(model):
        for x in inputs:
            model(x)
    return found


STATIC = {"format": "int8", "granularity": "tensor"}


def test_values_beyond_the_range_are_counted() -> None:
    model = layer(STATIC, torch.tensor([[1.0, -1.0, 0.5, 0.25]]))
    x = torch.tensor([[0.5, -0.5, 3.0, 0.0]])
    found = counted(model, x)
    one = found.of("0")
    assert (one.values, one.clipped) == (4, 1)
    assert one.share == 0.25
    assert one.reach == pytest.approx(3.0, rel=0.02)
    assert one.noise == pytest.approx((3 - 1) ** 2 / float(x.square().sum()), rel=0.02)
    assert found.excess > 1
    assert "clipping costs" in (found.sentence() or "") and "'0'" in (found.sentence() or "")


def test_values_inside_the_range_are_not_clipped() -> None:
    x = torch.randn(50, 4)
    found = counted(layer(STATIC, x), x * 0.99)
    assert found.of("0").clipped == 0 and found.excess == 0 and found.sentence() is None
    assert 0 < found.of("0").rounding < 1e-3


def test_calls_add_up() -> None:
    x = torch.randn(50, 4)
    model = layer(STATIC, x)
    once, twice = counted(model, 2 * x).of("0"), counted(model, 2 * x, 2 * x).of("0")
    assert (twice.values, twice.clipped) == (2 * once.values, 2 * once.clipped)
    assert twice.lost == pytest.approx(2 * once.lost) and twice.reach == once.reach


@pytest.mark.parametrize("input", [None, {"format": "int8", "granularity": "token", "dynamic": True}])
def test_float_and_dynamic_inputs_are_left_out(input: Any) -> None:
    assert counted(layer(input, torch.randn(5, 4)), torch.randn(5, 4) * 100).layers == {}


def test_outputs_are_the_same_and_nothing_stays() -> None:
    x = torch.randn(50, 4)
    model = layer(STATIC, x)
    before = model(3 * x)
    found = Saturation()
    with found.counting(model):
        inside = model(3 * x)
    assert torch.equal(inside, before)
    values = found.of("0").values
    model(3 * x)
    assert found.of("0").values == values and model[0].watch is None


def test_only_steps_that_are_due_are_counted() -> None:
    found = Saturation()
    x = torch.randn(5, 4)
    model = layer(STATIC, x)
    with found.counting(model, lambda step: False):
        model(x)
    assert found.layers == {"0": {}} and found.excess == 0 and found.facts()["layers"] == []


def test_ranges_of_channels_have_their_own_ends() -> None:
    grid = bind(Int(8), Granularity("channel", axis=-1), torch.tensor([-1.0, -10.0]), torch.tensor([1.0, 10.0]))
    low, high = grid.ends(torch.zeros(3, 2))
    assert torch.allclose(high, torch.tensor([1.0, 10.0]).expand(3, 2), rtol=0.02)
    assert torch.allclose(low, -torch.tensor([1.0, 10.0]).expand(3, 2), rtol=0.02)


def test_convolutions_are_counted() -> None:
    x = torch.randn(2, 3, 8, 8)
    found = counted(layer(STATIC, x, nn.Conv2d(3, 4, 3, padding=1)), 4 * x)
    assert found.of("0").values == x.numel() and found.of("0").reach == pytest.approx(4, rel=0.02)
