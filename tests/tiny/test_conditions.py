"""Pipelines that make clips from a picture, frames, a class or nothing: quantized, sampled and evaluated like any other."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import reelquant
from reelquant import CalibrationError, CheckpointError, RecipeError, UnsupportedError
from reelquant.api import folder_job
from reelquant.cli import app
from reelquant.models.condition import Condition
from reelquant.models.described import described
from reelquant.models.sampling import sample
from tests.tiny.conditioned import CASES, PROMPTLESS, made, picture, texts
from tests.tiny.stock import realigned

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # schedulers of diffusers
FEW = {"calibrate.prompts": 1, "search.prompts": 1}


def call_of(name: str, **others: Any) -> dict[str, Any]:
    return CASES[name].settings | CASES[name].conditions | others


@pytest.mark.parametrize("name", CASES)
def test_a_clip_is_the_same_in_every_batch(name: str) -> None:
    pipe = made(name)
    together = sample(pipe, texts(name, 3), seed=5, batch=3, **call_of(name))
    alone = torch.cat([sample(pipe, [text], seed=5 + i, **call_of(name)) for i, text in enumerate(texts(name, 3))])
    assert together.shape == alone.shape and (together - alone).abs().max() < 1e-4
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_quantized_like_any_other(name: str) -> None:
    pipe = made(name)
    report = reelquant.quantize(pipe, "minmax-w8a8", overrides=FEW, **call_of(name))
    assert report.latent_psnr is not None and report.latent_psnr > 25
    assert any(report.prompts) is (name not in PROMPTLESS) and len(report.prompts) == 1


@pytest.mark.parametrize(
    ("name", "argument", "others"),
    [
        ("svd", "image", [picture(200), picture(20)]),
        ("ltx_i2v", "image", [picture(200), picture(20)]),
        ("wan_i2v", "image", torch.stack([torch.full((3, 32, 32), 0.5), torch.linspace(0, 1, 3 * 32 * 32).reshape(3, 32, 32)])),
        ("dit", "class_labels", [3, 700]),
    ],
)
def test_a_list_gives_one_per_clip_and_starts_again(name: str, argument: str, others: Any) -> None:
    pipe = made(name)
    clips = sample(pipe, texts(name, 1) * 3, seeds=[5, 5, 5], batch=2, **call_of(name, **{argument: others}))
    assert torch.allclose(clips[0], clips[2], atol=1e-4)
    assert not torch.allclose(clips[0], clips[1], atol=1e-3)
    second = sample(pipe, texts(name, 1), seed=5, first=1, **call_of(name, **{argument: others}))
    assert torch.allclose(second[0], clips[1], atol=1e-4)


def test_a_list_of_frames_is_one_clip_and_a_list_of_lists_one_per_clip() -> None:
    pipe, call = made("wan_vace"), call_of("wan_vace")
    frames = [[picture(red + i) for i in range(5)] for red in (30, 200)]
    one = sample(pipe, ["a ball"] * 2, seeds=[5, 5], video=frames[0], **call)
    assert torch.equal(one[0], one[1])
    two = sample(pipe, ["a ball"] * 2, seeds=[5, 5], video=frames, **call)
    assert torch.equal(two[0], one[0]) and not torch.equal(two[0], two[1])


MISSING = {
    "svd": "StableVideoDiffusionPipeline needs 'image' for every clip and got none; pass image=..., a PIL image",
    "wan_i2v": "WanImageToVideoPipeline needs 'image'",
    "ltx_i2v": "LTXImageToVideoPipeline got no 'image' and failed .*; pass image=..., a PIL image",
    "cogvideox_v2v": "CogVideoXVideoToVideoPipeline got no 'video' and failed .*; pass video=..., a list of PIL images",
    "i2vgen": "I2VGenXLPipeline got no 'image' and failed .*; pass image=..., a PIL image",
    "dit": "DiTPipeline needs 'class_labels' for every clip and got none; pass class_labels=..., the number of a class",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_condition_is_named(name: str) -> None:
    with pytest.raises(CalibrationError, match=f"^{MISSING[name]}"):
        sample(made(name), texts(name, 1), **CASES[name].settings)


@pytest.mark.parametrize("name", ["svd", "i2vgen", "ltx_i2v", "cogvideox_v2v", "animatediff_controlnet"])
def test_what_a_pipeline_needs_comes_with_the_library(name: str) -> None:
    (argument,) = CASES[name].conditions
    report = reelquant.quantize(made(name), "minmax-w8a8", overrides=FEW, **CASES[name].settings)
    assert report.latent_psnr is not None and report.latent_psnr > 25
    assert [text for text in report.warnings if f"was given no {argument}, so those that come with reelquant were taken" in text]
    assert report.conditions["every"].keys() == {argument}


def test_what_was_given_is_not_replaced() -> None:
    report = reelquant.quantize(made("svd"), "minmax-w8a8", overrides=FEW, **call_of("svd"))
    assert report.conditions == {"every": {"image": described(picture())}}
    assert not [text for text in report.warnings if "was given no" in text]


def test_what_works_without_conditions_gets_none() -> None:
    report = reelquant.quantize(made("wan_vace"), "minmax-w8a8", overrides=FEW, **CASES["wan_vace"].settings)
    assert report.conditions == {} and report.warnings == []


def test_what_does_not_come_with_the_library_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"^DiTPipeline needs 'class_labels'"):
        reelquant.quantize(made("dit"), "minmax-w8a8", overrides=FEW, **CASES["dit"].settings)


@pytest.fixture(scope="module")
def spoken() -> tuple[Any, dict[str, Any]]:
    """A pipeline whose text encoder was dropped, and embeddings of two texts."""
    pipe = made("wan_vace")
    both = pipe.encode_prompt(["a red ball", "a blue box"], negative_prompt=["", ""], max_sequence_length=8)
    pipe.text_encoder = None
    return pipe, dict(zip(("prompt_embeds", "negative_prompt_embeds"), both, strict=True))


def test_embeddings_stand_in_the_place_of_prompts(spoken: tuple[Any, dict[str, Any]]) -> None:
    pipe, embeds = spoken
    said = sample(made("wan_vace"), ["a red ball", "a blue box"], seed=5, **call_of("wan_vace"))
    given = sample(pipe, ["", ""], seed=5, **call_of("wan_vace"), **embeds)
    assert torch.allclose(said, given, atol=1e-5) and not torch.allclose(given[0], given[1], atol=1e-3)


def test_a_pipeline_without_its_text_encoder_is_quantized_and_evaluated(spoken: tuple[Any, dict[str, Any]]) -> None:
    pipe, embeds = spoken
    for missing in ({}, {"prompt_embeds": embeds["prompt_embeds"]}):
        with pytest.raises(CalibrationError, match=r"has no text encoder and failed .*; pass .*negative_prompt_embeds=..., a tensor"):
            sample(pipe, ["a red ball"], **call_of("wan_vace", **missing))
    float_ = copy.deepcopy(pipe)
    report = reelquant.quantize(pipe, "minmax-w8a8", overrides=FEW, **call_of("wan_vace"), **embeds)
    assert report.latent_psnr is not None and report.latent_psnr > 25 and report.prompts == [""]
    assert report.conditions["every"]["prompt_embeds"].startswith("float32 [2, 8, 16], sha256 ")
    found = reelquant.evaluate(pipe, float_, clips=2, metrics="psnr", floor=["none"], **call_of("wan_vace"), **embeds)
    assert found["psnr"] > 25 and found.data["prompts"] == []


def test_what_is_not_missing_is_not_blamed() -> None:
    with pytest.raises(CalibrationError, match=r"^WanVACEPipeline refuses the call: .*divisible by 4"):
        sample(made("wan_vace"), ["a ball"], **call_of("wan_vace", height=33))
    with pytest.raises(CalibrationError, match=r"^image is empty; give a PIL image"):
        sample(made("svd"), [""], **call_of("svd", image=[]))


def test_texts_that_would_be_dropped_are_refused() -> None:
    words = r"^DiTPipeline takes no prompt, got 'a red ball'; give no prompts, but class_labels=..., the number of a class$"
    pipe = made("dit")
    with pytest.raises(UnsupportedError, match=words):
        reelquant.quantize(pipe, "minmax-w8a8", ["a red ball"], overrides=FEW, **call_of("dit"))
    with pytest.raises(UnsupportedError, match=words):
        reelquant.evaluate(pipe, pipe, ["a red ball"], **call_of("dit"))
    with pytest.raises(UnsupportedError, match=words):
        sample(pipe, ["a red ball"], **call_of("dit"))
    with pytest.raises(RecipeError, match=r"^grain_steps: .* DiTPipeline takes no prompt"):
        reelquant.evaluate(pipe, pipe, clips=1, grain_steps=[2], **call_of("dit"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Stable Video Diffusion in float, and quantized."""
    folder = tmp_path_factory.mktemp("svd")
    pipe = made("svd")
    pipe.save_pretrained(folder / "float")
    report = reelquant.quantize(pipe, "w8a16")
    return reelquant.save(pipe, folder / "quantized", report), folder / "float"


def test_an_evaluation_keeps_a_digest_of_its_pictures_and_goes_on(folders: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"clips": 1, "metrics": "psnr", "floor": ["none"], "output": tmp_path / "proof"}
    found = reelquant.evaluate(*folders, **options, **call_of("svd"))
    assert found["psnr"] > 30
    kept = json.loads((tmp_path / "proof" / "run.json").read_text())
    assert re.fullmatch(r"picture 32x32 RGB, sha256 [0-9a-f]{16}", kept["call"]["image"])
    assert kept["prompts"] == [""] and found.data["prompts"] == []
    assert kept["call"]["image"] in (tmp_path / "proof" / "report.html").read_text()
    clip = tmp_path / "proof" / "clips" / "test" / "0000.mp4"
    before = clip.stat().st_mtime_ns
    again = reelquant.evaluate(*folders, **options | {"clips": 2}, resume=True, **call_of("svd", image=picture()))
    assert again.data["seeds"] == [50_000, 50_001] and clip.stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match="call was"):
        reelquant.evaluate(*folders, **options, resume=True, **call_of("svd", image=picture(20)))


def test_an_evaluation_with_conditions_does_not_go_on_without(tmp_path: Path) -> None:
    pipe = made("wan_vace")
    options = {"metrics": "psnr", "floor": ["none"], "output": tmp_path / "proof", **CASES["wan_vace"].settings}
    unlike = [Condition("a ball", inputs={"negative": text}) for text in ("a box", "a red box")]
    reelquant.evaluate(pipe, pipe, unlike[:1], clips=1, **options)
    assert len(reelquant.evaluate(pipe, pipe, unlike, clips=2, resume=True, **options).data["conditions"]) == 2
    with pytest.raises(CheckpointError, match=r"conditions was .*, is null"):
        reelquant.evaluate(pipe, pipe, ["a ball"], clips=2, resume=True, **options)


def test_a_folder_without_its_condition_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    made("dit").save_pretrained(tmp_path / "float")
    folders = (tmp_path / "float", tmp_path / "float")
    with pytest.raises(CalibrationError, match="needs 'class_labels'"):
        reelquant.evaluate(*folders, clips=1, output=tmp_path / "proof", **CASES["dit"].settings)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("given", ["in the call", "in a file", "bundled"])
def test_from_disk_to_disk(given: str, tmp_path: Path) -> None:
    made("wan_i2v").save_pretrained(tmp_path / "float")
    pipe = reelquant.open_pipeline(tmp_path / "float")
    for part in (pipe.text_encoder, pipe.image_encoder, pipe.vae, pipe.transformer):
        realigned(part)
    call = {"in the call": call_of("wan_i2v"), "in a file": CASES["wan_i2v"].settings, "bundled": CASES["wan_i2v"].settings}[given]
    prompts = [Condition("a ball", inputs={"first_frame": picture(red)}) for red in (10, 90, 200)] if given == "in a file" else None
    report = reelquant.quantize(pipe, "minmax-w8a8", prompts, overrides=FEW, **call)
    reelquant.save(pipe, tmp_path / "memory", report)
    job = {"overrides": FEW, "max_memory": "64GB"}
    same = reelquant.quantize_folder(tmp_path / "float", tmp_path / "disk", "minmax-w8a8", prompts, **job, **call)
    assert same.conditions == report.conditions != {} and same.warnings == report.warnings
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "disk" / weights).read_bytes() == (tmp_path / "memory" / weights).read_bytes()


def test_interrupted_work_goes_on_only_with_the_same_pictures(tmp_path: Path) -> None:
    made("svd").save_pretrained(tmp_path / "float")

    def prompts_of(red: int) -> Any:
        picture(red).save(tmp_path / "a.png")
        prompts = reelquant.read_conditions(tmp_path / "a.png")
        given = dict(components=None, skip=(), overrides=FEW, lora=(), dtype=None, device="cpu", max_memory="64GB", call={})
        return folder_job(tmp_path / "float", "minmax-w8a8", prompts, **given).identity()["prompts"]

    assert prompts_of(10) == prompts_of(10) != prompts_of(11)


def test_from_disk_without_its_condition_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    made("dit").save_pretrained(tmp_path / "float")
    with pytest.raises(CalibrationError, match="needs 'class_labels'"):
        reelquant.quantize_folder(tmp_path / "float", tmp_path / "none", "minmax-w8a8", overrides=FEW, **CASES["dit"].settings)
    assert [one.name for one in tmp_path.iterdir()] == ["float"]


def test_generate_needs_no_prompt_where_the_pipeline_takes_none(tmp_path: Path) -> None:
    made("ddpm").save_pretrained(tmp_path / "float")
    options = ["--steps", "2", "--output", str(tmp_path / "out.png")]
    done = CliRunner().invoke(app, ["generate", str(tmp_path / "float"), "-p", "", *options])
    assert done.exit_code == 0 and [one.suffix for one in tmp_path.glob("out*")] == [".png"], done.output
    refused = CliRunner().invoke(app, ["generate", "tiny-dit", "-p", " ", "--steps", "2", "--output", str(tmp_path / "none.gif")])
    assert refused.exit_code != 0 and not (tmp_path / "none.gif").exists()
