"""Numbers that are not numbers, and folders that ask for more than they hold: refused in a sentence, before memory is spent."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import reelquant
from reelquant import CalibrationError, CheckpointError
from reelquant.evidence.reading import read_pictures
from reelquant.models.sampling import sample
from tests.attack.damage import within
from tests.tiny.stock import CALL, PROMPTS, wan_pipeline

RECIPE = {
    "name": "test",
    "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": {"format": "uint8"}},
    "calibrate": {"prompts": 1, "steps": 2},
}


POISONED = {
    "vae": "decoder.conv_in.bias",
    "text_encoder": "encoder.block.0.layer.0.layer_norm.weight",
    "transformer": "blocks.1.attn1.norm_q.weight",
}


@pytest.mark.parametrize("component", POISONED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_quantized_is_looked_at_too(copy: Path, tmp_path: Path, component: str, value: float) -> None:
    name, file = POISONED[component], next((copy / component).glob("*.safetensors"))
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    layer, _, tensor = name.rpartition(".")
    words = f"the {tensor} of layer '{layer}' of '{component}' holds NaN or inf"
    with within(), pytest.raises(CalibrationError, match=words):
        reelquant.open_pipeline(copy)
    for recipe in ("w8a16", RECIPE):
        with within(), pytest.raises(CalibrationError, match=words):
            reelquant.quantize_folder(copy, tmp_path / "out", recipe, force=True)
        pipe = wan_pipeline()
        getattr(pipe, component).state_dict()[name].view(-1)[-1] = value
        with within(), pytest.raises(CalibrationError, match=words):
            reelquant.quantize(pipe, recipe, PROMPTS, **CALL)


@pytest.mark.parametrize(
    ("component", "change"),
    [
        ("transformer", {"num_layers": 10**6}),
        ("transformer", {"rope_max_seq_len": 10**9}),
        ("transformer", {"ffn_dim": 10**12}),
        ("text_encoder", {"num_layers": 10**7}),
        ("text_encoder", {"vocab_size": 10**10}),
        ("vae", {"base_dim": 10**10}),
    ],
)
def test_configs_that_lie_about_sizes(copy: Path, tmp_path: Path, component: str, change: dict[str, int]) -> None:
    file = copy / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for run in (lambda: reelquant.open_pipeline(copy), lambda: reelquant.quantize_folder(copy, tmp_path / "out", "w8a16")):
        with within(), pytest.raises(CheckpointError, match=f"says {next(iter(change))} ="):
            run()


@pytest.mark.parametrize(
    "call", [{"num_frames": 10**7}, {"height": 10**6}, {"num_inference_steps": 10**8}, {"guidance_scale": float("nan")}]
)
def test_calls_that_fit_no_memory(copy: Path, call: dict[str, Any]) -> None:
    (copy / "reelquant.json").write_text(json.dumps({"call": CALL | call}))
    pipe = reelquant.open_pipeline(copy)
    with within(), pytest.raises(CalibrationError, match=next(iter(call))):
        sample(pipe, ["a"])


def test_a_sparse_file_is_not_read(copy: Path) -> None:
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    size = 200 * 10**9
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + size)
    with within(), pytest.raises(CheckpointError, match="the disk holds"):
        reelquant.open_pipeline(copy)


def test_a_picture_of_400_megapixels_is_not_unpacked(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    (tmp_path / "a-000.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))
    with within(), pytest.raises(CheckpointError, match=r"a-000\.png"):
        read_pictures([tmp_path / "a-000.png"])


def test_masks_may_be_infinite() -> None:
    from reelquant.nn import check_tensors

    values = {"causal_mask": torch.tensor([0.0, float("-inf")]), "weight": torch.ones(2, dtype=torch.float8_e4m3fn)}
    check_tensors("text_encoder", values, values.__getitem__)
    with pytest.raises(CalibrationError):
        check_tensors("text_encoder", {"causal_mask"}, lambda name: torch.tensor([float("nan")]))


def test_a_tensor_outside_of_all_layers_is_named_without_one() -> None:
    from reelquant.nn import check_tensors

    with pytest.raises(CalibrationError, match=r"^the scale_shift_table of 'transformer' holds NaN or inf"):
        check_tensors("transformer", ["scale_shift_table"], lambda name: torch.tensor([float("nan")]))
