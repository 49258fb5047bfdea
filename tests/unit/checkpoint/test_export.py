"""Artifacts in the formats of other projects, read back by them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import gguf
import pytest
import torch
import torch.nn.functional as F
from diffusers import GGUFQuantizationConfig, WanTransformer3DModel
from diffusers.loaders import single_file_utils
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import reelquant
from reelquant import CheckpointError, UnsupportedError
from reelquant.checkpoint.export import FATES, TYPES, Exported
from reelquant.checkpoint.export.comfyui import ComfyUI
from reelquant.checkpoint.export.gguf import Gguf
from reelquant.checkpoint.export.names import naming_of
from reelquant.checkpoint.export.numbers import NumberType, added_error
from reelquant.checkpoint.export.source import ExportSource, Facts, Layer
from reelquant.checkpoint.export.torchao import TorchAo
from reelquant.cli import app
from reelquant.formats import QuantSpec, fit, pack, parse_format, parse_granularity
from reelquant.kernels import backend
from reelquant.kernels.reference import Reference
from reelquant.models.manifest import MANIFEST
from reelquant.nn import LayerLayout, LayerTensors, QuantLinear, TensorLayout, quantized_layers
from tests.tiny.configs import TINY, build
from tests.tiny.stock import CALL, MIXED, PROMPTS, wan_pipeline

REWRITTEN = MIXED | {"steps": [{"transform": "rotate", "least": 0.0, "on": "*.attn1.to_out.0"}, *MIXED["steps"]]}
RECIPES: dict[str, Any] = {"w8a16": "w8a16", "w4a16": "w4a16", "w8a16-fp8": "w8a16-fp8", "rewritten": REWRITTEN}
SUFFIX = {"comfyui": ".safetensors", "gguf": ".gguf", "torchao": ""}
HALF = 2.0**-11
"""Largest relative error of one rounding to float16, in which diffusers dequantizes GGUF."""


def wide() -> nn.Module:
    """A Wan whose rows are long enough for superblocks; text and image embeddings have other widths."""
    return build(
        "WanTransformer3DModel", num_attention_heads=2, attention_head_dim=128, in_channels=4, out_channels=4, text_dim=16, freq_dim=256,
        ffn_dim=512, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved pipeline per recipe."""
    made = {}
    for name, recipe in RECIPES.items():
        pipe = wan_pipeline()
        pipe.register_modules(transformer=wide())
        prompts, call = (PROMPTS, CALL) if name == "rewritten" else (None, {})
        report = reelquant.quantize(pipe, recipe, prompts, **call)
        made[name] = reelquant.save(pipe, tmp_path_factory.mktemp(name) / "out", report)
    return made


def model_of(folder: Path) -> Any:
    return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")


def exported(folder: Path, format: str, at: Path, **options: Any) -> Exported:
    return reelquant.export(folder, format, at / f"out{SUFFIX[format]}", **options)


def output(model: nn.Module) -> Tensor:
    """What a denoiser makes of the same noise, quantized layers computed by the reference."""
    made = torch.Generator().manual_seed(0)
    noise, text = torch.randn(1, 4, 3, 8, 8, generator=made), torch.randn(1, 5, 16, generator=made)
    with torch.no_grad(), backend("reference"):
        return model(hidden_states=noise, timestep=torch.tensor([500.0]), encoder_hidden_states=text, return_dict=False)[0]


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


# ------------------------------------------------------------------------------------------------------- codes and what they become


SHAPE = (12, 512)
STORED = (
    "int8 channel", "int8 tensor", "int6 channel", "int4 group-64", "int4 channel", "uint4 group-32", "uint8 channel", "int3 group-256",
    "int4 group-100", "e4m3 tensor", "e4m3 channel", "e5m2 channel", "log2_4 channel",
)  # fmt: skip
WORST = {"int8": 5e-4, "e4m3": 2e-3, "int4": 0.03, "uint4": 0.03}
"""Largest added error of a second rounding, over the squared weight."""
DIALECTS: dict[str, Any] = {"comfyui": ComfyUI, "gguf": Gguf, "torchao": TorchAo}
CARRIED = {
    "int8": {"int8 channel", "int8 tensor", "int6 channel", "int4 channel"},
    "fp8 by row": {"e4m3 tensor", "e4m3 channel"},
    "fp8": {"e4m3 tensor"},
    "Q8_0": {"int8 channel", "int8 tensor", "int6 channel", "int4 group-64", "int4 channel", "int3 group-256"},
    "Q4_0": {"int4 group-64", "int4 channel", "int3 group-256"},
    "Q4_1": {"int4 group-64", "int4 channel", "int3 group-256", "uint4 group-32"},
    "Q4_K": {"int4 channel", "int3 group-256"},
}
CARRIED["scaled_fp8"] = CARRIED["fp8"]


def stored(numbers: str) -> tuple[Layer, Facts]:
    """A layer of random weights in these numbers."""
    fmt, grain = numbers.split()
    quantizer = fit(QuantSpec(parse_format(fmt), parse_granularity(grain)), torch.randn(SHAPE) * torch.rand(SHAPE[0], 1))
    layout = LayerLayout(TensorLayout.of(QuantSpec(parse_format(fmt), parse_granularity(grain)), quantizer.format), bias=False)
    quant = QuantLinear(SHAPE[1], SHAPE[0], False, layout, device="cpu")
    codes = quantizer.codes(torch.randn(SHAPE) * quantizer.scale.mean() * quantizer.format.high / 2)
    packed = pack(codes, quantizer.format.bits)
    extra = {} if quantizer.zero_point is None else {"weight_zero_point": quantizer.zero_point.to(torch.uint8)}
    extra |= {} if quantizer.format.table is None else {"weight_levels": quantizer.format.table.half()}
    scale = quantizer.scale.to(quantizer.granularity.scale_dtype)
    quant.fill(LayerTensors((packed ^ 128).view(torch.int8) if fmt == "int8" else packed, scale, None, extra))
    return Layer("x", quant, quant.dequantized_weight(), None), Facts("x", layout, True, SHAPE, False, False)


@pytest.mark.parametrize("numbers", STORED)
@pytest.mark.parametrize(("format", "name"), [(one, name) for one, names in TYPES.items() for name in names])
def test_a_type_keeps_codes_that_fit_and_rounds_others(format: str, name: str, numbers: str) -> None:
    layer, facts = stored(numbers)
    dialect = DIALECTS[format](name)
    kind: NumberType = dialect.types[name]
    codes, quantizer = kind.encode(layer, facts)
    tensors, seen = dialect.pack("x", facts, name, codes, quantizer)
    forms = dialect.forms("x", facts, name)
    assert set(tensors) == set(forms)
    carried = numbers in CARRIED["fp8 by row" if (format, name) == ("torchao", "fp8") else name]
    assert (kind.refuses(facts) is None) == carried
    weight = layer.weight.flatten(1)
    if carried:  # GGUF keeps a scale, and a lowest number, in float16: bfloat16 scales fit, other numbers are rounded
        rounds = format == "gguf" and (numbers.endswith("tensor") or name in ("Q4_1", "Q4_K"))
        torch.testing.assert_close(seen, weight, rtol=HALF if rounds else 1e-6, atol=HALF * float(weight.abs().max()) if rounds else 0)
    else:
        assert 0 < added_error(layer, seen) < WORST[quantizer.format.name]


def test_nibbles_and_bytes_are_the_codes(folders: dict[str, Path], tmp_path: Path) -> None:
    exported(folders["w4a16"], "gguf", tmp_path)
    layer = quantized_layers(model_of(folders["w4a16"]))["blocks.0.attn1.to_k"]
    found = next(tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors if tensor.name == "blocks.0.self_attn.k.weight")
    blocks = torch.from_numpy(found.data.copy()).reshape(-1, 18)
    codes = torch.cat([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).reshape(256, 256)
    assert found.tensor_type == gguf.GGMLQuantizationType.Q4_0
    assert torch.equal(codes, layer.packed.unpacked())
    assert torch.equal(blocks[:, :2].contiguous().view(torch.float16).flatten().float(), layer.weight_scale.float().repeat_interleave(2))


@pytest.mark.parametrize("recipe", RECIPES)
def test_folded_weight_and_bias_give_what_the_layer_gives_without_rounded_inputs(folders: dict[str, Path], recipe: str) -> None:
    with ExportSource(folders[recipe] / "transformer") as source:
        layouts = source.stored.layers.values()
        if recipe == "rewritten":
            assert any(x.rotate for x in layouts) and any(x.shift for x in layouts) and any(x.scale for x in layouts)
        for name in source.layers:
            layer = source.layer(name)
            x = torch.randn(5, layer.weight.shape[1])
            expected = Reference(replace(layer.quant.operands, input=None))(x)
            assert difference(F.linear(x, layer.weight, layer.bias), expected) < 1e-5, name


# ------------------------------------------------------------------------------------------------------------------------ GGUF


def read_gguf(folder: Path, file: Path) -> Any:
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    return WanTransformer3DModel.from_single_file(
        str(file), config=str(folder), subfolder="transformer", quantization_config=config, dtype=torch.float32
    )


@pytest.mark.parametrize(
    ("recipe", "type", "near"),
    [
        ("w8a16", None, 1e-3), ("w4a16", None, 1e-3), ("rewritten", None, 0.05), ("w8a16-fp8", None, 0.02), ("w8a16", "Q4_K", 0.2),
        ("w4a16", "Q4_K", 0.1), ("w4a16", "Q8_0", 1e-3), ("w4a16", "Q4_1", 0.1),
    ],
)  # fmt: skip
def test_diffusers_reads_gguf_back(folders: dict[str, Path], tmp_path: Path, recipe: str, type: str | None, near: float) -> None:
    made = exported(folders[recipe], "gguf", tmp_path, type=type)
    ours, theirs = model_of(folders[recipe]), read_gguf(folders[recipe], made.path).requires_grad_(False)
    told = {outcome.name: outcome for outcome in made.layers}
    for name, layer in quantized_layers(ours).items():
        weight = theirs.get_submodule(name).weight
        weight = dequantize_gguf_tensor(weight) if isinstance(weight, GGUFParameter) else weight
        expected = layer.dequantized_weight()
        error = float((weight.float() - expected).square().sum() / expected.square().sum())
        assert error**0.5 == pytest.approx(told[name].error ** 0.5, abs=20 * HALF), name  # 20: differences of halves, in Q4_1 and Q4_K
    assert theirs.patch_embedding.weight.shape == ours.patch_embedding.weight.shape == (256, 4, 1, 2, 2)
    assert torch.equal(theirs.patch_embedding.weight, ours.patch_embedding.weight)
    assert difference(output(theirs), output(ours.dequantize())) < near


def test_a_bfloat16_artifact_is_read_back_too(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = reelquant.load(folders["w8a16"], dtype=torch.bfloat16)
    folder = reelquant.save(pipe, tmp_path / "bf16")
    exported(folder, "gguf", tmp_path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["head.head.weight"] == "BF16"  # a linear layer that stays float
    assert kinds["patch_embedding.weight"] == "F32"
    assert difference(output(read_gguf(folder, tmp_path / "out.gguf")), output(model_of(folders["w8a16"]))) < 1e-2


def test_rows_that_do_not_fill_blocks_are_written_as_floats(folders: dict[str, Path], tmp_path: Path) -> None:
    made = exported(folders["w8a16"], "gguf", tmp_path)
    (short,) = made.of("dequantized")
    assert (short.name, short.becomes) == ("condition_embedder.text_embedder.linear_1", "F16")
    assert short.why == "rows of 16 weights are not a multiple of 32"
    assert 0 < short.error < HALF**2


@pytest.mark.parametrize("cls", ["LTXVideoTransformer3DModel", "HunyuanVideoTransformer3DModel", "MochiTransformer3DModel"])
def test_other_families_are_read_back_under_either_names(tmp_path: Path, cls: str) -> None:
    folder = saved_alone(cls, tmp_path / "x", "transformer")
    made = exported(folder, "gguf", tmp_path)
    kind: Any = getattr(diffusers, cls)
    ours = kind.from_pretrained(folder, subfolder="transformer").dequantize().state_dict()
    theirs = kind.from_single_file(
        str(made.path), config=str(folder), subfolder="transformer", dtype=torch.float32,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    ).state_dict()  # fmt: skip
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        found = dequantize_gguf_tensor(value) if isinstance(value, GGUFParameter) else value
        torch.testing.assert_close(found.float(), ours[name], rtol=2 * HALF, atol=1e-6, msg=name)


def test_a_model_that_no_reader_opens_from_gguf_is_refused(tmp_path: Path) -> None:
    folder = saved_alone("UNetMotionModel", tmp_path / "x")
    with pytest.raises(UnsupportedError, match="GGUF files of UNetMotionModel cannot be opened"):
        exported(folder, "gguf", tmp_path)


def saved_alone(cls: str, folder: Path, component: str = "unet", recipe: Any = "w8a16") -> Path:
    """A quantized denoiser in a folder with an index, which is all that exporters look at."""
    from reelquant.checkpoint import adopt
    from reelquant.engine.run import quantize_pipeline
    from reelquant.recipes.recipe import load_recipe
    from tests.tiny.pipelines import FakePipeline

    pipe, chosen = FakePipeline(TINY[cls]()), load_recipe(recipe)
    quantize_pipeline(pipe, chosen, *([] if chosen.data_free else [PROMPTS]), **({} if chosen.data_free else {"num_inference_steps": 3}))
    adopt(pipe.denoiser, chosen)
    pipe.denoiser.save_pretrained(folder / component)
    (folder / "model_index.json").write_text("{}")
    return folder


SHIFTED = {
    "name": "shifted",
    "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": {"format": "int8"}},
    "calibrate": {"prompts": 2},
    "steps": [{"transform": "shift", "center": "mid", "on": "role:main"}],
}


def test_a_bias_without_a_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """UNets have q, k and v without biases, and norms before them that shifts fold into."""
    folder = saved_alone("UNetMotionModel", tmp_path / "x", recipe=SHIFTED)
    with pytest.raises(UnsupportedError, match=r"layers \('.*attn1.to_[qkv]', .* need biases that quantization made.* w8a16"):
        exported(folder, "comfyui", tmp_path)
    monkeypatch.setattr("reelquant.checkpoint.export.torchao.new_folder", None)  # it is not reached
    with pytest.raises(UnsupportedError, match="need biases that quantization made"):
        exported(folder, "torchao", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_bias_that_only_undoes_a_shift_of_the_layer_itself_needs_no_place() -> None:
    layout = LayerLayout(TensorLayout("int8", "channel"), shift=True)
    quant = QuantLinear(6, 4, False, layout, device="cpu")
    codes, shift = torch.randint(-128, 128, (4, 6), dtype=torch.int8), torch.randn(6).bfloat16()
    bias = (codes.float() @ shift.float()).half()
    for extra, gone in ((0.0, True), (1.0, False)):
        quant.fill(LayerTensors(codes, torch.ones(4).bfloat16(), (bias + extra).float(), {"pre_quant_shift": shift}))
        assert (quant.float_bias() is None) == gone


# --------------------------------------------------------------------------------------------------------------------- ComfyUI


def test_comfyui_files_hold_int8_codes_scales_and_descriptions(folders: dict[str, Path], tmp_path: Path) -> None:
    made = exported(folders["w8a16"], "comfyui", tmp_path)
    tensors, layer = load_file(made.path), quantized_layers(model_of(folders["w8a16"]))["blocks.0.ffn.net.0.proj"]
    assert torch.equal(tensors["blocks.0.ffn.0.weight"], layer.weight)
    assert torch.equal(tensors["blocks.0.ffn.0.weight_scale"], layer.weight_scale.float()[:, None])
    assert json.loads(tensors["blocks.0.ffn.0.comfy_quant"].numpy().tobytes()) == {
        "format": "int8_tensorwise", "full_precision_matrix_mult": True,
    }  # fmt: skip
    assert tensors["patch_embedding.weight"].dtype == torch.float32 and tensors["head.modulation"].shape == (1, 2, 256)
    assert not made.left_behind and {outcome.error for outcome in made.layers} == {0.0}


def test_comfyui_rounds_inputs_only_where_the_recipe_does_and_nothing_was_folded(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(exported(folders["rewritten"], "comfyui", tmp_path).path)
    floating = {
        name.removesuffix(".comfy_quant"): json.loads(value.numpy().tobytes())["full_precision_matrix_mult"]
        for name, value in tensors.items()
        if name.endswith(".comfy_quant")
    }
    assert floating["time_projection.1"] is False  # temporal: rounded as it comes
    assert floating["blocks.0.self_attn.o"] is True  # rotated, shifted and scaled
    assert floating["blocks.0.cross_attn.k"] is True  # prompt: float


@pytest.mark.parametrize(("type", "scale"), [("fp8", "weight_scale"), ("scaled_fp8", "scale_weight")])
def test_comfyui_float8_comes_in_both_spellings(folders: dict[str, Path], tmp_path: Path, type: str, scale: str) -> None:
    made = exported(folders["w8a16-fp8"], "comfyui", tmp_path, type=type)
    tensors, layers = load_file(made.path), quantized_layers(model_of(folders["w8a16-fp8"]))
    layer = layers["blocks.0.attn1.to_q"]
    weight = tensors["blocks.0.self_attn.q.weight"].float() * tensors[f"blocks.0.self_attn.q.{scale}"]
    assert torch.equal(weight, layer.dequantized_weight())
    assert tensors[f"blocks.0.self_attn.q.{scale}"].shape == ()
    assert ("scaled_fp8" in tensors) == (type == "scaled_fp8") == ("blocks.0.self_attn.q.comfy_quant" not in tensors)


def wan_image() -> nn.Module:
    """Wan 2.1's image-to-video wiring."""
    return build(
        "WanTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32, image_dim=8, added_kv_proj_dim=24,
    )  # fmt: skip


def wan_vace() -> nn.Module:
    return build(
        "WanVACETransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=12,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "converter"),
    [
        (TINY["WanTransformer3DModel"], "convert_wan_transformer_to_diffusers"),
        (wan_image, "convert_wan_transformer_to_diffusers"),
        (wan_vace, "convert_wan_transformer_to_diffusers"),
        (TINY["LTXVideoTransformer3DModel"], "convert_ltx_transformer_checkpoint_to_diffusers"),
    ],
)
def test_original_names_are_those_that_diffusers_converts_back(model: Any, converter: str) -> None:
    state, naming = model().state_dict(), naming_of(type(model()).__name__)
    original = {naming(name): value for name, value in state.items()}
    assert len(original) == len(state) and set(original) != set(state)
    back = getattr(single_file_utils, converter)(dict(original))
    assert back.keys() == state.keys() and all(back[name] is value for name, value in state.items())


def test_other_models_keep_the_names_of_diffusers_and_say_so(tmp_path: Path) -> None:
    folder = saved_alone("CogVideoXTransformer3DModel", tmp_path / "x", "transformer")
    made = exported(folder, "comfyui", tmp_path)
    assert "transformer_blocks.0.attn1.to_q.weight" in load_file(made.path)
    assert made.names.startswith("those of diffusers, by which ComfyUI recognises few models")


# --------------------------------------------------------------------------------------------------------------------- torchao


def test_torchao_folders_describe_plain_tensors(folders: dict[str, Path], tmp_path: Path) -> None:
    made = exported(folders["w8a16"], "torchao", tmp_path)
    config = json.loads((made.path / "transformer" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_type"]["default"]["_type"]) == ("torchao", "Int8WeightOnlyConfig")
    from safetensors import safe_open

    with safe_open(made.path / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        about, keys = file.metadata(), set(file.keys())
        layer = quantized_layers(model_of(folders["w8a16"]))["blocks.0.attn1.to_q"]
        assert torch.equal(file.get_tensor("blocks.0.attn1.to_q._weight_qdata"), layer.weight)
    names = json.loads(about["tensor_names"])
    assert set(names) == set(wide().state_dict())
    assert json.loads(about["blocks.0.attn1.to_q.weight"])["_type"] == "Int8Tensor"
    assert "blocks.0.attn1.to_q.weight" not in keys and "scale_shift_table" in keys
    assert sorted(path.name for path in made.path.iterdir()) == sorted(
        path.name for path in folders["w8a16"].iterdir() if path.name != "report.json"
    )


STOCK = """
import sys
sys.modules["reelquant"] = None  # an import of it would fail
import torch
from diffusers import DiffusionPipeline
from torchao.utils import TorchAOBaseTensor

model = DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32).transformer
made = torch.Generator().manual_seed(0)
noise, text = torch.randn(1, 4, 3, 8, 8, generator=made), torch.randn(1, 5, 16, generator=made)
with torch.no_grad():
    out = model(hidden_states=noise, timestep=torch.tensor([500.0]), encoder_hidden_states=text, return_dict=False)[0]
quantized = sum(isinstance(parameter.data, TorchAOBaseTensor) for parameter in model.parameters())
torch.save({"output": out, "quantized": quantized}, sys.argv[2])
"""


@pytest.mark.parametrize(("recipe", "near"), [("w8a16", 1e-5), ("w8a16-fp8", 1e-5), ("w4a16", 0.02), ("rewritten", 0.05)])
def test_stock_diffusers_opens_torchao_folders_without_reelquant(
    folders: dict[str, Path], tmp_path: Path, recipe: str, near: float
) -> None:
    pytest.importorskip("torchao", reason="the reader of this format is not installed")
    made = exported(folders[recipe], "torchao", tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", STOCK, str(made.path), str(tmp_path / "out.pt")], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["quantized"] == len(made.of("carried")) + len(made.of("requantized"))
    assert difference(found["output"], output(model_of(folders[recipe]).dequantize())) < near


# ------------------------------------------------------------------------------------------------ what is told, memory, and failures


def test_what_stays_behind_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    made = exported(folders["rewritten"], "gguf", tmp_path)
    steps = [name for what, names in made.left_behind.items() if what.startswith("ranges of inputs per") for name in names]
    assert steps == ["blocks.0.ffn.net.2"]
    assert any(what.startswith("rounding of inputs: weight-only") for what in made.left_behind)
    assert {outcome.fate for outcome in made.layers} == set(FATES)
    assert all(bool(outcome.why) == (outcome.fate in ("requantized", "dequantized")) for outcome in made.layers)
    assert "the input's rotation is folded into the weight" in {outcome.why for outcome in made.of("requantized")}
    data = json.loads(json.dumps(made.to_json()))
    assert data["counts"] == {fate: len(made.of(fate)) for fate in FATES} and data["bytes_after"] == made.bytes_after


@pytest.mark.parametrize("format", TYPES)
def test_bytes_are_those_of_the_file(folders: dict[str, Path], tmp_path: Path, format: str) -> None:
    made = exported(folders["w8a16"], format, tmp_path)
    written = made.path / "transformer" / "diffusion_pytorch_model.safetensors" if format == "torchao" else made.path
    header = written.stat().st_size - made.bytes_after
    assert 0 < header < 60_000


@pytest.mark.parametrize("format", TYPES)
def test_one_layer_is_in_memory_at_a_time(folders: dict[str, Path], tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []
    read = ExportSource.layer

    def watched(self: ExportSource, name: str) -> Layer:
        alive.append(sum(ref() is not None for ref in seen))
        layer = read(self, name)
        seen.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(ExportSource, "layer", watched)
    exported(folders["w8a16"], format, tmp_path)
    assert len(alive) == len(quantized_layers(model_of(folders["w8a16"]))) and max(alive) == 0


@pytest.mark.parametrize("format", TYPES)
def test_a_damaged_artifact_or_a_full_disk_leaves_nothing_and_keeps_the_old(
    folders: dict[str, Path], tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = shutil.copytree(folders["w8a16"], tmp_path / "in")
    (damaged / MANIFEST).unlink()  # as from a hub, which hands over the files of components
    file = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.0.ffn.net.2.weight"] = tensors["blocks.0.ffn.net.2.weight"].flip(0)
    save_file(tensors, file, metadata={"format": "pt"})
    at = tmp_path / "to"
    at.mkdir()
    with pytest.raises(CheckpointError, match=r"layer 'blocks.0.ffn.net.2' has checksum"):
        exported(damaged, format, at)
    assert list(at.iterdir()) == []
    made = exported(folders["w8a16"], format, at)
    before = {path: path.read_bytes() for path in at.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"already exists; .*--force"):
        exported(folders["w8a16"], format, at)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Layer, "plain_bias", property(full))
    with pytest.raises(CheckpointError, match=r"cannot write .* No space left on device; nothing is left behind"):
        exported(folders["w8a16"], format, at, force=True)
    assert {path: path.read_bytes() for path in at.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    assert exported(folders["w4a16"], format, at, force=True).bytes_after != made.bytes_after or format != "gguf"


@pytest.mark.parametrize(
    ("format", "name", "options", "words"),
    [
        ("onnx", "out", {}, "unknown format 'onnx'"),
        ("gguf", "out.safetensors", {}, "must end with .gguf"),
        ("comfyui", "out.bin", {}, "must end with .safetensors"),
        ("gguf", "out.gguf", {"type": "Q4_0x"}, "did you mean 'Q4_0'"),
        ("torchao", "out", {"type": "Q8_0"}, "unknown type 'Q8_0'"),
        ("torchao", "out", {"component": "transformer"}, "whole pipelines"),
        ("gguf", "out.gguf", {"component": "unet"}, "no quantized component 'unet'"),
    ],
)
def test_bad_requests_are_one_clear_error(
    folders: dict[str, Path], tmp_path: Path, format: str, name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises((UnsupportedError, CheckpointError), match=words):
        reelquant.export(folders["w8a16"], format, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_float_folders_and_hub_names_are_refused(tmp_path: Path) -> None:
    for name, words in (("tiny-dit", "nothing in 'tiny-dit' is quantized"), ("owner/name", "is not a folder here"), ("./x", "no pipeline")):
        with pytest.raises(CheckpointError, match=words):
            reelquant.export(name, "gguf", tmp_path / "out.gguf")


def test_a_text_encoder_is_refused_before_anything_is_copied(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = shutil.copytree(folders["w8a16"], tmp_path / "both")
    shutil.copytree(both / "transformer", both / "zz_encoder")
    config = json.loads((both / "zz_encoder" / "config.json").read_text())
    (both / "zz_encoder" / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "_class_name"}))
    monkeypatch.setattr("reelquant.checkpoint.export.torchao.new_folder", None)
    with pytest.raises(UnsupportedError, match="'zz_encoder' is quantized and no model of diffusers"):
        exported(both, "torchao", tmp_path)


def test_of_two_experts_one_is_chosen(folders: dict[str, Path], tmp_path: Path) -> None:
    both = shutil.copytree(folders["w8a16"], tmp_path / "both")
    shutil.copytree(folders["w4a16"] / "transformer", both / "transformer_2")
    with pytest.raises(UnsupportedError, match=r"2 quantized components \(transformer, transformer_2\)"):
        exported(both, "gguf", tmp_path)
    assert exported(both, "gguf", tmp_path, component="transformer_2").components == ("transformer_2",)
    assert exported(both, "torchao", tmp_path).components == ("transformer", "transformer_2")


def test_the_command_prints_what_became_of_the_layers(folders: dict[str, Path], tmp_path: Path) -> None:
    words = ["export", str(folders["w4a16"]), "--format", "comfyui", "--output", str(tmp_path / "a.safetensors")]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "requantized" in shown.output and "int4 group-64" in shown.output and "opens with" in shown.output
    data = CliRunner().invoke(app, [*words, "--force", "--type", "fp8", "--json"])
    assert json.loads(data.output)["counts"]["requantized"] > 0
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1 and "already exists" in again.stderr
