"""Halves of an input that a skip connection joins."""

from __future__ import annotations

import torch
from torch import nn

from reelquant.kernels import Permutation
from reelquant.stages import GroupView, Rewrite
from reelquant.transforms import Split
from tests.single import build

HIGH = torch.tensor([[4.0, 1.0, 0.25, 0.125]])


def view(seam: int | None, total: Rewrite | None = None, *, rounded: bool = True) -> GroupView:
    mean = torch.zeros(1, 4)
    return GroupView(-HIGH / 2, HIGH, mean, [torch.ones(2, 4)], seam=seam, total=total or Rewrite(), rounded=rounded)


def test_both_halves_end_at_the_same_number() -> None:
    """4 and 0.25 meet at 1: the square root of their ratio is 4."""
    rewrite = Split().plan(view(2))
    assert rewrite.scale.tolist() == [4.0, 4.0, 0.25, 0.25]
    _, high = rewrite.ends(-HIGH, HIGH)
    assert high.tolist() == [[1.0, 0.25, 1.0, 0.5]]


def test_what_is_left_alone() -> None:
    assert Split().plan(view(None)).identity
    assert Split().plan(view(2, rounded=False)).identity
    assert Split().plan(view(2, Rewrite(mixes=(Permutation(torch.tensor([3, 2, 1, 0])),)))).identity  # its channels are elsewhere
    dead = GroupView(torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.zeros(1, 4), [torch.ones(2, 4)], seam=2)
    assert Split().plan(dead).identity


@torch.no_grad()
def test_a_small_half_keeps_its_precision() -> None:
    """The half that is a hundred times as small has a hundred times the weights; in six bits it is lost without a split."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 6, 3, padding=1), torch.randn(4, 8, 5, 5)
    x[:, 4:] /= 100
    layer.weight[:, 4:] *= 100
    errors = {}
    for name, steps in {"plain": [], "split": [{"transform": "split"}]}.items():
        model = nn.ModuleDict({"layer": layer})
        built = build(model, ["layer"], [x], {"format": "int8", "granularity": "channel"}, {"format": "uint6"}, steps, seam=4)
        errors[name] = float((built.layers["layer"](x) - layer(x)).square().mean())
    assert errors["split"] < errors["plain"] / 30
