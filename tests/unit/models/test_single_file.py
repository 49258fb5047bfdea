"""Pipelines whose denoiser comes from one file, in the names of its original checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import reelquant
from reelquant import CheckpointError, UnsupportedError
from reelquant.checkpoint.export.names import naming_of
from reelquant.cli import app
from reelquant.models.manifest import CARD
from reelquant.models.single_file import SingleFile, open_file, single_file
from tests.tiny.configs import TINY, build
from tests.tiny.stock import stored_pipeline, wan_pipeline

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_pipeline(tmp_path_factory.mktemp("single") / "whole")


@pytest.fixture(scope="module")
def tensors(whole: Path) -> Tensors:
    return load_file(whole / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def rest(whole: Path) -> Path:
    """The same pipeline without the weights of its denoiser."""
    folder = whole.parent / "rest"
    shutil.copytree(whole, folder, ignore=lambda at, names: [one for one in names if at.endswith("/transformer") and "model" in one])
    assert [file.name for file in (folder / "transformer").iterdir()] == ["config.json"]
    return folder


@pytest.fixture(scope="module")
def file(tensors: Tensors, whole: Path) -> Path:
    """The denoiser as the authors of Wan would have stored it."""
    return written(whole.parent / "wan.safetensors", tensors)


def written(file: Path, tensors: Tensors, change: Callable[[Tensors], Tensors] = lambda original: original) -> Path:
    name = naming_of("WanTransformer3DModel")
    save_file(change({name(key): value.clone() for key, value in tensors.items()}), file)
    return file


def test_the_denoiser_is_that_of_the_file_and_everything_else_that_of_the_folder(
    file: Path, rest: Path, whole: Path, tensors: Tensors
) -> None:
    pipe = reelquant.open_pipeline(f"{file}@{rest}")
    found = pipe.transformer.state_dict()
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], value) for key, value in tensors.items())
    prefixed = written(rest.parent / "comfy.safetensors", tensors, lambda one: {f"model.diffusion_model.{key}": one[key] for key in one})
    assert torch.equal(reelquant.open_pipeline(f"{prefixed}@{rest}").transformer.proj_out.weight, tensors["proj_out.weight"])
    half, stock = (reelquant.open_pipeline(place, torch.bfloat16) for place in (f"transformer={file}@{rest}", whole))
    expected = stock.transformer.state_dict()
    for key, value in half.transformer.state_dict().items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key


def test_it_is_quantized_evaluated_and_remembered_by_the_command(file: Path, rest: Path, whole: Path, tmp_path: Path) -> None:
    out, place = tmp_path / "out", f"{file}@{rest}"
    made = CliRunner().invoke(app, ["quantize", place, "-r", "w8a16", "-o", str(out)])
    assert made.exit_code == 0, made.output
    expected = reelquant.open_pipeline(whole)
    reelquant.quantize(expected, "w8a16")
    found = reelquant.load(out).transformer.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in expected.transformer.state_dict().items())
    source = json.loads((out / "report.json").read_text())["source"]
    assert source == f"transformer={file}@{rest}"
    texts = [*out.glob("*/config.json"), out / CARD, out / "model_index.json"]
    assert not any(str(file.parent) in one.read_text() for one in texts)  # paths of this machine
    measured = reelquant.evaluate(out, clips=1, metrics="psnr", floor=["none"], num_inference_steps=1)
    assert measured["psnr"] > 40
    moved = file.rename(file.with_name("moved.safetensors"))
    try:
        with pytest.raises(CheckpointError, match="was quantized from is not at"):
            reelquant.evaluate(out, clips=1)
    finally:
        moved.rename(file)


def test_a_gguf_file_is_dequantized_exactly(whole: Path, rest: Path, tmp_path: Path) -> None:
    pipe = reelquant.open_pipeline(whole)
    pipe.register_modules(transformer=wide())
    float_ = stored_pipeline(tmp_path / "wide", pipe)
    out = reelquant.save(pipe, tmp_path / "out", reelquant.quantize(pipe, "w8a16"))
    reelquant.export(out, "gguf", tmp_path / "wan.gguf", type="Q8_0")
    read = reelquant.open_pipeline(f"{tmp_path / 'wan.gguf'}@{float_}").transformer
    for key, value in reelquant.load(out).transformer.dequantize().state_dict().items():
        scale = float(value.abs().max())
        assert torch.allclose(read.state_dict()[key], value, rtol=0, atol=scale / 127), key
    assert read.proj_out.weight.dtype == torch.float32


def wide() -> Any:
    """A Wan whose rows are blocks of GGUF."""
    return build(
        "WanTransformer3DModel", num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=64, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


def test_two_experts_may_come_from_two_files(tensors: Tensors, whole: Path, tmp_path: Path) -> None:
    pipe = wan_pipeline()
    pipe.register_modules(transformer_2=TINY["WanTransformer3DModel"]())
    pipe.register_to_config(boundary_ratio=0.5)
    folder = stored_pipeline(tmp_path / "experts", pipe)
    doubled = {key: 2 * value for key, value in tensors.items()}
    high, low = written(tmp_path / "high.safetensors", tensors), written(tmp_path / "low.safetensors", doubled)
    opened = reelquant.open_pipeline(f"transformer={high}@transformer_2={low}@{folder}")
    one, two = (part.state_dict()["proj_out.weight"] for part in (opened.transformer, opened.transformer_2))
    assert torch.equal(2 * one, two)
    with pytest.raises(UnsupportedError, match="has transformer, transformer_2; say which: COMPONENT=FILE@PIPELINE"):
        reelquant.open_pipeline(f"{high}@{folder}")
    with pytest.raises(UnsupportedError, match=r"has no denoiser 'vae' for '.*'; it has transformer, transformer_2"):
        reelquant.open_pipeline(f"vae={high}@{folder}")


def test_a_place_is_parsed_only_where_nothing_has_that_name(tmp_path: Path) -> None:
    assert single_file("a/b.safetensors@c@d/e") == SingleFile(Path("a/b.safetensors"), "c@d/e")
    assert single_file("x=a.gguf@y=b.gguf@owner/name") == SingleFile(Path("a.gguf"), "y=b.gguf@owner/name", "x")
    assert single_file("owner/name") is None and single_file("a.safetensors") is None
    (tmp_path / "a.gguf@b").mkdir()
    assert single_file(tmp_path / "a.gguf@b") is None


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "lacks a tensor": (
        lambda one: {key: value for key, value in one.items() if key != "head.head.weight"},
        "lacks 1 tensors, 'proj_out.weight' first",
    ),
    "has one too many": (lambda one: one | {"foo.bar": torch.zeros(2)}, r"have no place .*'foo\.bar' first"),
    "has another shape": (lambda one: one | {"head.head.weight": torch.zeros(3)}, r"proj_out\.weight expected shape .* got .*\[3\]"),
    "is another model": (lambda _: {"foo.bar": torch.zeros(2)}, r"foo\.bar|lacks \d+ tensors"),
    "is not finite": (lambda one: one | {"head.head.bias": torch.full_like(one["head.head.bias"], torch.nan)}, "NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(fault: str, tensors: Tensors, rest: Path, tmp_path: Path) -> None:
    change, words = FAULTS[fault]
    bad = written(tmp_path / "bad.safetensors", tensors, change)
    with pytest.raises(reelquant.ReelQuantError, match=words) as found:
        reelquant.open_pipeline(f"{bad}@{rest}")
    assert "bad.safetensors" in str(found.value) or fault == "is not finite"
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_a_damaged_file_is_said_to_be_damaged(suffix: str, file: Path, rest: Path, tmp_path: Path) -> None:
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cut\.\w+' is truncated or corrupt \("):
        reelquant.open_pipeline(f"{cut}@{rest}")


def test_what_is_missing_is_named_with_what_to_write(file: Path, rest: Path, tmp_path: Path) -> None:
    for command in (["quantize", str(file), "-r", "w8a16", "--dry-run"], ["inspect", str(file)]):
        made = CliRunner().invoke(app, command)
        assert made.exit_code and f"{file}@FOLDER" in "".join(made.output.split())
    with pytest.raises(CheckpointError, match=r"no file 'gone\.gguf' for the pipeline"):
        reelquant.open_pipeline(f"gone.gguf@{rest}")
    with pytest.raises(CheckpointError, match="no pipeline at '/nowhere'"):
        reelquant.open_pipeline(f"{file}@/nowhere")
    with pytest.raises(UnsupportedError, match=r"opened in memory only \(no --max-memory, no --resume\)"):
        reelquant.quantize_folder(f"{file}@{rest}", tmp_path / "out", "w8a16")
    quantized = reelquant.open_pipeline(f"{file}@{rest}")
    reelquant.quantize(quantized, "w8a16")
    reelquant.save(quantized, tmp_path / "quantized")
    with pytest.raises(UnsupportedError, match=r"'transformer' of '.*' is quantized; name a float pipeline"):
        reelquant.open_pipeline(f"{file}@{tmp_path / 'quantized'}")


@pytest.mark.parametrize("kind", ["LTXVideoTransformer3DModel", "HunyuanVideoTransformer3DModel", "MochiTransformer3DModel"])
def test_other_families_are_read_in_the_names_that_their_files_have(kind: str, tmp_path: Path) -> None:
    model = TINY[kind]()
    model.save_pretrained(tmp_path / "transformer")
    name, tensors = naming_of(kind), model.state_dict()  # those of diffusers where no table is known here
    save_file({name(key): value.clone() for key, value in tensors.items()}, tmp_path / "one.safetensors")
    index = {"_class_name": "Any", "transformer": ["diffusers", kind]}
    component, found = open_file(SingleFile(tmp_path / "one.safetensors", "any"), index, str(tmp_path), torch.float32)
    assert component == "transformer" and all(torch.equal(value, tensors[key]) for key, value in found.state_dict().items())


def test_a_class_without_single_files_is_refused() -> None:
    index = {"_class_name": "CogVideoXPipeline", "transformer": ["diffusers", "CogVideoXTransformer3DModel"], "vae": [None, None]}
    with pytest.raises(UnsupportedError, match="reads no single files of CogVideoXTransformer3DModel"):
        open_file(SingleFile(Path("cog.safetensors"), "cog"), index, "cog", torch.float32)
