"""What quantization left alone is written as it was stored, and reports compare the folder with the one it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import reelquant
from reelquant.cli import app
from tests.tiny.stock import stored_pipeline, wan_pipeline


def half() -> Any:
    """As most pipelines are downloaded: a text encoder in float16, a VAE in bfloat16, the denoiser in float32."""
    pipe = wan_pipeline()
    pipe.text_encoder.half()
    pipe.vae.bfloat16()
    return pipe


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_pipeline(tmp_path_factory.mktemp("half") / "wan", half())


def tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    found = {}
    for file in (folder / part).glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def weights(folder: Path) -> int:
    return sum(value.nbytes for part in ("text_encoder", "vae", "transformer") for value in tensors(folder, part).values())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(value.dtype == other[name].dtype and value.equal(other[name]) for name, value in one.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_components_are_written_as_they_were_stored(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    pipe = reelquant.open_pipeline(source, dtype=dtype)
    report = reelquant.quantize(pipe, "w8a16")
    out = reelquant.save(pipe, tmp_path / "out", report)
    for part in ("text_encoder", "vae"):
        assert same(tensors(out, part), tensors(source, part))
    assert json.loads((out / "text_encoder" / "config.json").read_text())["dtype"] == "float16"
    assert (report.bytes_source, report.bytes_folder) == (weights(source), weights(out))
    assert json.loads((out / "report.json").read_text())["bytes_source"] == weights(source)
    assert reelquant.verify(out).layers and reelquant.load(out).vae.dtype == torch.float32
    assert pipe.vae.dtype == dtype  # the pipeline in memory is as it was


def test_what_was_changed_keeps_its_values(source: Path, tmp_path: Path) -> None:
    pipe = reelquant.open_pipeline(source)
    with torch.no_grad():
        pipe.vae.encoder.conv_in.bias.add_(1e-6)  # float32 holds it, bfloat16 would not
    reelquant.quantize(pipe, "w8a16")
    out = reelquant.save(pipe, tmp_path / "out")
    written = tensors(out, "vae")
    assert {value.dtype for value in written.values()} == {torch.float32}
    assert written["encoder.conv_in.bias"].equal(pipe.vae.encoder.conv_in.bias)
    assert same(tensors(out, "text_encoder"), tensors(source, "text_encoder"))


def test_a_dtype_that_is_asked_for_is_written(source: Path, tmp_path: Path) -> None:
    pipe = reelquant.open_pipeline(source)
    reelquant.quantize(pipe, "w8a16")
    out = reelquant.save(pipe, tmp_path / "out", dtype=torch.float16)
    assert {value.dtype for value in tensors(out, "vae").values()} == {torch.float16}


def test_the_variant_that_was_opened_is_the_one_that_is_kept(tmp_path: Path) -> None:
    source = stored_pipeline(tmp_path / "wan")
    half().save_pretrained(source, variant="fp16")
    pipe = reelquant.open_pipeline(source, variant="fp16")
    report = reelquant.quantize(pipe, "w8a16")
    out = reelquant.save(pipe, tmp_path / "out", report)
    assert {value.dtype for value in tensors(out, "text_encoder").values()} == {torch.float16}
    small = list(source.rglob("*.fp16.safetensors"))
    assert len(small) == 3 and report.bytes_source == sum(value.nbytes for file in small for value in load_file(file).values())


def test_a_component_from_another_folder_is_written_as_it_is_stored_there(source: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    wan_pipeline().vae.half().save_pretrained(tmp_path / "vae")
    pipe = reelquant.open_pipeline(source)
    pipe.vae = AutoencoderKLWan.from_pretrained(tmp_path / "vae", torch_dtype=torch.float32)
    reelquant.quantize(pipe, "w8a16")
    assert {value.dtype for value in tensors(reelquant.save(pipe, tmp_path / "out"), "vae").values()} == {torch.float16}


def test_shards_are_rewritten_and_their_index_says_how_large_they_are(source: Path, tmp_path: Path) -> None:
    pipe = reelquant.open_pipeline(source)
    reelquant.quantize(pipe, "w8a16")
    out = reelquant.save(pipe, tmp_path / "out", max_shard_size="100KB")
    index = json.loads((out / "vae" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(list((out / "vae").glob("*.safetensors"))) > 1 and same(tensors(out, "vae"), tensors(source, "vae"))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(out, "vae").values())


def test_a_pipeline_from_nowhere_is_written_as_it_is(tmp_path: Path) -> None:
    pipe = half()
    report = reelquant.quantize(pipe.to(torch.float32), "w8a16")
    out = reelquant.save(pipe, tmp_path / "out", report)
    assert {value.dtype for value in tensors(out, "vae").values()} == {torch.float32}
    assert (report.bytes_source, report.bytes_folder) == (None, weights(out))


@pytest.mark.parametrize("way", [[], ["--resume"]], ids=["in memory", "from disk to disk"])
def test_the_headline_is_of_folders(source: Path, tmp_path: Path, way: list[str]) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["quantize", str(source), "-r", "w8a16", "-o", str(out), *way])
    assert result.exit_code == 0, result.output
    rows = result.stdout.partition("w8a16 on")[2].splitlines()
    ratio = f"{weights(source) / weights(out):.2f}x smaller than the one it came from"
    assert rows[1].startswith("folder ") and ratio in rows[1]
    assert any(row.startswith("their bytes") and "x smaller than float32" in row for row in rows)


def test_a_folder_that_grew_says_so(tmp_path: Path) -> None:
    from reelquant.cli.tables import summary
    from reelquant.engine.report import Report

    report = Report("w8a16", "0", "Wan", "transformer", bytes_source=100, bytes_folder=150)
    assert "100 B -> 150 B of weights, 1.50x larger than the one it came from" in str(next(iter(summary(report).columns[1].cells)))
