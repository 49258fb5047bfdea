"""Relations of frames as a loss."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reelquant._errors import RecipeError
from reelquant.reconstruct import Scales
from reelquant.reconstruct.frame_relation import frame_axis, relation


def test_two_frames_by_hand() -> None:
    """Equal frames relate by cosine 1, opposite ones by -1: softmax of (1, 1) is one half each, of (1, -1) it is s and 1 - s."""
    equal, opposite = torch.tensor([[[1.0, 2.0], [1.0, 2.0]]]), torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    wanted, found = (one.transpose(1, 2)[..., None, None] for one in (equal, opposite))  # [B, C, F, 1, 1]
    s = 1 / (1 + math.exp(-2))
    expected = 2 * 0.5 * (math.log(0.5 / s) + math.log(0.5 / (1 - s)))
    assert float(relation(found, wanted, 2)) == pytest.approx(expected, rel=1e-5)
    assert float(relation(wanted, wanted, 2)) == pytest.approx(0, abs=1e-6)
    assert float(relation(3 * wanted, wanted, 2)) == pytest.approx(0, abs=1e-6)  # sizes do not matter


def test_where_the_frames_are() -> None:
    module: Any = SimpleNamespace(config=SimpleNamespace(in_channels=4))
    assert frame_axis(module, (torch.zeros(1, 4, 7, 2, 2),)) == 2
    assert frame_axis(module, torch.zeros(1, 7, 4, 2, 2)) == 1
    assert frame_axis(module, torch.zeros(1, 14, 4)) is None


def test_relations_belong_to_the_whole_denoiser() -> None:
    with pytest.raises(RecipeError, match="the latter with scope: model"):
        Scales(relation=1.0)
    with pytest.raises(RecipeError, match="branch_rate >= 0"):
        Scales(branch_rate=-1.0)
