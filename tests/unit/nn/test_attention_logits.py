"""Scores of self-attention that follow the number of tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import reelquant
from reelquant._errors import CheckpointError, RecipeError
from reelquant.checkpoint.stored import Stored
from reelquant.kernels.attention import AttentionQuant
from reelquant.nn import round_attention, scale_logits, scaled_logits
from reelquant.nn.around.attention import HOOKS
from reelquant.policies import ScaleLogits
from reelquant.reuse import installed_reuse
from tests.tiny.stock import CALL, PROMPTS, realigned, wan_pipeline


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x.roll(1, -1), x.roll(2, -1), scale=0.3)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Attends(), Attends()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x))


@pytest.mark.parametrize("rounds", [False, True])
def test_scores_are_scaled_where_the_number_of_tokens_is_another_one(rounds: bool) -> None:
    torch.manual_seed(0)
    model, plain, usual, more = Denoiser(), Denoiser(), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 27, 4)
    for one in (model, plain) if rounds else ():
        round_attention(one, AttentionQuant("int8"))
    scale_logits(model, {"one": 9})
    with torch.no_grad():
        assert torch.equal(model(usual), plain(usual))
        found, expected = model(more), plain(more)
        assert not torch.equal(found, expected)
        factor = math.sqrt(math.log(27) / math.log(9))
        plain.one.forward = lambda x: F.scaled_dot_product_attention(x, x.roll(1, -1), x.roll(2, -1), scale=0.3 * factor)
        assert torch.equal(found, plain(more))
    scale_logits(model, None)
    assert torch.equal(model(more), expected) and (rounds or HOOKS not in vars(model))


def test_tokens_are_counted_place_by_place_and_stored(tmp_path: Path) -> None:
    """Three frames of 4 x 4 tokens; attention that is reused where a threshold says so goes with it."""
    pipe = wan_pipeline()
    steps = [{"reuse": "attention", "threshold": 0.9}, {"policy": "scale_logits"}]
    recipe = {
        "name": "sized",
        "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": None},
        "rules": [{"on": "role:entry | role:exit", "skip": True}],
        "calibrate": {"prompts": 2, "steps": 3},
        "steps": steps,
    }
    report = reelquant.quantize(pipe, recipe, PROMPTS, **CALL)
    assert scaled_logits(pipe.transformer) == {"blocks.0.attn1": 48, "blocks.1.attn1": 48} and report.reuse["attention"]["reused"] > 0
    folder = reelquant.save(pipe, tmp_path / "out")
    model = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    assert scaled_logits(model) == scaled_logits(pipe.transformer)
    facts, stored = (installed_reuse(one)["attention"].facts for one in (pipe.transformer, model))
    assert facts == stored and len(facts["timesteps"]) == 3 and all(row[0] == -1 for row in facts["table"].values())
    latents = torch.randn(1, 4, 5, 8, 8)
    call = {
        "hidden_states": latents,
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "return_dict": False,
    }
    with torch.no_grad():
        found = realigned(model)(**call)[0]
        scale_logits(model, None)
        assert not torch.equal(model(**call)[0], found)
        model.dequantize()
    assert not scaled_logits(model) and HOOKS not in vars(model)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(RecipeError, match="2 or more, or 0 to count them, got 1"):
        ScaleLogits(1)
    data = Stored({}, {}).to_json()
    with pytest.raises(CheckpointError, match="logits holds numbers of tokens, got"):
        Stored.from_json(data | {"logits": {"blocks.0.attn1": "many"}})
