"""How float weights are stored: in float8, cast layer by layer, as a variant, beside pickles. Memory, loading and disk agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForTextEncoding
from typer.testing import CliRunner

import reelquant
from reelquant import CheckpointError, ReelQuantConfig
from reelquant.cli import app
from reelquant.nn import quantized_layers
from tests.tiny.bundled import CALL, PROMPT, RECIPE, denoiser, latents, quiet

F8 = torch.float8_e4m3fn
PARTS = ("transformer", "text_encoder", "vae")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Written by stock diffusers, so it has no sums and tests may edit it."""
    reelquant.open_pipeline("tiny-dit").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def weights(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def narrowed(folder: Path, *parts: str) -> None:
    """As Wan and Flux are downloaded: matrices in float8, vectors in bfloat16."""
    for file in (weights(folder, part) for part in parts):
        tensors = load_file(file)
        save_file({name: value.to(F8 if value.ndim > 1 else torch.bfloat16) for name, value in tensors.items()}, file, {"format": "pt"})


def codes(model: Any) -> dict[str, Tensor]:
    return {name: layer.codes for name, layer in quantized_layers(model).items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return bool(one) and one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_float8_gives_the_same_codes_in_memory_while_loading_and_from_disk(folder: Path, tmp_path: Path) -> None:
    narrowed(folder, "transformer", "text_encoder")
    pipe = reelquant.open_pipeline(folder)
    reelquant.quantize(pipe, {"transformer": "w8a16", "text_encoder": "w8a16"})
    reelquant.quantize_folder(folder, tmp_path / "disk", "w8a16")
    for part, kind in (("transformer", AutoModel), ("text_encoder", AutoModelForTextEncoding)):
        config = ReelQuantConfig("w8a16")
        loaded = kind.from_pretrained(str(folder), subfolder=part, quantization_config=config, dtype=torch.bfloat16)
        assert F8 not in {value.dtype for value in loaded.state_dict().values()}, "a float part stayed narrow"
        assert equal(codes(loaded), codes(pipe.components[part]))
    assert equal(codes(reelquant.load(tmp_path / "disk").transformer), codes(pipe.transformer))


def test_a_nan_in_float8_is_found(folder: Path, tmp_path: Path) -> None:
    narrowed(folder, "transformer")
    file = weights(folder, "transformer")
    tensors = load_file(file)
    tensors["blocks.0.ffn.net.2.weight"].view(torch.uint8)[0, 0] = 0x7F
    save_file(tensors, file, {"format": "pt"})
    message = r"the weight of layer 'blocks\.0\.ffn\.net\.2' holds NaN"
    with pytest.raises(reelquant.CalibrationError, match=message):
        AutoModel.from_pretrained(str(folder), subfolder="transformer", quantization_config=ReelQuantConfig("w8a16"))
    with pytest.raises(reelquant.CalibrationError, match=message):
        reelquant.quantize_folder(folder, tmp_path / "disk", "w8a16")


@pytest.mark.parametrize("recipe", ["w8a16", RECIPE])
def test_a_model_that_casts_layer_by_layer_is_quantized_and_opens_again(recipe: Any, tmp_path: Path) -> None:
    pipe = reelquant.open_pipeline("tiny-dit", dtype=torch.bfloat16)
    denoiser(pipe).enable_layerwise_casting(storage_dtype=F8, compute_dtype=torch.bfloat16)
    report = reelquant.quantize(quiet(pipe), recipe, PROMPT, **(CALL if recipe is RECIPE else {}))
    assert recipe == "w8a16" or (report.latent_psnr or 0) > 30
    reelquant.save(pipe, tmp_path / "q")
    again = reelquant.load(tmp_path / "q", dtype=torch.bfloat16)
    assert F8 not in {value.dtype for value in again.transformer.state_dict().values()}
    assert equal(codes(again.transformer), codes(pipe.transformer))
    assert bool(latents(quiet(again)).isfinite().all())


def as_variant(folder: Path, *names: str) -> None:
    for part in PARTS:
        file = weights(folder, part)
        tensors = {key: value.half() for key, value in load_file(file).items()}
        for name in names:
            save_file(tensors, file.with_suffix(f".{name}.safetensors"), {"format": "pt"})
        file.unlink()


def test_a_folder_that_holds_one_variant_opens_and_is_quantized(folder: Path, tmp_path: Path) -> None:
    as_variant(folder, "fp16")
    pipe = reelquant.open_pipeline(folder)
    reelquant.quantize(pipe, "w8a16")
    reelquant.quantize_folder(folder, tmp_path / "disk", RECIPE | {"temporal": "quantize"}, PROMPT, **CALL)
    reelquant.quantize_folder(folder, tmp_path / "free", "w8a16")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "free")
    assert equal(codes(stock.transformer), codes(pipe.transformer))


def test_several_variants_are_one_sentence_and_one_of_them_can_be_chosen(folder: Path) -> None:
    as_variant(folder, "fp16", "ema")
    with pytest.raises(CheckpointError, match=r"variants 'ema', 'fp16' only, .*open_pipeline\(folder, variant='ema'\)"):
        reelquant.open_pipeline(folder)
    assert reelquant.open_pipeline(folder, variant="ema").transformer is not None


def test_the_command_line_takes_the_name_of_a_variant(folder: Path, tmp_path: Path) -> None:
    as_variant(folder, "fp16", "ema")
    words = ["quantize", str(folder), "-r", "w8a16", "-o", str(tmp_path / "out")]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 1 and "--variant ema" in said.stderr
    assert CliRunner().invoke(app, [*words, "--variant", "fp16"]).exit_code == 0
    assert CliRunner().invoke(app, ["inspect", str(folder), "--no-run", "--variant", "ema"]).exit_code == 0
    assert reelquant.verify(tmp_path / "out").layers
    said = CliRunner().invoke(app, [*words, "--force", "--variant", "fp16", "--resume"])
    assert said.exit_code == 1 and "--variant needs the model in memory" in said.stderr


def test_the_float_side_of_an_evaluation_and_of_a_benchmark_may_be_a_variant(folder: Path, tmp_path: Path) -> None:
    as_variant(folder, "fp16", "ema")
    pipe = reelquant.open_pipeline(folder, variant="ema")
    reelquant.quantize(pipe, "w8a16")
    reelquant.save(pipe, tmp_path / "out")
    with pytest.raises(CheckpointError, match="--variant ema of the command"):
        reelquant.evaluate(tmp_path / "out", folder, PROMPT, clips=1, metrics="psnr", floor=["none"], **CALL)
    size = ["--variant", "ema", "--frames", "5", "--height", "32", "--width", "32", "--steps", "2"]
    words = [str(tmp_path / "out"), "--reference", str(folder), *size]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a ball\n")
    evaluated = ["evaluate", *words, "-m", "psnr", "--floor", "bf16", "--prompts", str(prompts), "-o", str(tmp_path / "proof")]
    said = CliRunner().invoke(app, evaluated)
    assert said.exit_code == 0, said.stderr
    said = CliRunner().invoke(app, ["benchmark", *words, "--rounds", "1", "--json", "--no-memory"])
    assert said.exit_code == 0 and json.loads(said.stdout)["seconds"], said.stderr


def test_a_hub_id_with_a_variant_only(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache, as it is without a network."""
    as_variant(folder, "fp16")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(folder, home / "snapshots" / "abc")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    with pytest.raises(CheckpointError, match=r"name it: variant='fp16' \(--variant fp16\)"):
        reelquant.open_pipeline("owner/name")
    assert reelquant.open_pipeline("owner/name", variant="fp16").transformer is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: narrowed(folder, "transformer"), "bytes, .* were written"),
        (lambda folder: as_variant(folder, "fp16"), "cannot be read"),
        (lambda folder: (folder / "vae" / "old.bin").write_bytes(b"x"), "was added"),
    ],
    ids=["narrowed", "variant", "added"],
)
def test_a_float_folder_of_ours_that_was_changed_on_purpose_says_how_to_go_on(change: Any, words: str, tmp_path: Path) -> None:
    ours = reelquant.save(reelquant.open_pipeline("tiny-dit"), tmp_path / "ours")
    change(ours)
    with pytest.raises(CheckpointError, match=f"{words}.*; if you changed it on purpose, `reelquant verify FOLDER --renew`"):
        reelquant.open_pipeline(ours)
    assert reelquant.verify(ours, renew=True).renewed
    reelquant.open_pipeline(ours)
    reelquant.quantize_folder(ours, tmp_path / "out", "w8a16")


def test_pickles_and_broken_files_that_are_not_loaded_do_not_matter(folder: Path, tmp_path: Path) -> None:
    for name in ("optimizer.bin", "transformer/diffusion_pytorch_model.bin", "all.ckpt", "vae/old.pt"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"cut")
    reelquant.open_pipeline(folder)
    reelquant.quantize_folder(folder, tmp_path / "out", "w8a16")
    assert not [file for file in (tmp_path / "out").rglob("*") if file.suffix in (".bin", ".ckpt", ".pt")]
    weights(folder, "vae").unlink()
    with pytest.raises(CheckpointError, match=r"vae/old\.pt' is a pickle file and is refused"):
        reelquant.open_pipeline(folder)
