"""Damage of a layer's own output: by hand, its price, and what it does not ask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from reelquant._errors import RecipeError
from reelquant.allocate import Milp
from reelquant.allocate.own_errors import ROWS, own_errors
from reelquant.formats import Int, QuantSpec, fit
from reelquant.observe import RecordedCall
from reelquant.recipes.recipe import load_recipe
from reelquant.stages import Specs
from tests.allocation import Work
from tests.single import one_group

FOUR, EIGHT = (Specs(QuantSpec(Int(bits)), QuantSpec(Int(2), dynamic=True)) for bits in (4, 8))


def test_the_error_is_that_of_the_layers_output_over_its_mean_square() -> None:
    work = Work((64, 128))
    found = own_errors(work, {"layers.1": [FOUR, EIGHT]}, work.calls)
    layer = work.float_layer("layers.1")
    expected = []
    for one in (FOUR, EIGHT):
        rounded = fit(one.weight, layer.weight)(layer.weight)
        read: list[torch.Tensor] = []
        with layer.register_forward_pre_hook(lambda module, args, read=read: read.append(args[0])):
            for call in work.calls:
                work.output(call)
        errors = [((x @ (rounded - layer.weight).T).square().mean() / layer(x).square().mean()).item() for x in read]
        expected.append(sum(errors) / len(errors))
    np.testing.assert_allclose(found, [expected], rtol=1e-4)
    assert work.tried["layers.1"] == [FOUR._replace(input=None), EIGHT._replace(input=None)]


def test_how_much_a_layer_matters_is_not_asked() -> None:
    """Layer 3 counts 27 times as much as layer 0: its damage to the denoiser is far larger, its own error is not."""
    work = Work((64, 64, 64, 64))
    first, last = own_errors(work, {"layers.0": [FOUR], "layers.3": [FOUR]}, work.calls)[:, 0]
    assert first == pytest.approx(last, rel=0.3)
    assert work.damage({"layers.3": FOUR}) > 100 * work.damage({"layers.0": FOUR})


def test_no_format_is_tried_in_the_denoiser() -> None:
    work = Work((64, 64, 64))
    ran: list[int] = []
    work.denoiser.register_forward_pre_hook(lambda *_: ran.append(1))
    stage = Milp(calls=4, bits=5, damage="layer")
    stage.choose_specs(work)
    assert len(ran) == stage.own_calls(3) == 2 * 4
    assert work.advanced == work.announced == 4
    assert Milp(calls=4, bits=5).own_calls(3) == (3 * 3 + 1) * 4


def test_a_few_tokens_of_a_call_are_enough_and_a_layer_that_never_runs_has_no_error() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(input=x)  # as the motion modules of diffusers do

    work = Work((64,))
    work.denoiser = Half().requires_grad_(False)
    work.map, work.tried = one_group(work.denoiser, ["used", "spare"]), {"used": [], "spare": []}
    lengths: list[int] = []
    work.denoiser.used.register_forward_hook(lambda module, args, output: lengths.append(len(output)))
    x = torch.randn(1, 3 * ROWS, 8)
    (used,), (spare,) = own_errors(work, {"used": [FOUR], "spare": [FOUR]}, [RecordedCall((x,), {}, x, 0)])
    assert used > 0 and spare == 0
    assert lengths == [1, ROWS, ROWS]  # the call itself, then float and rounded


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"milp.damage is that of an output; did you mean 'layer'"):
        load_recipe({"name": "x", "defaults": {"weight": {"format": "int8"}}, "steps": [{"allocate": "milp", "damage": "layers"}]})
