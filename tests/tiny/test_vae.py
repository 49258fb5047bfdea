"""VAEs that are calibrated: static scales from what they decode and encode, pictures and clips, causal ones with caches among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import reelquant
from reelquant.engine import run as engine
from reelquant.engine.report import Report
from reelquant.models.parts import decibels
from reelquant.models.sampling import sample
from reelquant.nn import QuantConv3d, quantized_layers
from tests.tiny.conditioned import CASES, made
from tests.tiny.stock import CALL, PROMPTS, realigned, wan_pipeline

FEW = {"calibrate.prompts": 2, "search.prompts": 2}
TEXTS = [*PROMPTS, "a red box", "a ball"]


def clips(pipe: Any) -> torch.Tensor:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            realigned(part)
    return sample(pipe, ["a red ball"], **CALL)


@pytest.fixture(scope="module")
def causal() -> tuple[Any, Report]:
    """A denoiser and a causal VAE, observed in one pass."""
    pipe, passes, original = wan_pipeline(), list[int](), engine.calibrate_together

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(len(args[1]))
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "calibrate_together", counted)
        report = reelquant.quantize(pipe, {"transformer": "minmax-w8a8", "vae": "minmax-w8a8"}, TEXTS, overrides=FEW, **CALL)
    assert passes == [2] and "decode" not in vars(pipe.vae)
    return pipe, report


def test_a_causal_vae_has_static_scales_of_its_own_clips(causal: tuple[Any, Report]) -> None:
    pipe, report = causal
    part = report.parts["vae"]
    assert part.latent_psnr is None and part.timesteps == [0.0] and "first and last layer stay float" in part.skipped
    assert 35 < part.figures["decoded_psnr_worst"] <= part.figures["decoded_psnr"] < 80 and part.figures["round_trip_psnr"] > 25
    assert all(record.input.startswith("uint8") and record.error is not None and record.error < 0.01 for record in part.layers)
    halves = {name.partition(".")[0] for name in quantized_layers(pipe.vae)}
    assert halves == {"encoder", "decoder"}  # the pipeline never encodes; calibration does
    assert any(isinstance(layer, QuantConv3d) for layer in quantized_layers(pipe.vae).values())
    assert part.saturation["share"] < 0.05 and part.prompts and part.held_out


def test_its_figure_is_that_of_the_same_latents(causal: tuple[Any, Report]) -> None:
    pipe, _ = causal
    latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = decibels(*(vae.decode(latents, return_dict=False)[0] for vae in (wan_pipeline().vae, pipe.vae)))
    assert 30 < found < 80


def test_it_is_saved_and_opened_by_stock_diffusers(causal: tuple[Any, Report], tmp_path: Path) -> None:
    pipe, report = causal
    reelquant.save(pipe, tmp_path / "out", report)
    again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert len(quantized_layers(again.vae)) == len(report.parts["vae"].layers)
    assert torch.equal(clips(again), clips(pipe))


def test_alone_it_gets_the_same_scales(causal: tuple[Any, Report]) -> None:
    alone = wan_pipeline()
    reelquant.quantize(alone, {"vae": "minmax-w8a8"}, TEXTS, overrides=FEW, **CALL)
    one, other = (pipe.vae.state_dict() for pipe in (alone, causal[0]))
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_layers_that_never_ran_stay_float(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = wan_pipeline()

    def refuse(x: torch.Tensor) -> None:
        raise ValueError("this size is none of mine")

    pipe.vae.encode = refuse
    report = reelquant.quantize(pipe, {"vae": "minmax-w8a8"}, TEXTS, overrides=FEW, **CALL)
    assert {name.partition(".")[0] for name in quantized_layers(pipe.vae)} == {"decoder"}
    assert any(name.startswith("encoder.mid_block") for name in report.skipped["never called by the sampler"])
    assert "decoded_psnr" in report.figures and "round_trip_psnr" not in report.figures and report.warnings


def test_a_failed_run_leaves_the_vae_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = wan_pipeline()
    before = clips(pipe)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_account", fail)
    with pytest.raises(KeyboardInterrupt):
        reelquant.quantize(pipe, {"vae": "minmax-w8a8"}, TEXTS, overrides=FEW, **CALL)
    assert not quantized_layers(pipe.vae) and not {"decode", "encode"} & set(vars(pipe.vae)) and torch.equal(clips(pipe), before)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["dit", "svd", "cogvideox_i2v", "ltx_i2v"])
def test_vaes_of_other_kinds(name: str) -> None:
    """Of pictures, with a temporal decoder, causal with caches, and one that also sees the picture of the condition."""
    pipe = made(name)
    report = reelquant.quantize(pipe, {"vae": "minmax-w8a8"}, overrides=FEW, **CASES[name].settings, **CASES[name].conditions)
    assert {row.input.partition(" ")[0] for row in report.layers} == {"uint8"} and quantized_layers(pipe.vae)
    assert report.figures["decoded_psnr_worst"] > 25, report.figures


@pytest.mark.parametrize("recipe", ["minmax-w4a8", "qvd-w8a8"])
def test_other_recipes(recipe: str) -> None:
    report = reelquant.quantize(wan_pipeline(), {"vae": recipe}, TEXTS, overrides=FEW, **CALL)
    assert report.figures["decoded_psnr"] > 20 and any(record.input != "float" for record in report.layers)
