"""What an evaluation names beside quantization: another scheduler, VAE, text encoder or adapter, and pairs that say nothing."""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import reelquant
from reelquant import CalibrationError, CheckpointError, UnsupportedError
from reelquant.evidence import causes
from reelquant.evidence.causes import differences, refuse_pair
from tests.tiny.stock import stored_pipeline

NAME = "tiny-dit"


@functools.cache
def quantized() -> Path:
    pipe = reelquant.open_pipeline(NAME)
    report = reelquant.quantize(pipe, "w8a16")
    report.adapters = {"style.safetensors": 1.0}
    folder = Path(tempfile.mkdtemp(prefix="reelquant-"))
    reelquant.save(pipe, folder / "with", report, dtype=torch.bfloat16)
    return reelquant.save(pipe, folder / "q", dtype=torch.bfloat16)


def changed(pipe: Any, part: str, tensor: str) -> None:
    pipe.components[part].get_parameter(tensor).data.view(-1)[-1] += 1


def adapted(pipe: Any) -> None:
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "settings": (
        lambda pipe: setattr(pipe, "scheduler", FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=7.0)),
        "'scheduler' of the test has other settings than that of the reference (shift is 1.0, not 7.0): figures show that, too",
    ),
    "scheduler": (
        lambda pipe: setattr(pipe, "scheduler", UniPCMultistepScheduler()),
        "'scheduler' of the test is of type FlowMatchEulerDiscreteScheduler, that of the reference of type UniPCMultistepScheduler: "
        "figures show that, too",
    ),
    "vae": (
        lambda pipe: changed(pipe, "vae", "encoder.conv_in.weight"),
        "'vae' of the test has other float weights than that of the reference ('encoder.conv_in.weight'): figures show that, too",
    ),
    "denoiser": (
        lambda pipe: changed(pipe, "transformer", "patch_embedding.weight"),
        "'transformer' of the test has other float weights than that of the reference ('patch_embedding.weight'): figures show that, too",
    ),
    "adapter": (adapted, "adapter 'style' is loaded into the reference: figures show that, too, unless the other one has it"),
}


@pytest.mark.parametrize("stored", [False, True])
def test_another_vocabulary_is_named(stored: bool, tmp_path: Path) -> None:
    pipe = reelquant.open_pipeline(NAME)
    backend = json.loads(pipe.tokenizer.backend_tokenizer.to_str())
    words = backend["model"]["vocab"]
    one, other = list(words)[-2:]
    words[one], words[other] = words[other], words[one]
    pipe.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    if stored:
        pipe.save_pretrained(tmp_path / "other")
    found = differences(tmp_path / "other" if stored else pipe, quantized())
    assert found == ["'tokenizer' of the test has another vocabulary than that of the reference: figures show that, too"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_is_named(change: str) -> None:
    pipe = reelquant.open_pipeline(NAME)
    before, sentence = CHANGES[change]
    before(pipe)
    assert sentence in differences(pipe, quantized())


@pytest.mark.parametrize("slab", [1000, 10**9])
def test_the_last_number_of_a_stored_tensor_counts(slab: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text encoder that was trained further, say."""
    monkeypatch.setattr(causes, "SLAB", slab)
    pipe = reelquant.open_pipeline(NAME)
    pipe.save_pretrained(tmp_path / "same")
    assert differences(tmp_path / "same", quantized()) == []
    tensor = list(pipe.text_encoder.state_dict())[-1]
    changed(pipe, "text_encoder", tensor)
    pipe.save_pretrained(tmp_path / "other")
    (sentence,) = differences(tmp_path / "other", quantized())
    assert sentence.startswith("'text_encoder' of the test has other float weights") and tensor in sentence


def test_quantization_alone_is_no_difference() -> None:
    assert differences(NAME, quantized()) == []
    assert differences(reelquant.open_pipeline(NAME), reelquant.load(quantized())) == []


def test_adapters_that_were_merged_are_named() -> None:
    (sentence,) = differences(NAME, quantized().with_name("with"))
    assert sentence.startswith("adapter 'style.safetensors' was merged into the test")


def test_pairs_that_say_nothing_are_named() -> None:
    assert differences(NAME, NAME) == ["test and reference are the very same pipeline: the figures say nothing about quantization"]
    assert "nothing in the pipeline under test is quantized" in differences(quantized(), NAME)
    assert "'transformer' of the reference is quantized itself: give the float original" in differences(quantized(), NAME)


@pytest.mark.parametrize(
    ("reference", "test", "says"),
    [
        (NAME, lambda: NAME, "'tiny-dit' holds no quantized layer; give a folder that reelquant quantize wrote"),
        ("QUANTIZED", quantized, "is both the pipeline under test and its reference"),
        ("tiny-unet", quantized, "is of type WanPipeline and its reference 'tiny-unet' of type AnimateDiffPipeline"),
        (stored_pipeline, quantized, "is another model than that of its reference"),
        (stored_pipeline, lambda: reelquant.load(quantized()), "of 'WanPipeline' is another model than that of its reference"),
    ],
    ids=["float", "same", "another pipeline", "another size", "another size in memory"],
)
def test_pairs_of_which_a_comparison_says_nothing_are_refused(reference: Any, test: Callable[[], Any], says: str, tmp_path: Path) -> None:
    given = quantized() if reference == "QUANTIZED" else reference if isinstance(reference, str) else reference(tmp_path / "wan")
    with pytest.raises(UnsupportedError, match=re.escape(says)):
        refuse_pair(given, test())


def test_pairs_of_float_and_quantized_are_taken() -> None:
    pipe = reelquant.open_pipeline(NAME)
    refuse_pair(NAME, quantized())
    refuse_pair(pipe, quantized())
    refuse_pair(NAME, reelquant.load(quantized()))
    refuse_pair(pipe, pipe)  # in memory it may be changed in ways that nobody sees


def test_damage_under_test_is_found_before_anything_is_sampled(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized(), tmp_path / "q"))
    file = next((folder / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["encoder.conv_in.bias"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=file.name):
        refuse_pair(NAME, folder)
    reelquant.verify(folder, renew=True)
    with pytest.raises(CalibrationError, match=r"bias of layer 'encoder.conv_in' of 'vae' holds NaN"):
        refuse_pair(NAME, folder)


def test_an_evaluation_carries_the_sentence() -> None:
    call: dict[str, Any] = dict(num_inference_steps=1, num_frames=5, metrics=["psnr"], floor=["none"])
    pipe = reelquant.open_pipeline(NAME)
    found = reelquant.evaluate(pipe, pipe, ["a red circle"], clips=1, **call)
    assert "the very same pipeline" in found.data["warnings"][0]
