"""Quantized denoisers through stock diffusers: from_pretrained, save_pretrained, dequantize, adapters, copies."""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNetMotionModel, WanTransformer3DModel
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import reelquant
from reelquant import CheckpointError, UnsupportedError
from reelquant._remarks import remarks
from reelquant.clock import NAME
from reelquant.discover import dummy_inputs
from reelquant.integrations.diffusers import ReelQuantConfig
from reelquant.kernels import hadamard
from reelquant.nn import QuantConv2d, QuantLayer, QuantLinear, get_module, quantized_layers
from reelquant.recipes.recipe import load_recipe
from reelquant.reuse import installed_reuse
from tests.tiny.configs import TINY
from tests.tiny.stock import CALL, MIXED, PROMPTS, Bare, realigned, run, wan_pipeline

Edit = Callable[[dict[str, Any]], None]


@functools.cache
def made_up(name: str) -> dict[str, Any]:
    return dummy_inputs(TINY[name]())


def inputs_of(denoiser: nn.Module, timestep: float, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    made = made_up(type(denoiser).__name__)
    made = {key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for key, value in made.items()}
    return made | {"timestep": torch.full_like(torch.as_tensor(made["timestep"]), timestep)}


def outputs(denoiser: nn.Module) -> list[Tensor]:
    """At a calibrated timestep, at another one (tables are not used), and at the last."""
    realigned(denoiser)
    times = getattr(denoiser, NAME).timesteps.tolist()
    return [run(denoiser, inputs_of(denoiser, time)) for time in (times[0], times[0] - 37, times[-1])]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def quantized_wan() -> nn.Module:
    pipe = wan_pipeline()
    reelquant.quantize(pipe, MIXED, PROMPTS, overrides={"temporal": "table"}, **CALL)
    return pipe.transformer


def quantized_unet() -> nn.Module:
    pipe = Bare(TINY["UNetMotionModel"]())
    reelquant.quantize(pipe, MIXED, PROMPTS)
    return pipe.unet


@pytest.fixture(scope="module")
def shared_wan() -> nn.Module:
    return quantized_wan()


@pytest.fixture(scope="module")
def shared_unet() -> nn.Module:
    return quantized_unet()


@pytest.fixture
def wan(shared_wan: nn.Module) -> nn.Module:
    return copy.deepcopy(shared_wan)


@pytest.fixture(scope="module")
def wan_folder(shared_wan: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    shared_wan.save_pretrained(folder)
    return folder


def test_a_transformer_comes_back_bit_equal_with_tables_levels_and_steps(shared_wan: nn.Module, wan_folder: Path) -> None:
    stored = load_file(wan_folder / "diffusion_pytorch_model.safetensors")
    endings = {key.rpartition(".")[2] for key in stored}
    assert endings >= {
        "weight_scale", "weight_zero_point", "weight_levels", "input_scale", "input_zero_point", "input_levels", "pre_quant_shift",
        "pre_quant_scale", "output_table",
    }  # fmt: skip
    loaded = WanTransformer3DModel.from_pretrained(wan_folder)
    assert_equal(outputs(loaded), outputs(shared_wan))
    for (name, a), (other, b) in zip(shared_wan.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert {layer.clock[0] for layer in quantized_layers(loaded).values()} == {loaded.reelquant_clock}


def test_a_unet_with_convolutions_comes_back_bit_equal(shared_unet: nn.Module, tmp_path: Path) -> None:
    unet = shared_unet
    assert any(isinstance(layer, QuantConv2d) for layer in quantized_layers(unet).values())
    unet.save_pretrained(tmp_path)
    assert_equal(outputs(UNetMotionModel.from_pretrained(tmp_path)), outputs(unet))


def test_a_loaded_unet_saves_the_same_bytes_again_whatever_it_is_loaded_as(shared_unet: nn.Module, tmp_path: Path) -> None:
    """Its query layers have no bias of their own: a transform made one, which keeps its dtype."""
    shared_unet.save_pretrained(tmp_path / "a")
    UNetMotionModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    names = [folder / "diffusion_pytorch_model.safetensors" for folder in (tmp_path / "a", tmp_path / "b")]
    assert names[0].read_bytes() == names[1].read_bytes()
    made = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.bias"
    half = UNetMotionModel.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert half.get_parameter(made).dtype == torch.float16
    assert half.get_parameter("conv_in.bias").dtype == torch.bfloat16


def test_a_recipe_without_data_that_reuses_blocks_does_so_in_a_model_quantized_while_loading(tmp_path: Path) -> None:
    stored = Path(wan_pipeline().transformer.save_pretrained(tmp_path / "float") or tmp_path / "float")
    recipe = {"extends": "w8a16", "name": "reusing", "steps": [{"reuse": "blocks", "every": 2, "stretch": [0.0, 1.0]}]}
    model = WanTransformer3DModel.from_pretrained(stored, quantization_config=ReelQuantConfig(recipe))
    assert installed_reuse(model)["blocks"].facts["blocks"] == ["blocks.0", "blocks.1"]
    model.save_pretrained(tmp_path / "again")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "again")
    assert installed_reuse(again)["blocks"].stage == installed_reuse(model)["blocks"].stage


def test_a_data_free_model_has_no_clock_and_comes_back_bit_equal(tmp_path: Path) -> None:
    pipe = Bare(TINY["WanTransformer3DModel"]())
    reelquant.quantize(pipe, "w4a16")
    pipe.unet.save_pretrained(tmp_path)
    loaded = realigned(WanTransformer3DModel.from_pretrained(tmp_path))
    assert not hasattr(loaded, NAME)
    assert torch.equal(run(loaded, inputs_of(loaded, 500)), run(pipe.unet, inputs_of(loaded, 500)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_while_loading_spares_what_is_stored_of_quantized_layers(wan_folder: Path, dtype: torch.dtype) -> None:
    stored = load_file(wan_folder / "diffusion_pytorch_model.safetensors")
    loaded = WanTransformer3DModel.from_pretrained(wan_folder, dtype=dtype)
    for name, layer in quantized_layers(loaded).items():
        for tensor, value in layer.state_dict().items():
            if tensor != "bias":
                assert value.dtype == stored[f"{name}.{tensor}"].dtype
                assert torch.equal(value, stored[f"{name}.{tensor}"])
    assert loaded.blocks[0].attn1.to_q.bias.dtype == loaded.proj_out.weight.dtype == dtype
    assert loaded.condition_embedder.time_embedder.linear_1.bias.dtype == torch.float32  # Wan keeps these in float32
    assert run(loaded, inputs_of(loaded, 900, dtype)).isfinite().all()


def test_shards_may_separate_a_weight_from_its_scales(shared_wan: nn.Module, tmp_path: Path) -> None:
    shared_wan.save_pretrained(tmp_path, max_shard_size=700)
    homes = {key: file.name for file in tmp_path.glob("*.safetensors") for key in load_file(file)}
    assert any(homes[f"{name}.weight"] != homes[f"{name}.weight_scale"] for name in quantized_layers(shared_wan))
    assert_equal(outputs(WanTransformer3DModel.from_pretrained(tmp_path)), outputs(shared_wan))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_a_device_map_works(wan_folder: Path, shared_wan: nn.Module, device_map: Any) -> None:
    loaded = WanTransformer3DModel.from_pretrained(wan_folder, device_map=device_map)
    assert_equal(outputs(loaded), outputs(shared_wan))


def test_a_device_map_with_the_disk_is_refused(wan_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="offloaded to disk"):
        WanTransformer3DModel.from_pretrained(wan_folder, device_map={"": "disk"}, offload_folder=str(tmp_path))


def test_a_loaded_model_saves_the_same_bytes_again(wan_folder: Path, tmp_path: Path) -> None:
    WanTransformer3DModel.from_pretrained(wan_folder).save_pretrained(tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / name).read_bytes() == (wan_folder / name).read_bytes()
    fresh, old = (WanTransformer3DModel.load_config(folder)["quantization_config"] for folder in (tmp_path, wan_folder))
    assert fresh == old


def test_the_config_says_what_was_done(wan_folder: Path, shared_wan: nn.Module) -> None:
    config = WanTransformer3DModel.load_config(wan_folder)["quantization_config"]
    assert list(config["slots"]) == ["argument", "timesteps"]
    assert config["slots"] == {"argument": "timestep", "timesteps": shared_wan.reelquant_clock.timesteps.tolist()}
    assert config["ignore"] == ["patch_embedding", "proj_out"]
    assert load_recipe(config["recipe"]).digest() == config["recipe_digest"]
    assert config["tool_version"] == reelquant.__version__
    shared = next(group for group in config["config_groups"].values() if "blocks.0.attn1.to_q" in group["targets"])
    assert shared["weights"] == {"format": "int4", "granularity": "group-16"}
    assert {"blocks.1.attn1.to_k", "blocks.0.attn1.to_v"} <= set(shared["targets"])
    named = [name for group in config["config_groups"].values() for name in group["targets"]]
    assert sorted(named) == sorted(quantized_layers(shared_wan)) == sorted(config["checksums"])


def test_loading_logs_the_proof(wan_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="reelquant"):
        loaded = WanTransformer3DModel.from_pretrained(wan_folder)
    count = len(quantized_layers(loaded))
    assert f"{count} quantized layers" in caplog.text
    assert f"{count} checksums verified, kernels: " in caplog.text


def test_a_deep_copy_follows_its_own_clock(wan: nn.Module) -> None:
    twin = copy.deepcopy(wan)
    clock, other = wan.reelquant_clock, twin.reelquant_clock
    assert other is not clock
    assert all(layer.clock[0] is other for layer in quantized_layers(twin).values())
    run(wan, inputs_of(wan, float(clock.timesteps[0])))
    run(twin, inputs_of(twin, float(clock.timesteps[2])))
    assert (int(clock.slot), int(other.slot)) == (0, 2)


def test_dequantize_gives_stock_layers_that_compute_what_the_codes_stand_for(tmp_path: Path) -> None:
    pipe = Bare(TINY["WanTransformer3DModel"]())
    reelquant.quantize(pipe, "w4a16")
    before = run(pipe.unet, inputs_of(pipe.unet, 500))
    pipe.unet.dequantize()
    assert type(pipe.unet.blocks[0].attn1.to_q) is nn.Linear
    torch.testing.assert_close(run(pipe.unet, inputs_of(pipe.unet, 500)), before, rtol=1e-4, atol=1e-5)  # another order of sums
    assert "quantization_config" not in pipe.unet.config
    pipe.unet.save_pretrained(tmp_path)
    loaded = realigned(WanTransformer3DModel.from_pretrained(tmp_path))
    assert torch.equal(run(loaded, inputs_of(loaded, 500)), run(pipe.unet, inputs_of(pipe.unet, 500)))
    pipe.unet.half()  # a float model again


def test_dequantize_undoes_shifts_and_removes_the_clock(shared_wan: nn.Module, shared_unet: nn.Module) -> None:
    for denoiser in (copy.deepcopy(shared_wan), copy.deepcopy(shared_unet)):
        layers = {name: layer for name, layer in quantized_layers(denoiser).items() if layer.layout.shift}
        assert layers
        expected = {name: layer.dequantized_weight() for name, layer in layers.items()}
        met = {name: hadamard(weight, 1) if layers[name].layout.rotate else weight for name, weight in expected.items()}
        shifts = {name: layer.pre_quant_shift.float() for name, layer in layers.items()}
        biases = {name: layer.bias.detach() for name, layer in layers.items()}
        denoiser.dequantize()
        for name, weight in expected.items():
            layer = get_module(denoiser, name)
            assert torch.equal(layer.weight, weight)
            bias = torch.zeros(()) if layer.bias is None else layer.bias.detach()  # a bias that only undid the shift is gone
            moved = bias + (met[name].flatten(2).sum(2) if weight.ndim > 2 else met[name]) @ shifts[name]
            assert bias.dtype == layer.weight.dtype == torch.float32
            # sums in another order; biases that the float layer did not have are stored in float16, and so is their difference
            torch.testing.assert_close(moved, biases[name].float(), rtol=2**-10, atol=2**-10)
        assert not hasattr(denoiser, NAME)
        assert not denoiser._forward_pre_hooks
        assert run(denoiser, inputs_of(denoiser, 500)).isfinite().all()


def test_a_quantized_model_refuses_to_be_cast(wan: nn.Module) -> None:
    for cast in (wan.half, wan.bfloat16, lambda: wan.to(torch.bfloat16)):
        with pytest.raises(ValueError, match="quantized"):
            cast()
    wan.to("cpu")


def test_a_lora_on_quantized_layers_runs_and_goes_again(wan: nn.Module, tmp_path: Path) -> None:
    before = run(wan, inputs_of(wan, 500))
    wan.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=True))
    assert isinstance(wan.blocks[0].attn1.to_q.base_layer, QuantLinear)
    assert torch.equal(run(wan, inputs_of(wan, 500)), before)  # B starts at zero
    nn.init.ones_(wan.blocks[0].attn1.to_q.lora_B["default"].weight)
    assert not torch.equal(run(wan, inputs_of(wan, 500)), before)
    output = wan(**inputs_of(wan, 500) | {"return_dict": False})[0]
    output.square().mean().backward()
    assert wan.blocks[1].attn1.to_out[0].lora_B["default"].weight.grad.abs().sum() > 0
    with pytest.raises(UnsupportedError, match="unload"):
        wan.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["blocks.0.ffn.net.2", "condition_embedder.time_proj"])
def test_one_graph_of_a_layer_serves_all_steps(wan: nn.Module, name: str) -> None:
    """Per-step input scales and weight levels; input levels."""
    layer, clock = get_module(wan, name), wan.reelquant_clock
    x = torch.randn(2, layer.in_features)
    torch._dynamo.reset()  # graphs of other layers share this forward
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for time in clock.timesteps.tolist():
            clock.tick(time - 3)  # not a stored timestep: the layer is computed
            assert torch.equal(compiled(x), layer(x))


def test_layers_take_their_input_by_keyword(wan: nn.Module) -> None:
    layer = wan.blocks[0].attn1.to_q
    x = torch.randn(1, 3, layer.in_features)
    assert torch.equal(layer(input=x), layer(x))


def test_the_config_class_survives_its_own_serialization(wan_folder: Path) -> None:
    stored = WanTransformer3DModel.load_config(wan_folder)["quantization_config"]
    config = DiffusersAutoQuantizer.from_dict(stored)
    assert config.to_dict() == config.to_diff_dict() == stored
    assert ReelQuantConfig.from_dict(config.to_dict()) == config
    assert config != ReelQuantConfig()
    assert repr(config).startswith("ReelQuantConfig(recipe='mixed', ")
    assert '"format_version": 1' in config.to_json_string()


# ------------------------------------------------------------------------------------------------------------------ damaged files


def damage(folder: Path, target: Path, *, tensors: Edit | None = None, config: Edit | None = None) -> Path:
    """A copy of a checkpoint with its tensors or its quantization_config edited."""
    target.mkdir()
    values = load_file(folder / "diffusion_pytorch_model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    if tensors is not None:
        tensors(values)
    if config is not None:
        config(content["quantization_config"])
    save_file(values, target / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(content))
    return target


TO_Q = "blocks.0.attn1.to_q"


def _flip(values: dict[str, Tensor]) -> None:
    values[f"{TO_Q}.weight"][0, 0] ^= 3


def _poison(values: dict[str, Tensor]) -> None:
    values[f"{TO_Q}.weight_scale"][0] = torch.nan


def _shuffle(values: dict[str, Tensor]) -> None:
    values["blocks.0.ffn.net.2.weight_levels"] = values["blocks.0.ffn.net.2.weight_levels"].flip(0)


def _widen(values: dict[str, Tensor]) -> None:
    values[f"{TO_Q}.weight_scale"] = values[f"{TO_Q}.weight_scale"].float()


def _cut(values: dict[str, Tensor]) -> None:
    values[f"{TO_Q}.weight"] = values[f"{TO_Q}.weight"][:, :3].contiguous()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_flip, f"layer '{TO_Q}' has checksum"),
        (_shuffle, r"layer 'blocks\.0\.ffn\.net\.2' has checksum none \(a level table is a sorted vector"),
        (_poison, rf"'{TO_Q}\.weight_scale' holds NaN or inf"),
        (_widen, rf"'{TO_Q}\.weight_scale' is stored as torch\.float32, its quantization_config asks for torch\.bfloat16"),
        (_cut, rf"'{TO_Q}\.weight' has shape \(24, 3\)"),
        (lambda values: values.pop(f"{TO_Q}.input_scale"), rf"lacks 1 tensors: '{TO_Q}\.input_scale'"),
        (lambda values: values.pop("proj_out.weight"), r"lacks 1 tensors: 'proj_out\.weight'"),
        (lambda values: values.update(surplus=torch.ones(1)), r"does not describe, 1 tensors: 'surplus'"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_found(wan_folder: Path, tmp_path: Path, edit: Edit, message: str) -> None:
    folder = damage(wan_folder, tmp_path / "damaged", tensors=edit)
    with pytest.raises(CheckpointError, match=message):
        WanTransformer3DModel.from_pretrained(folder)


def _rename(config: dict[str, Any]) -> None:
    group = next(group for group in config["config_groups"].values() if TO_Q in group["targets"])
    group["targets"][group["targets"].index(TO_Q)] = "blocks.0.attn1.to_p"
    config["checksums"]["blocks.0.attn1.to_p"] = config["checksums"][TO_Q]


def _norm(config: dict[str, Any]) -> None:
    config["config_groups"]["group_0"]["targets"].append("blocks.0.attn1.norm_q")
    config["checksums"]["blocks.0.attn1.norm_q"] = "0"


def _drop(config: dict[str, Any]) -> None:
    for group in config["config_groups"].values():
        group["targets"] = [name for name in group["targets"] if name != TO_Q]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("config_groups"), "lacks 'config_groups'"),
        (lambda c: c.pop("format_version"), "lacks 'format_version'"),
        (lambda c: c.pop("checksums"), "lacks 'checksums'"),
        (lambda c: c.update(format_version=2), "format_version 2, this reelquant reads 1"),
        (lambda c: c.update(novel=1), "settings novel, .* written by this version: it is damaged"),
        (lambda c: c.update(ignore="proj_out"), "ignore must be a list"),
        (lambda c: c["checksums"].pop(TO_Q), f"no checksum for layer '{TO_Q}'"),
        (lambda c: c["config_groups"]["group_0"].pop("weights"), "group_0 is damaged: KeyError"),
        (lambda c: c["config_groups"]["group_0"].update(novel=1), "unknown keys \\['novel'\\]"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(format="int99"), "int99"),
        (lambda c: c["config_groups"]["group_1"]["targets"].append(c["config_groups"]["group_0"]["targets"][0]), "a second time"),
        (lambda c: c["slots"].update(timesteps=[1.0, 2.0]), "parameters for 3 denoising steps, quantization_config.slots lists 2"),
        (lambda c: c.update(slots={"timesteps": None}), "slots is damaged"),
        (_rename, "no layer 'blocks.0.attn1.to_p'; did you mean"),
        (_norm, "'blocks.0.attn1.norm_q', which is of type RMSNorm"),
        (_drop, "does not describe"),
    ],
)  # fmt: skip
def test_damaged_configs_are_found(wan_folder: Path, tmp_path: Path, edit: Edit, message: str) -> None:
    folder = damage(wan_folder, tmp_path / "damaged", config=edit)
    with pytest.raises(CheckpointError, match=message):
        WanTransformer3DModel.from_pretrained(folder)


def test_what_a_newer_version_adds_to_the_config_is_kept(wan_folder: Path, tmp_path: Path) -> None:
    folder = damage(wan_folder, tmp_path / "newer", config=lambda c: c.update(novel={"a": 1}, tool_version="99.0"))
    with remarks() as told:
        loaded = WanTransformer3DModel.from_pretrained(folder)
    assert "has the settings novel, which" in told[0] and "reelquant 99.0" in told[0]
    assert loaded.hf_quantizer.quantization_config.to_dict()["novel"] == {"a": 1}


def test_a_quantized_layer_is_found_by_its_base_class(shared_wan: nn.Module) -> None:
    assert issubclass(QuantLinear, QuantLayer)
    assert isinstance(shared_wan.blocks[0].ffn.net[2], nn.Linear)
