"""Blocks dropped of a float pipeline: fewer in its config, trained to make up for them, and stock diffusers opens what is left."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import reelquant
from reelquant._errors import RecipeError, UnsupportedError
from reelquant.discover import denoiser_of
from reelquant.nn import quantized_layers
from reelquant.removal.chain import Chain
from reelquant.removal.distill import Distillation
from tests.tiny.configs import TINY
from tests.tiny.stock import CALL, PROMPTS, frames, wan_pipeline


def longer(blocks: int = 4) -> Any:
    """The Wan pipeline with more blocks, so that some can go; the last ones hardly change anything."""
    pipe = wan_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = type(pipe.transformer).from_config(dict(pipe.transformer.config) | {"num_layers": blocks}).eval()
        for block in model.blocks[1:]:
            for parameter in (*block.attn1.to_out.parameters(), *block.attn2.to_out.parameters(), *block.ffn.net[2].parameters()):
                parameter.data *= 0.3
    pipe.register_modules(transformer=model)
    return pipe


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def dropped(pipe: Any, blocks: Any = 1, **options: Any) -> Any:
    return reelquant.drop_blocks(pipe, blocks, prompts=PROMPTS, calls=8, progress=False, **CALL | options)


def test_what_is_left_is_a_stock_model_and_can_be_quantized(tmp_path: Path) -> None:
    pipe = longer()
    before = state(pipe.transformer)
    found = dropped(pipe, [1, 2], iterations=0)
    assert found.blocks == (1, 2) and (found.setting, found.left) == ("num_layers", 2) and found.error[0] == found.error[1] > 0
    assert found.parameters[1] == sum(parameter.numel() for parameter in pipe.transformer.parameters()) < found.parameters[0]
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, before[name.replace("blocks.1.", "blocks.3.")]), name
    pipe.save_pretrained(tmp_path / "float")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "float")
    opened.set_progress_bar_config(disable=True)
    assert opened.transformer.config.num_layers == 2
    torch.testing.assert_close(frames(opened), frames(pipe), rtol=0, atol=1e-5)
    reelquant.quantize(pipe, "w8a16")
    reelquant.save(pipe, tmp_path / "out")
    assert len(reelquant.load(tmp_path / "out").transformer.blocks) == 2


def test_training_lowers_the_error_on_held_out_calls_and_leaves_the_model_as_it_was_otherwise() -> None:
    pipe = longer(3)
    outside = {name: value for name, value in state(pipe.transformer).items() if not name.startswith("blocks.")}
    found = dropped(pipe, [1], iterations=30, rate=3e-3)
    assert found.error[1] < 0.9 * found.error[0]
    now = pipe.transformer.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in outside.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pipe.transformer.parameters())


def test_training_that_does_harm_is_dropped() -> None:
    trained, plain = longer(3), longer(3)
    found = dropped(trained, [1], iterations=3, rate=1e3)
    dropped(plain, [1], iterations=0)
    assert found.error[0] == found.error[1]
    other = plain.transformer.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in trained.transformer.state_dict().items())


@pytest.mark.parametrize(("choose", "blocks"), [("shallow", (1, 2)), ("deep", (1, 2)), ("measured", None)])
def test_how_blocks_are_chosen(choose: str, blocks: tuple[int, ...] | None) -> None:
    pipe = longer()
    found = dropped(pipe, 2, choose=choose, iterations=0)
    if blocks is not None:
        assert found.blocks == blocks
        return
    others = [dropped(longer(), list(pair), iterations=0).error[0] for pair in ((0, 1), (0, 2), (0, 3))]
    assert 0 not in found.blocks and found.error[0] < min(others)  # the first block is the only one that changes much


def test_the_pipeline_is_as_it_was_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = longer(3)
    before, config = state(pipe.transformer), dict(pipe.transformer.config)

    def fails(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Distillation, "loss", fails)
    with pytest.raises(KeyboardInterrupt):
        dropped(pipe, [1], iterations=3)
    assert dict(pipe.transformer.config) == config and len(pipe.transformer.blocks) == 3
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())


@pytest.mark.parametrize(
    ("blocks", "options", "said"),
    [
        (3, {}, "of 3 blocks 1 to 2 can be dropped, got 3"),
        (0, {}, "got 0"),
        ([3], {}, "numbers from 0 to 2"),
        ([0, 1, 2], {}, "not all of them"),
        (1, {"choose": "deepest"}, "did you mean 'deep'"),
        (1, {"rate": 0.0}, "rate > 0"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(blocks: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        dropped(longer(3), blocks, **options)


def test_models_without_a_chain_or_in_few_bits_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="has no chain of blocks"):
        Chain.of(TINY["UNet3DConditionModel"]())
    pipe = wan_pipeline()
    reelquant.quantize(pipe, "w8a16")
    assert quantized_layers(denoiser_of(pipe)[1])
    with pytest.raises(UnsupportedError, match="is quantized; drop blocks of the float model"):
        dropped(pipe)


def test_a_config_that_does_not_count_blocks_is_refused() -> None:
    model = longer(3).transformer
    model.blocks.append(copy.deepcopy(model.blocks[-1]))  # 4 blocks, and 4 channels, which are another setting
    assert model.config.num_layers == 3 and model.config.in_channels == 4
    with pytest.raises(UnsupportedError, match="no setting of the config of WanTransformer3DModel makes 'blocks' one block shorter than 4"):
        Chain.of(model)
