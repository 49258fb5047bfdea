"""Which samples a range rule sees that compares them with each other."""

from __future__ import annotations

import torch

from reelquant.engine.build import COMPARED, distinct
from reelquant.formats import criteria


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
