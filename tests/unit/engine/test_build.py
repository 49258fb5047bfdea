"""Ranges of inputs from sampled rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reelquant.engine.build import COMPARED, distinct
from reelquant.formats import criteria
from reelquant.nn import QuantLayer
from tests.single import build

WEIGHT = {"format": "int8", "granularity": "channel"}


def input_scales(calls: list[Tensor], **inputs: Any) -> Tensor:
    """``[slots]``: the scales of a layer whose input at step ``i`` is ``calls[i]``."""
    layer = build(nn.ModuleDict({"layer": nn.Linear(16, 8)}), ["layer"], calls, WEIGHT, {"format": "int4", **inputs}).layers["layer"]
    assert isinstance(layer, QuantLayer) and layer.input_scale is not None
    return layer.input_scale.flatten()


def test_a_rule_that_looks_at_samples_gives_every_step_a_range() -> None:
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    calls, mse = [x, 3 * x, 0.5 * x], {"name": "mse", "p": 2.0}
    whole, found = (input_scales(calls, slots="per_step", range=rule) for rule in ("minmax", mse))
    assert found.shape == whole.shape == (3,)
    assert (found < 0.9 * whole).all(), "nothing is clipped, though four bits want it"
    ratio = found / found[0]
    assert torch.allclose(ratio, torch.tensor([1.0, 3.0, 0.5]), rtol=0.15), ratio
    assert len(input_scales(calls, range=mse)) == 1


def test_equal_rows_count_once() -> None:
    """A pipeline with a timestep per token gives every token of a frame the same row."""
    timesteps = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    rows = timesteps.repeat(50, 1)
    assert torch.equal(distinct(rows), timesteps.unique(dim=0))
    assert float(criteria.tdscore(distinct(rows), distinct(rows))) == 1


def test_rows_are_bounded() -> None:
    rows = torch.arange(10.0 * COMPARED)[:, None].expand(-1, 3)
    found = distinct(rows)
    assert len(found) == COMPARED and found[0, 0] == 0 and found[-1, 0] == len(rows) - 1
