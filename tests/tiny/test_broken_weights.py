"""Weights that are not finite are found before anything runs, by name; models that were loaded differ in nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel

import reelquant
from reelquant import CalibrationError, ReelQuantConfig
from reelquant.nn import quantized_layers
from tests.families.models import FAMILIES, awake
from tests.tiny.bundled import CALL, PROMPT, RECIPE

BROKEN: dict[str, tuple[str, str, str]] = {
    "tiny-unet": ("unet", "conv_in.weight", r"the weight of layer 'conv_in' of 'unet' holds NaN or inf"),
    "tiny-dit": ("transformer", "blocks.0.norm2.weight", r"the weight of layer 'blocks\.0\.norm2' of 'transformer' holds NaN or inf"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_denoiser_is_found_before_it_is_run(name: str) -> None:
    component, tensor, message = BROKEN[name]
    pipe = reelquant.open_pipeline(name)
    pipe.components[component].get_parameter(tensor).data.view(-1)[-1] = torch.nan
    pipe.components[component].register_forward_pre_hook(lambda *args: pytest.fail("it ran"))
    for work in (lambda: reelquant.plan(pipe, "w8a16"), lambda: reelquant.quantize(pipe, RECIPE, PROMPT, **CALL)):
        with pytest.raises(CalibrationError, match=message):
            work()


@pytest.mark.parametrize("recipe", ["w8a16", RECIPE])
def test_what_stays_float_beside_the_denoiser_is_looked_at_too(recipe: Any) -> None:
    pipe = reelquant.open_pipeline("tiny-dit")
    next(pipe.vae.parameters()).data.view(-1)[0] = torch.inf
    with pytest.raises(CalibrationError, match=r"of 'vae' holds NaN or inf"):
        reelquant.quantize(pipe, recipe, PROMPT)
    assert not quantized_layers(pipe.transformer)


def test_a_norm_that_is_not_finite_is_found_from_disk_to_disk(tmp_path: Path) -> None:
    pipe = reelquant.open_pipeline("tiny-dit")
    pipe.transformer.get_parameter("blocks.0.norm2.weight").data[0] = torch.nan
    pipe.save_pretrained(tmp_path / "float")
    with pytest.raises(CalibrationError, match=r"the weight of layer 'blocks\.0\.norm2' of 'transformer' holds NaN or inf"):
        reelquant.quantize_folder(tmp_path / "float", tmp_path / "out", "w8a16")


@pytest.mark.parametrize("family", ["wan-2.1", "cogvideox"])
def test_quantized_while_loading_and_opened_again_is_the_same_to_the_last_bit(family: str, tmp_path: Path) -> None:
    """Float weights lie at other addresses in the two files, for which matrix products sum in another order."""
    chosen = FAMILIES[family]
    awake(chosen.make()).save_pretrained(tmp_path / "float")
    loaded = AutoModel.from_pretrained(str(tmp_path / "float"), quantization_config=ReelQuantConfig("w4a16"), dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "quantized")
    again = AutoModel.from_pretrained(str(tmp_path / "quantized"), dtype=torch.float32)
    assert not [value for model in (loaded, again) for value in floats(model) if value.data_ptr() % 64]
    with torch.no_grad():
        assert torch.equal(loaded(**chosen.inputs())[0], again(**chosen.inputs())[0])


def floats(model: torch.nn.Module) -> list[torch.Tensor]:
    layers = quantized_layers(model)
    return [value for name, value in model.named_parameters() if name.rpartition(".")[0] not in layers]
