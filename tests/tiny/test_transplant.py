"""Code of others builds a model out of the tensors of a quantized one: it is quantized, too, or one sentence says why not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AnimateDiffPipeline, ControlNetModel, DDIMScheduler, MotionAdapter, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

import reelquant
from reelquant import UnsupportedError
from reelquant.nn import quantized_layers
from tests.tiny.bundled import PROMPT, denoiser, opened, quiet

CALL: dict[str, Any] = dict(num_frames=4, height=64, width=64, num_inference_steps=2, output_type="latent")


def picture_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64, attention_head_dim=8,
    ).eval()  # fmt: skip


def motion() -> MotionAdapter:
    torch.manual_seed(1)
    return MotionAdapter(block_out_channels=(32, 64), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=8)


def parts() -> dict[str, Any]:
    tiny = reelquant.open_pipeline("tiny-unet")
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return {name: tiny.components[name] for name in ("tokenizer", "text_encoder", "vae")} | {"scheduler": scheduler}


def sampled(pipe: Any) -> torch.Tensor:
    return quiet(pipe)(PROMPT, generator=torch.Generator().manual_seed(0), **CALL).frames


def quantized_unet() -> Any:
    pipe = StableDiffusionPipeline(
        unet=picture_unet(), safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts()
    )
    reelquant.quantize(pipe, "w8a16")
    return pipe.unet


def animated() -> Any:
    """AnimateDiff around a quantized UNet for pictures."""
    return AnimateDiffPipeline(unet=quantized_unet(), motion_adapter=motion(), **parts())


def test_animatediff_around_a_quantized_unet_is_quantized_and_opens_again(tmp_path: Path) -> None:
    pipe = animated()
    count = len(quantized_layers(pipe.unet))
    assert count > 50
    pipe.save_pretrained(tmp_path / "a")
    again = AnimateDiffPipeline.from_pretrained(tmp_path / "a")
    assert len(quantized_layers(again.unet)) == count
    assert again.unet.config.quantization_config.recipe["name"] == "w8a16"
    assert torch.equal(sampled(again), sampled(pipe))


def test_a_controlnet_out_of_a_quantized_unet_is_quantized_and_opens_again(tmp_path: Path) -> None:
    unet = quantized_unet()
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).eval()
    assert len(quantized_layers(net)) > 20
    net.save_pretrained(tmp_path / "net")
    again = ControlNetModel.from_pretrained(tmp_path / "net")
    assert quantized_layers(again).keys() == quantized_layers(net).keys()


def test_free_noise_keeps_the_layers_of_the_blocks_that_it_exchanges() -> None:
    """A layer with parameters per step goes on to follow the clock of its denoiser."""
    pipe = quiet(opened("tiny-unet"))
    model = denoiser(pipe)
    layers, clocks = (
        {name: layer.layout for name, layer in quantized_layers(model).items()},
        {layer.clock for layer in quantized_layers(model).values()},
    )
    pipe.motion_adapter = SimpleNamespace(config=SimpleNamespace(motion_max_seq_length=32))  # merged into this UNet long ago
    pipe.enable_free_noise(context_length=4, context_stride=2)
    assert {name: layer.layout for name, layer in quantized_layers(model).items()} == layers
    assert {layer.clock for layer in quantized_layers(model).values()} == clocks
    assert bool(pipe(PROMPT[0], num_frames=8, num_inference_steps=2, output_type="latent").frames.isfinite().all())


def test_layers_that_follow_the_step_do_not_enter_a_model_that_would_not_tell_it() -> None:
    model = denoiser(opened("tiny-dit"))
    name, layer = next((name, layer) for name, layer in quantized_layers(model).items() if layer.layout.slots > 1)
    alone = nn.Linear(layer.in_features, layer.out_features)
    before = alone.weight.detach().clone()
    with pytest.raises(UnsupportedError, match="quantize the pipeline then"):
        alone.load_state_dict(layer.state_dict())
    assert type(alone) is nn.Linear and torch.equal(alone.weight, before), name


def given(unet: Any) -> torch.Tensor:
    torch.manual_seed(2)
    with torch.no_grad():
        return unet(torch.randn(1, 8, 8, 8), timestep=1, encoder_hidden_states=torch.randn(1, 4, 64), return_dict=False)[0]


@pytest.mark.parametrize("copied", [lambda state: state, dict, lambda state: {key: value.detach() for key, value in state.items()}])
def test_a_state_dict_of_a_quantized_model_turns_a_float_model_into_it(copied: Any) -> None:
    """Also a copy of the dict, which lacks the descriptions that the state dict carries."""
    source = quantized_unet()
    unet = picture_unet()
    unet.load_state_dict(copied(source.state_dict()))
    assert quantized_layers(unet).keys() == quantized_layers(source).keys()
    assert torch.allclose(given(unet), given(source), atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_codes_that_nothing_describes_are_refused_before_anything_changes(strict: bool) -> None:
    source, unet = quantized_unet(), picture_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with pytest.raises(UnsupportedError, match="in a plain dict, which does not say how to read them"):
        unet.load_state_dict({name: value.clone() for name, value in source.state_dict().items()}, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert not quantized_layers(unet)
    source.load_state_dict({name: value.clone() for name, value in source.state_dict().items()})  # quantized already: as ever
