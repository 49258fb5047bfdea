"""A whole stock pipeline, quantized, saved and opened again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline, WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import reelquant
from reelquant import CheckpointError, UnsupportedError
from reelquant.models.manifest import MANIFEST
from reelquant.models.sampling import NOTES_FILE
from reelquant.nn import quantized_layers
from tests.tiny.stock import CALL, MIXED, PROMPTS, Bare, frames, wan_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


def quantized() -> tuple[WanPipeline, Any]:
    pipe = wan_pipeline()
    return pipe, reelquant.quantize(pipe, MIXED, PROMPTS, **CALL)


@pytest.fixture(scope="module")
def pipe_and_report() -> tuple[WanPipeline, Any]:
    return quantized()


@pytest.fixture(scope="module")
def pipe(pipe_and_report: tuple[WanPipeline, Any]) -> WanPipeline:
    return pipe_and_report[0]


@pytest.fixture(scope="module")
def folder(pipe_and_report: tuple[WanPipeline, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reelquant.save(pipe_and_report[0], tmp_path_factory.mktemp("saved") / "out", pipe_and_report[1])


@pytest.fixture(scope="module")
def clips(pipe: WanPipeline) -> Tensor:
    return frames(pipe)


def digests(folder: Path) -> dict[str, str]:
    """Hash of every file but the report, which holds timings."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "report.json")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_load_gives_the_same_frames(folder: Path, clips: Tensor) -> None:
    assert torch.equal(frames(reelquant.load(folder)), clips)


def test_stock_from_pretrained_gives_the_same_frames(folder: Path, clips: Tensor) -> None:
    assert torch.equal(frames(DiffusionPipeline.from_pretrained(folder)), clips)


def test_a_fresh_process_needs_only_to_import_reelquant(folder: Path, clips: Tensor, tmp_path: Path) -> None:
    code = f"""
import sys, reelquant
assert reelquant.ReelQuantConfig.__name__ == "ReelQuantConfig"
assert not {{"torch", "diffusers", "transformers", "pydantic"}} & set(sys.modules)  # importing is light
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as one
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as other
assert one["reelquant"] is other["reelquant"] is reelquant.ReelQuantConfig
import torch
torch.set_num_threads({torch.get_num_threads()})
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(folder)!r})
from tests.tiny.stock import frames
torch.save(frames(pipe), {str(tmp_path / "clips.pt")!r})
"""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error::UserWarning:reelquant", "-c", code]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": paths}, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "clips.pt"), clips)


def test_the_report_lies_beside_the_weights(folder: Path, pipe_and_report: tuple[WanPipeline, Any]) -> None:
    assert json.loads((folder / "report.json").read_text())["digest"] == pipe_and_report[1].digest


def test_the_same_seed_and_recipe_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    pipe, report = quantized()
    again = reelquant.save(pipe, tmp_path / "again", report)
    assert digests(again) == digests(folder)


def test_what_was_loaded_saves_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = reelquant.save(reelquant.load(folder), tmp_path / "elsewhere" / "again")
    tokenizer = "tokenizer/tokenizer_config.json"  # transformers notes there that it came from a folder
    others = {tokenizer: "", MANIFEST: ""}
    assert digests(again) | others == digests(folder) | others


def test_stock_save_pretrained_writes_the_same_weights(pipe: WanPipeline, folder: Path, tmp_path: Path, clips: Tensor) -> None:
    pipe.save_pretrained(tmp_path / "stock")
    assert digests(tmp_path / "stock")[f"transformer/{WEIGHTS}"] == digests(folder)[f"transformer/{WEIGHTS}"]
    assert torch.equal(frames(reelquant.load(tmp_path / "stock")), clips)


def test_shards(pipe: WanPipeline, tmp_path: Path, clips: Tensor) -> None:
    out = reelquant.save(pipe, tmp_path / "out", max_shard_size="5KB")
    assert len(list((out / "transformer").glob("*.safetensors"))) > 2
    assert torch.equal(frames(reelquant.load(out)), clips)


def test_float_parts_can_be_stored_in_half_precision(pipe: WanPipeline, tmp_path: Path) -> None:
    out = reelquant.save(pipe, tmp_path / "out", dtype=torch.bfloat16)
    stored = load_file(out / "transformer" / WEIGHTS)
    float_weights = {"blocks.0.attn1.to_q.bias", "proj_out.weight", "blocks.0.attn1.norm_q.weight"}
    assert {stored[name].dtype for name in float_weights} == {torch.bfloat16}
    assert stored["blocks.0.norm2.weight"].dtype == torch.float32  # the class keeps it
    before = pipe.transformer.state_dict()
    for name in quantized_layers(pipe.transformer):
        for tensor in ("weight", "weight_scale", "input_scale"):
            if (key := f"{name}.{tensor}") in stored:
                assert torch.equal(stored[key], before[key])
                assert stored[key].dtype == before[key].dtype
    assert {value.dtype for value in load_file(out / "vae" / WEIGHTS).values()} == {torch.bfloat16}
    assert pipe.transformer.proj_out.weight.dtype == torch.float32
    assert frames(reelquant.load(out, dtype=torch.bfloat16)).isfinite().all()


def test_a_float_pipeline_is_saved_as_it_is(tmp_path: Path) -> None:
    pipe = wan_pipeline()
    out = reelquant.save(pipe, tmp_path / "out")
    assert "quantization_config" not in json.loads((out / "transformer" / "config.json").read_text())
    assert torch.equal(frames(reelquant.load(out)), frames(pipe))


def test_notes_travel_and_paths_do_not(tmp_path: Path) -> None:
    source = reelquant.save(wan_pipeline(), tmp_path / "source")
    (source / NOTES_FILE).write_text('{"call": {"num_inference_steps": 2}}')
    out = reelquant.save(reelquant.load(source), tmp_path / "out")
    assert (out / NOTES_FILE).read_text() == (source / NOTES_FILE).read_text()
    assert not any(str(tmp_path) in file.read_text() for file in out.rglob("*.json"))


def test_a_pipeline_can_be_saved_onto_the_folder_it_came_from(pipe: WanPipeline, tmp_path: Path, clips: Tensor) -> None:
    out = reelquant.save(pipe, tmp_path / "out")
    loaded = reelquant.load(out)
    reelquant.save(loaded, out, force=True)
    assert torch.equal(frames(loaded), clips)
    assert torch.equal(frames(reelquant.load(out)), clips)


def test_others_may_read_what_the_owner_may(folder: Path) -> None:
    assert {file.stat().st_mode for file in folder.rglob("*.safetensors")} == {(folder / "model_index.json").stat().st_mode}


# ---------------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), safetensors.SafetensorError("IoError")])
@pytest.mark.parametrize("call", [1, 2])
def test_nothing_is_left_when_writing_stops(
    pipe: WanPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, call: int
) -> None:
    calls, original = [], safetensors.torch.save_file

    def stops(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == call:
            raise error
        original(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", stops)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError):
        reelquant.save(pipe, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_before_anything_is_written(pipe: WanPipeline, folder: Path) -> None:
    before = digests(folder)
    with pytest.raises(CheckpointError, match="already exists"):
        reelquant.save(pipe, folder)
    assert digests(folder) == before


@pytest.mark.parametrize("target", ["to_q", "proj_out"])  # quantized, float
def test_adapters_must_be_unloaded_first(target: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe, _ = quantized()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=[target]))
    with pytest.raises(UnsupportedError, match="wrapped by an adapter"):
        reelquant.save(pipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnsupportedError, match="unload_lora_weights"):
        pipe.transformer.save_pretrained(tmp_path / "stock")


def test_what_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="Bare has no save_pretrained"):
        reelquant.save(Bare(wan_pipeline().transformer), tmp_path / "out")


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def truncate(folder: Path) -> None:
    file = folder / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def scramble(folder: Path) -> None:
    file = folder / "vae" / WEIGHTS
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def pickle_in(folder: Path) -> None:
    (folder / "transformer" / WEIGHTS).unlink()
    torch.save({}, folder / "transformer" / "diffusion_pytorch_model.bin")


def poison(folder: Path) -> None:
    file = folder / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors["blocks.0.attn1.to_q.input_scale"][0] = torch.nan
    save_file(tensors, folder / "fresh")
    (folder / "fresh").replace(file)


def break_json(folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (truncate, f"{WEIGHTS}' is truncated or corrupt"),
        (scramble, f"vae/{WEIGHTS}' is truncated or corrupt"),
        (pickle_in, "is a pickle file and is refused"),
        (poison, r"^'blocks\.0\.attn1\.to_q\.input_scale' holds NaN or inf"),
        (break_json, "config.json. is not JSON"),
        (lambda folder: (folder / "transformer" / WEIGHTS).unlink(), "cannot open pipeline"),
        (lambda folder: (folder / "model_index.json").unlink(), "no model_index.json"),
    ],
)  # fmt: skip
def test_broken_folders_are_one_clear_error(folder: Path, tmp_path: Path, break_it: Any, message: str) -> None:
    broken = copied(folder, tmp_path / "broken")
    (broken / MANIFEST).unlink()  # as another program writes folders
    break_it(broken)
    with pytest.raises(CheckpointError, match=message):
        reelquant.load(broken)


def test_folded_layers_are_opened_with_their_outputs_and_never_stand_for_weights(tmp_path: Path) -> None:
    size, made = {}, {}
    for word in ("table", "fold"):
        pipe = wan_pipeline()
        report = reelquant.quantize(pipe, MIXED | {"temporal": word}, PROMPTS, **CALL)
        folder = reelquant.save(pipe, tmp_path / word, report)
        reelquant.verify(folder)
        size[word] = (folder / "transformer" / WEIGHTS).stat().st_size
        made[word] = DiffusionPipeline.from_pretrained(folder)
    assert torch.equal(frames(made["fold"]), frames(made["table"])) and size["fold"] < size["table"]
    with pytest.raises(UnsupportedError, match="stores its outputs alone"):
        made["fold"].transformer.dequantize()
    reelquant.configure(made["fold"], temporal_table=False)
    with pytest.raises(UnsupportedError, match="tables turned off"):
        frames(made["fold"])
