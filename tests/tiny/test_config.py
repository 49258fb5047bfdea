"""``ReelQuantConfig``: float checkpoints quantized while diffusers and transformers load them, options, and what can be changed later."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, PipelineQuantizationConfig, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

import reelquant
from reelquant import CalibrationError, CheckpointError, RecipeError, ReelQuantConfig, SiteError, UnsupportedError
from reelquant.discover import dummy_inputs, outline
from reelquant.integrations.loading import OnTheFly
from reelquant.integrations.options import with_options
from reelquant.nn import get_module, kernels_of, quantized_layers
from reelquant.recipes.recipe import load_recipe
from tests import processes
from tests.tiny.configs import TINY
from tests.tiny.stock import CALL, MIXED, PROMPTS, Bare, realigned, run, wan_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint."""
    folder = tmp_path_factory.mktemp("wan")
    TINY["WanTransformer3DModel"]().save_pretrained(folder)
    return folder


def load(folder: Path, *args: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = ReelQuantConfig(*args, **{key: options.pop(key) for key in list(options) if key in FIELDS})
    return WanTransformer3DModel.from_pretrained(folder, quantization_config=config, dtype=dtype, **options)


FIELDS = ("modules_to_not_convert", "modules_dtype_dict", "group_size")


def output(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = dummy_inputs(TINY[type(model).__name__]())
    inputs = {key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for key, value in inputs.items()}
    return run(realigned(model), inputs | {"timestep": torch.full_like(torch.as_tensor(inputs["timestep"]), 500)})


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    assert [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])] == []


def formats(model: nn.Module) -> dict[str, str]:
    return {name: f"{x.layout.weight.format} {x.layout.weight.granularity}" for name, x in quantized_layers(model).items()}


# ------------------------------------------------------------------------------------------------------------- while diffusers loads


MODELS = ("WanTransformer3DModel", "CogVideoXTransformer3DModel", "LTXVideoTransformer3DModel", "UNet3DConditionModel")


FULL_UNET = pytest.param(MODELS[3], "w4a16", marks=pytest.mark.full)


@pytest.mark.parametrize(("name", "recipe"), [*((name, "w8a16") for name in MODELS[:3]), (MODELS[0], "w4a16"), FULL_UNET])
def test_a_float_checkpoint_becomes_what_quantize_makes_of_it(name: str, recipe: str, tmp_path: Path) -> None:
    TINY[name]().save_pretrained(tmp_path)
    cls = getattr(diffusers, name)
    pipe = Bare(cls.from_pretrained(tmp_path))
    reelquant.quantize(pipe, recipe)
    loaded = cls.from_pretrained(tmp_path, quantization_config=ReelQuantConfig(recipe))
    assert_same_tensors(loaded, pipe.unet)
    assert formats(loaded) == formats(pipe.unet)
    assert loaded.config["quantization_config"] == pipe.unet.config["quantization_config"]
    assert torch.equal(output(loaded), output(pipe.unet))


def test_shards_may_separate_a_weight_from_its_bias(wan_folder: Path, tmp_path: Path) -> None:
    WanTransformer3DModel.from_pretrained(wan_folder).save_pretrained(tmp_path, max_shard_size=700)
    homes = {key: file.name for file in tmp_path.glob("*.safetensors") for key in load_file(file)}
    assert any(homes[f"{name}.weight"] != homes[f"{name}.bias"] for name in formats(load(wan_folder)) if f"{name}.bias" in homes)
    assert_same_tensors(load(tmp_path), load(wan_folder))


def test_no_more_than_one_layer_is_float_at_a_time(wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from weights whose bias is still to come, which files keep side by side."""
    held: list[int] = []
    take = OnTheFly.take

    def watched(self: OnTheFly, name: str, *tensors: Any) -> None:
        take(self, name, *tensors)
        floats = [get_module(self.model, path).weight for path, rest in self.waiting.items() if "weight" not in rest and rest]
        held.append(sum(weight.numel() for weight in floats))

    monkeypatch.setattr(OnTheFly, "take", watched)
    model = load(wan_folder)
    assert len(held) > 40
    assert max(held) <= max(layer.weight_shape[0] * layer.weight_shape[1] for layer in quantized_layers(model).values())
    assert not any(p.is_meta for p in model.parameters())


def test_codes_are_chosen_from_what_the_file_holds_whatever_it_is_loaded_as(wan_folder: Path) -> None:
    exact, half = load(wan_folder), load(wan_folder, dtype=torch.bfloat16)
    for name, layer in quantized_layers(half).items():
        other = quantized_layers(exact)[name]
        assert torch.equal(layer.weight, other.weight)
        assert torch.equal(layer.weight_scale, other.weight_scale)
        assert layer.bias.dtype == torch.bfloat16
    assert half.proj_out.weight.dtype == half.dtype == torch.bfloat16
    assert output(half, torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_survive_a_load_in_half_precision(wan_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    recipe = {"name": "wide", "defaults": {"weight": {"format": "int8", "granularity": "tensor"}}, "calibrate": None}  # float32 scales
    rules = [{"on": "*.to_q", "weight": {"format": "uint4", "granularity": "group-8"}}]  # bfloat16 ones
    load(wan_folder, recipe | {"rules": rules}).save_pretrained(tmp_path)
    stored, loaded = load_file(tmp_path / WEIGHTS), WanTransformer3DModel.from_pretrained(tmp_path, dtype=dtype)
    kinds = set()
    for name, layer in quantized_layers(loaded).items():
        for tensor, value in layer.state_dict().items():
            if tensor != "bias":
                assert value.dtype == stored[f"{name}.{tensor}"].dtype and torch.equal(value, stored[f"{name}.{tensor}"])
                kinds.add(value.dtype)
    assert kinds == {torch.int8, torch.uint8, torch.float32, torch.bfloat16}


def test_what_the_model_keeps_in_float32_stays_so(wan_folder: Path) -> None:
    loaded = load(wan_folder, dtype=torch.bfloat16)
    assert type(loaded.condition_embedder.time_embedder.linear_1) is nn.Linear
    assert loaded.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    told = reelquant.plan(Bare(TINY["WanTransformer3DModel"]()), "w8a16")
    assert told.layers["condition_embedder.time_embedder.linear_1"].skipped == "the model keeps it in float32"


FRESH = """
import sys, torch, reelquant
from diffusers import WanTransformer3DModel
from tests.tiny.test_config import output
torch.save(output(WanTransformer3DModel.from_pretrained(sys.argv[1])), sys.argv[2])
"""


def test_a_model_quantized_while_loading_opens_in_a_fresh_process(wan_folder: Path, tmp_path: Path) -> None:
    model = load(wan_folder, "w4a16")
    model.save_pretrained(tmp_path / "out", max_shard_size=2000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    processes.run(FRESH, tmp_path / "out", tmp_path / "seen.pt")
    assert torch.equal(torch.load(tmp_path / "seen.pt"), output(model))


def test_a_model_quantized_while_loading_behaves_like_a_loaded_one(wan_folder: Path, tmp_path: Path) -> None:
    model = load(wan_folder)
    for cast in (model.half, lambda: model.to(torch.bfloat16)):
        with pytest.raises(ValueError, match="quantized"):
            cast()
    before = output(model)
    assert torch.equal(output(copy.deepcopy(model)), before)
    model.save_pretrained(tmp_path / "q")
    with pytest.warns(UserWarning, match="quantization_config` from the model will be used"):
        again = load(tmp_path / "q", "w4a16")  # what is stored wins
    assert formats(again) == formats(model)
    model.dequantize()
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "f")
    assert torch.equal(output(WanTransformer3DModel.from_pretrained(tmp_path / "f")), output(model))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(wan_folder: Path, device_map: Any) -> None:
    loaded = load(wan_folder, device_map=device_map, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(output(loaded), output(load(wan_folder)))


def test_a_device_map_with_the_disk_is_refused(wan_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="offloaded to disk"):
        load(wan_folder, device_map={"": "disk"}, offload_folder=str(tmp_path))


def test_a_vae_is_quantized_between_its_ends(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=2, sample_size=8, **UP_AND_DOWN).eval()
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path, quantization_config=ReelQuantConfig("w8a16"))
    ends = {f"{part}.{end}" for part in ("encoder", "decoder") for end in ("conv_in", "conv_out")} | {"quant_conv", "post_quant_conv"}
    assert ends == set(loaded.config["quantization_config"].content["ignore"])
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).sample, vae(x).sample, atol=0.05, rtol=0.05)


UP_AND_DOWN = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


# ------------------------------------------------------------------------------------------------------------------------- bad input


def edited(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], Any], name: str = WEIGHTS) -> Path:
    """A copy of a checkpoint with other tensors."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, target / name, metadata={"format": "pt"})
    return target


def test_recipes_that_calibrate_say_what_to_call_instead(wan_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"reelquant\.quantize\(pipe, 'qvd-w8a8'\) and reelquant\.save.* w8a16 and w4a16 need no data"):
        load(wan_folder, "qvd-w8a8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "w8a61"}, "did you mean 'w8a16'"),
        ({"modules_to_not_convert": "proj_out"}, "modules_to_not_convert is a list of module names"),
        ({"modules_dtype_dict": {"int9": ["ffn"]}}, "unknown number format 'int9'; did you mean 'int8'"),
        ({"modules_dtype_dict": {"int8": "ffn"}}, r"modules_dtype_dict\['int8'\] is a list"),
        ({"modules_dtype_dict": ["int8"]}, "maps number formats to lists"),
        ({"modules_to_not_covert": ["proj_out"]}, "has no option 'modules_to_not_covert'; did you mean 'modules_to_not_convert'"),
        ({"group_size": 0}, "group_size is a number of weights"),
        ({"group_size": True}, "group_size is a number of weights"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ReelQuantConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_not_convert": ["prjo_out"]}, "modules_to_not_convert names 'prjo_out', which matches nothing .*mean 'proj_out'"),
        ({"modules_dtype_dict": {"int8": ["attn1.to_qq"]}}, "modules_dtype_dict names 'attn1.to_qq'.*did you mean 'attn1.to_q'"),
        ({"modules_to_not_convert": ["blocks.7.*"]}, "modules_to_not_convert names 'blocks.7.*'"),
    ],
)  # fmt: skip
def test_names_that_the_model_has_not_are_refused(wan_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SiteError, match=message):
        load(wan_folder, **options)


def test_damaged_float_checkpoints_are_refused(wan_folder: Path, tmp_path: Path) -> None:
    name = "blocks.0.ffn.net.2"
    with pytest.raises(CalibrationError, match=rf"the weight of layer '{name}' holds NaN"):
        load(edited(wan_folder, tmp_path / "a", lambda tensors: tensors[f"{name}.weight"].fill_(torch.nan)))
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensors that were to be quantized: '{name}.bias'"):
        load(edited(wan_folder, tmp_path / "b", lambda tensors: tensors.pop(f"{name}.bias")))


# --------------------------------------------------------------------------------------------------------------------------- options


def test_modules_to_not_convert(wan_folder: Path) -> None:
    every = set(formats(load(wan_folder)))
    words = ["attn1.to_q", "blocks.1", "re:.*ffn.*proj", "scale_shift_table", "maybe:lm_head", "maybe:attn2.to_v"]
    left = set(formats(load(wan_folder, modules_to_not_convert=words)))
    assert left < every
    assert every - left == {
        name for name in every if name.endswith(("attn1.to_q", "attn2.to_v")) or name.startswith("blocks.1.") or "ffn.net.0.proj" in name
    }


def test_modules_dtype_dict(wan_folder: Path) -> None:
    found = formats(
        load(wan_folder, modules_dtype_dict={"int4": ["ffn"], "e4m3": ["*.attn2.*", "proj_out"]}, modules_to_not_convert=["to_k"])
    )
    assert found["blocks.0.ffn.net.2"] == "int4 group-64"
    assert found["blocks.0.attn2.to_q"] == found["proj_out"] == "e4m3 channel"  # also what the recipe would have kept
    assert found["blocks.1.attn1.to_q"] == "int8 channel"
    assert not any(name.endswith("to_k") for name in found)


def test_a_format_for_a_layer_that_the_model_keeps_in_float_is_told(wan_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "reelquant"):
        load(wan_folder, modules_dtype_dict={"int4": ["time_embedder", "to_q"]}, modules_to_not_convert=["blocks.0.attn1.to_q"])
    assert "names 2 layers that stay float: 'condition_embedder.time_embedder.linear_1' (the model keeps it in float32)" in caplog.text


def test_group_size(wan_folder: Path) -> None:
    assert formats(load(wan_folder, "w4a16", group_size=8))["blocks.0.attn1.to_q"] == "int4 group-8"
    assert formats(load(wan_folder, "w4a16", group_size=8))["condition_embedder.time_proj"] == "int8 channel"  # the recipe's exception
    assert formats(load(wan_folder, "w4a16", group_size=-1))["blocks.0.attn1.to_q"] == "int4 channel"
    assert formats(load(wan_folder, "w8a16", group_size=16))["blocks.0.attn1.to_q"] == "int8 group-16"
    mixed = formats(load(wan_folder, group_size=8, modules_dtype_dict={"int4": ["ffn"]}))
    assert set(mixed.values()) == {"int8 group-8", "int4 group-8"}


def test_the_stored_recipe_holds_the_options(wan_folder: Path) -> None:
    model = load(wan_folder, modules_dtype_dict={"int4": ["ffn"]}, modules_to_not_convert=["to_k"], group_size=8)
    told = load_recipe(model.config["quantization_config"].recipe)
    pipe = Bare(WanTransformer3DModel.from_pretrained(wan_folder))
    reelquant.quantize(pipe, told)
    assert_same_tensors(pipe.unet, model)


def test_without_options_a_recipe_stays_what_it_is() -> None:
    model = TINY["WanTransformer3DModel"]()
    recipe = load_recipe("w4a16")
    assert with_options(recipe, model, outline(model).layers.values()) is recipe


# ---------------------------------------------------------------------------------------------------------------- the config by itself


def test_a_config_survives_its_own_serialization(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\ndefaults: {weight: {format: int8}}\ncalibrate: null\n")
    options: dict[str, Any] = {"modules_to_not_convert": ("proj_out",), "modules_dtype_dict": {"int4": ["ffn"]}, "group_size": 32}
    for source in (
        "w8a16",
        file,
        str(file),
        load_recipe("w4a16"),
        {"name": "d", "defaults": {"weight": {"format": "int8"}}, "calibrate": None},
    ):
        config = ReelQuantConfig(source, **options)
        file.unlink(missing_ok=True) if source == str(file) else None  # nothing refers to the file any more
        assert config.to_dict() == config.to_diff_dict() == json.loads(config.to_json_string())
        again = ReelQuantConfig.from_dict(config.to_dict())
        assert again == config and repr(again) == repr(config)
        assert copy.deepcopy(config) == config != ReelQuantConfig(source if source != str(file) else "w8a16")
    assert repr(ReelQuantConfig("w8a16", group_size=64)) == "ReelQuantConfig(recipe='w8a16', group_size=64)"
    assert ReelQuantConfig().quant_method.value == "reelquant"


def test_keys_of_the_future_are_kept() -> None:
    data = ReelQuantConfig("w8a16").to_dict() | {"from_tomorrow": {"a": 1}}
    config, unused = ReelQuantConfig.from_dict(data, return_unused_kwargs=True, other=2)
    assert config.to_dict()["from_tomorrow"] == {"a": 1} and unused == {"other": 2}
    stored = {"quant_method": "reelquant", "config_groups": {}, "recipe": {"name": "x", "unheard": True}}
    assert ReelQuantConfig.from_dict(stored).to_dict() == stored


# ----------------------------------------------------------------------------------------------------------------------- transformers

SIZE = {"vocab_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
T5 = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
TEXT: dict[str, Callable[[], Any]] = {
    "umt5": lambda: UMT5EncoderModel(UMT5Config(**T5)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "clip": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**SIZE, projection_dim=8, bos_token_id=0, eos_token_id=1)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)),
}
FLOAT = {"umt5": {"wo"}, "t5": {"wo", "lm_head"}, "clip": {"text_projection"}, "llama": {"lm_head"}}
"""What stays float: kept in float32 by the model, heads, and weights that are the embedding's too."""


@pytest.fixture
def text(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A float text encoder and its folder."""
    torch.manual_seed(0)
    model = TEXT[request.param]().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1) if parameter.ndim > 1 else None
    model.save_pretrained(tmp_path / "float")
    return model, tmp_path / "float"


def encoded(model: Any) -> Tensor:
    tokens = torch.arange(6)[None]
    more = {"decoder_input_ids": tokens} if isinstance(model, T5ForConditionalGeneration) else {}
    with torch.no_grad():
        return realigned(model)(input_ids=tokens, **more)[0].float()


@pytest.mark.parametrize(("text", "name"), [(name, name) for name in TEXT], indirect=["text"])
def test_text_encoders_are_quantized_while_they_load(text: tuple[Any, Path], name: str, tmp_path: Path) -> None:
    model, folder = text
    reference = encoded(model)
    for recipe, dtype, bound in (("w8a16", torch.float32, 0.05), ("w4a16", torch.bfloat16, 0.5)):
        loaded = type(model).from_pretrained(folder, quantization_config=ReelQuantConfig(recipe), dtype=dtype)
        assert {path.rpartition(".")[2] for path in loaded.config.quantization_config.content["ignore"]} == FLOAT[name]
        seen = encoded(loaded)
        assert (seen - reference).norm() < bound * reference.norm()
        loaded.save_pretrained(tmp_path / recipe, max_shard_size="2KB")
        assert len(list((tmp_path / recipe).glob("*.safetensors"))) > 1
        again = type(model).from_pretrained(tmp_path / recipe, dtype=dtype)
        assert_same_tensors(again, loaded)
        assert torch.equal(encoded(again), seen)
        assert again.config.quantization_config == loaded.config.quantization_config
        assert not any(parameter.requires_grad for layer in quantized_layers(again).values() for parameter in layer.parameters())


@pytest.mark.parametrize("text", ["llama"], indirect=True)
def test_tied_embeddings_stay_tied_and_float(text: tuple[Any, Path]) -> None:
    model, folder = text
    loaded = type(model).from_pretrained(folder, quantization_config=ReelQuantConfig())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    untied = type(model).from_pretrained(
        folder, quantization_config=ReelQuantConfig(modules_dtype_dict={"int8": ["up_proj", "maybe:lm_head"]})
    )
    assert "model.layers.0.mlp.up_proj" in quantized_layers(untied)


@pytest.mark.parametrize("text", ["umt5"], indirect=True)
def test_options_and_device_maps_work_in_transformers(text: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = text
    config = ReelQuantConfig(modules_to_not_convert=["SelfAttention.k"], modules_dtype_dict={"int4": ["wi_0"]}, group_size=8)
    loaded = type(model).from_pretrained(folder, quantization_config=config, device_map="auto")
    found = formats(loaded)
    assert not any(name.endswith("SelfAttention.k") for name in found)
    assert {value for name, value in found.items() if name.endswith("wi_0")} == {"int4 group-8"}
    before = encoded(loaded)
    loaded.dequantize()
    assert not quantized_layers(loaded) and not hasattr(loaded.config, "quantization_config")
    torch.testing.assert_close(encoded(loaded), before, rtol=1e-4, atol=1e-4)
    with pytest.raises(SiteError, match="did you mean 'SelfAttention'"):
        type(model).from_pretrained(folder, quantization_config=ReelQuantConfig(modules_to_not_convert=["SelfAttentoin"]))
    with pytest.raises(RecipeError, match="calibrates"):
        type(model).from_pretrained(folder, quantization_config=ReelQuantConfig("qvd-w8a8"))
    with pytest.raises(UnsupportedError, match="disk"):
        type(model).from_pretrained(folder, quantization_config=config, device_map={"": "disk"}, offload_folder=str(tmp_path / "o"))


@pytest.mark.parametrize("text", ["clip"], indirect=True)
def test_damaged_text_encoders_are_refused(text: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = text
    key = next(key for key in load_file(folder / "model.safetensors") if key.endswith("layers.1.mlp.fc1.weight"))
    broken = edited(folder, tmp_path / "a", lambda tensors: tensors[key].fill_(torch.nan), "model.safetensors")
    with pytest.raises(CalibrationError, match="holds NaN"):
        type(model).from_pretrained(broken, quantization_config=ReelQuantConfig())
    lacking = edited(folder, tmp_path / "b", lambda tensors: tensors.pop(key), "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):
        type(model).from_pretrained(lacking, quantization_config=ReelQuantConfig())
    type(model).from_pretrained(folder, quantization_config=ReelQuantConfig()).save_pretrained(tmp_path / "c")
    changed = edited(tmp_path / "c", tmp_path / "d", lambda tensors: tensors[key].add_(1), "model.safetensors")
    with pytest.raises(CheckpointError, match="checksum"):
        type(model).from_pretrained(changed)


# -------------------------------------------------------------------------------------------------------------------- whole pipelines


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    wan_pipeline().save_pretrained(folder)
    return folder


def clip(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        realigned(part)
    return pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="pt", **CALL).frames


PARTS = {"transformer": ReelQuantConfig("w8a16"), "text_encoder": ReelQuantConfig("w8a16", modules_to_not_convert=["wi_1"])}


@pytest.mark.parametrize(
    "config",
    [
        {"quant_mapping": PARTS},
        {"quant_backend": "reelquant", "quant_kwargs": {"recipe": "w8a16"}, "components_to_quantize": list(PARTS)},
        {"quant_backend": "reelquant", "quant_kwargs": {"recipe": "w4a16", "group_size": 16}},
    ],
)
def test_pipelines_are_quantized_while_they_load(pipeline_folder: Path, config: dict[str, Any], tmp_path: Path) -> None:
    pipe = WanPipeline.from_pretrained(pipeline_folder, quantization_config=PipelineQuantizationConfig(**config), dtype=torch.float32)
    parts = {name for name, part in pipe.components.items() if isinstance(part, nn.Module) and quantized_layers(part)}
    assert parts == (set(PARTS) if len(config) != 2 else {*PARTS, "vae"})
    seen = clip(pipe)
    reelquant.save(pipe, tmp_path / "out")
    assert torch.equal(clip(reelquant.load(tmp_path / "out")), seen)


# ------------------------------------------------------------------------------------------------------------------------- afterwards


@pytest.fixture(scope="module")
def with_tables() -> Any:
    pipe = wan_pipeline()
    reelquant.quantize(pipe, MIXED, PROMPTS, overrides={"temporal": "table"}, **CALL)
    return pipe


def at(model: nn.Module, time: float) -> Tensor:
    inputs = dummy_inputs(TINY["WanTransformer3DModel"]())
    return run(model, inputs | {"timestep": torch.tensor([time])})


def test_kernels_of_one_model_can_be_chosen_after_loading(wan_folder: Path) -> None:
    one, other = realigned(load(wan_folder)), realigned(load(wan_folder))
    fast = output(one)
    reelquant.configure(one, kernels="reference")
    assert set(kernels_of(one).names) == {"reference"} and "reference" not in kernels_of(other).names
    slow = output(one)
    torch.testing.assert_close(slow, fast, rtol=1e-4, atol=1e-5)
    assert torch.equal(output(copy.deepcopy(one)), slow) and set(kernels_of(copy.deepcopy(one)).names) == {"reference"}
    reelquant.configure(one, kernels="auto")
    assert kernels_of(one) == kernels_of(other)
    assert torch.equal(output(one), fast)


def test_reference_kernels_compute_what_a_global_choice_of_them_computes(with_tables: Any) -> None:
    from reelquant.kernels import backend

    model = copy.deepcopy(with_tables.transformer)
    with backend("reference"):
        expected = at(copy.deepcopy(with_tables.transformer), 333)
    assert not torch.equal(at(model, 333), expected)  # integers and floats round differently
    reelquant.configure(model, kernels="reference")
    assert torch.equal(at(model, 333), expected)


def test_tables_of_one_model_can_be_switched_off(with_tables: Any) -> None:
    pipe = copy.deepcopy(with_tables)
    model = pipe.transformer
    time = float(model.reelquant_clock.timesteps[1])
    looked_up, between = at(model, time), at(model, time - 7)
    reelquant.configure(pipe, temporal_table=False)
    assert not torch.equal(at(model, time), looked_up)
    assert torch.equal(at(model, time - 7), between)  # was computed before
    assert torch.equal(at(copy.deepcopy(model), time), at(model, time))
    reelquant.configure(pipe, temporal_table=True)
    assert torch.equal(at(model, time), looked_up)
    assert torch.equal(at(with_tables.transformer, time), looked_up)


def test_configure_refuses_what_it_cannot_do(wan_folder: Path) -> None:
    model = load(wan_folder)
    with pytest.raises(RecipeError, match="did you mean 'reference'"):
        reelquant.configure(model, kernels="referense")
    with pytest.raises(UnsupportedError, match="stores no tables"):
        reelquant.configure(model, temporal_table=True)
    reelquant.configure(model, temporal_table=False)
    with pytest.raises(UnsupportedError, match="no quantized layers"):
        reelquant.configure(TINY["WanTransformer3DModel"](), kernels="auto")
