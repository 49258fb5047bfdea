"""Adapters: beside quantized layers, merged before quantizing, and refused where they would be lost."""

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
import torch.nn.functional as F
from peft import LoKrConfig, LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import reelquant
from reelquant import CalibrationError, CheckpointError, RecipeError, UnsupportedError
from reelquant.cli import app
from reelquant.kernels.cpu import int8
from reelquant.models.lora import LoraFiles, adapter_file, parse_adapters, short_names
from reelquant.nn import QuantConv2d, QuantLayer, QuantLinear, get_module
from tests.tiny.bundled import (
    CALL,
    OFFLOAD,
    PIPELINES,
    PROMPT,
    RECIPE,
    cases,
    denoiser,
    expected,
    folder,
    is_expected,
    latents,
    opened,
    quantized,
)
from tests.tiny.stock import Bare, realigned

TARGETS = {  # Linear layers of every kind of kernel, and convolutions
    "tiny-dit": ["attn1.to_q", "attn1.to_v", "attn2.to_k", "net.0.proj", "net.2"],
    "tiny-unet": ["attn1.to_q", "attn1.to_v", "attn2.to_k", "net.2", "resnets.0.conv1", "conv_shortcut"],
}
PARTS = {"tiny-dit": "transformer", "tiny-unet": "unet"}
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # peft, about several adapters in one model
RANK, WEIGHTS = 4, "pytorch_lora_weights.safetensors"


@functools.cache
def stock(name: str) -> Any:
    """The float pipeline; tests must not change it."""
    pipe = reelquant.open_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def factors(name: str, seed: int = 0, size: float = 0.05, targets: list[str] | None = None) -> dict[str, Tensor]:
    """Both factors of an adapter by the name of the layer's tensor, for every layer that ends like a target."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for layer, module in denoiser(stock(name)).named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and layer.endswith(tuple(targets or TARGETS[name])):
            out, ins, *window = module.weight.shape
            found[f"{layer}.lora_A.weight"] = torch.randn(RANK, ins, *window, generator=generator) * ins**-0.5
            found[f"{layer}.lora_B.weight"] = torch.randn(out, RANK, *[1] * len(window), generator=generator) * size
    return found


def written(path: Path, name: str, tensors: dict[str, Tensor]) -> Path:
    """A file as diffusers writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{PARTS[name]}.{key}": value for key, value in tensors.items()}, path)
    return path


@pytest.fixture
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name = request.getfixturevalue("name")
    return written(tmp_path / WEIGHTS, name, factors(name))


def wrappers(model: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)}


def branch(tensors: dict[str, Tensor], layer: str, module: Any, x: Tensor) -> Tensor:
    """What an adapter adds to a layer's output, written out."""
    down, up = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
    if isinstance(module, nn.Conv2d):
        return F.conv2d(F.conv2d(x, down, None, module.stride, module.padding), up)
    return x @ down.T @ up.T


# ------------------------------------------------------------------------------------------------------ beside quantized layers


@pytest.mark.parametrize("prepared", [False, True], ids=["before the first run", "after a run"])
@pytest.mark.parametrize("name", PIPELINES)
def test_an_adapter_adds_its_branch_to_every_layer(name: str, prepared: bool, file: Path) -> None:
    pipe, seen = opened(name), set()
    if prepared:
        latents(pipe, num_inference_steps=1)
    pipe.load_lora_weights(str(file), adapter_name="style")
    found = wrappers(denoiser(pipe))
    kinds = {type(wrapper.base_layer) for wrapper in found.values()}
    assert kinds == ({QuantLinear} if name == "tiny-dit" else {QuantLinear, QuantConv2d})
    pipe.set_adapters("style", 0.5)
    tensors = factors(name)

    def check(layer: str, module: Any, args: Any, output: Tensor) -> None:
        seen.add(layer)
        base, x = module.base_layer, args[0]
        torch.testing.assert_close(output, base(x) + 0.5 * branch(tensors, layer, base, x), rtol=1e-4, atol=1e-4)

    handles = [wrapper.register_forward_hook(functools.partial(check, layer)) for layer, wrapper in found.items()]
    changed = latents(pipe)
    for handle in handles:
        handle.remove()
    assert set(seen) == set(found) and not torch.equal(changed, expected(name))
    pipe.disable_lora()
    assert is_expected(latents(pipe), name)
    pipe.enable_lora()
    assert torch.equal(latents(pipe), changed)
    pipe.unload_lora_weights()
    assert not wrappers(denoiser(pipe))
    assert is_expected(latents(pipe), name)


@pytest.mark.parametrize("name", PIPELINES)
def test_adapters_are_weighed_deleted_and_swapped(name: str, file: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other" / WEIGHTS, name, factors(name, seed=1))
    pipe, fresh = opened(name), opened(name)
    pipe.load_lora_weights(str(file), adapter_name="a")
    first = latents(pipe)
    pipe.load_lora_weights(str(other), adapter_name="b")
    pipe.set_adapters(["a", "b"], [1.0, 0.0])
    assert torch.equal(latents(pipe), first)
    pipe.delete_adapters("b")
    assert torch.equal(latents(pipe), first)
    pipe.load_lora_weights(str(other), adapter_name="a", hotswap=True)
    fresh.load_lora_weights(str(other), adapter_name="a")
    assert torch.equal(latents(pipe), latents(fresh))


@pytest.mark.parametrize(("name", "mode"), cases(OFFLOAD))
def test_adapters_go_with_every_way_to_offload(name: str, mode: str, file: Path) -> None:
    pipe = opened(name)
    pipe.load_lora_weights(str(file), adapter_name="style")
    realigned(denoiser(pipe))
    changed = latents(pipe)
    OFFLOAD[mode](pipe, denoiser(pipe))
    assert torch.equal(latents(pipe), changed)


def test_a_model_with_adapters_compiles_whole(tmp_path: Path) -> None:
    pipe = opened("tiny-dit")
    pipe.transformer.blocks = pipe.transformer.blocks[:2]  # the others are alike
    tensors = {key: value for key, value in factors("tiny-dit").items() if key.startswith(("blocks.0.", "blocks.1."))}
    pipe.load_lora_weights(str(written(tmp_path / WEIGHTS, "tiny-dit", tensors)), adapter_name="style")
    model, call = denoiser(pipe), Bare(denoiser(stock("tiny-dit"))).arguments | {"return_dict": False}
    torch._dynamo.reset()
    with torch.no_grad():
        expected_output = model(**call)[0]
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**call)[0], expected_output, rtol=1e-4, atol=1e-4)


def test_an_adapter_keeps_what_is_smaller_than_half_a_step() -> None:
    """No weight would be rounded to another code; beside the layer every bit of the delta counts."""
    model = copy.deepcopy(denoiser(quantized("tiny-dit")))
    layer = model.blocks[0].attn1.to_q
    x, step = torch.randn(64, layer.in_features), layer.weight_scale.float().min()
    model.add_adapter(LoraConfig(r=RANK, target_modules=["blocks.0.attn1.to_q"]))
    down, up = (getattr(model.blocks[0].attn1.to_q, kind)["default"].weight for kind in ("lora_A", "lora_B"))
    nn.init.normal_(up)
    wrapper = model.blocks[0].attn1.to_q
    with torch.no_grad():
        up.mul_(0.1 * step / (up @ down * wrapper.scaling["default"]).abs().max())
        delta = up @ down * wrapper.scaling["default"]
        assert delta.abs().max() < 0.5 * step
        quantizer = layer.packed.quantizer
        weight = layer.packed.dequantize()
        assert torch.equal(quantizer(weight + delta), weight)  # fused and rounded, nothing of it would be left
        added = wrapper(x) - layer(x)
        torch.testing.assert_close(added, x @ delta.T, rtol=1e-3, atol=1e-6 * float(layer(x).abs().max()) * 8)


def test_an_adapter_on_a_temporal_layer_is_not_lost_in_a_table(caplog: pytest.LogCaptureFixture) -> None:
    """A table holds the outputs of the last temporal layers: an adapter on the first would never be seen."""
    pipe = opened("tiny-dit")
    tensors = {f"condition_embedder.time_embedder.linear_1.{key}": value for key, value in _pair(pipe).items()}
    with caplog.at_level(logging.WARNING, logger="reelquant"):
        pipe.transformer.load_lora_adapter(tensors, prefix=None, adapter_name="time")
        changed = latents(pipe)
    assert "adapter" in caplog.text
    assert (changed - expected("tiny-dit")).abs().max() > 0.01 * expected("tiny-dit").abs().max()
    pipe.transformer.unload_lora()
    assert is_expected(latents(pipe), "tiny-dit")
    written_beside = {f"blocks.0.attn1.to_q.{key}": value for key, value in _pair(pipe, "blocks.0.attn1.to_q").items()}
    pipe.transformer.load_lora_adapter(written_beside, prefix=None, adapter_name="main")
    latents(pipe)
    assert not pipe.transformer.reelquant_clock.adapted


def _pair(pipe: Any, layer: str = "condition_embedder.time_embedder.linear_1") -> dict[str, Tensor]:
    module = get_module(pipe.transformer, layer)
    return {"lora_A.weight": torch.randn(RANK, module.in_features), "lora_B.weight": torch.randn(module.out_features, RANK) * 0.1}


# ----------------------------------------------------------------------------------------------------------------- fusing, saving


@pytest.mark.parametrize("name", PIPELINES)
def test_nothing_is_fused_into_quantized_weights(name: str, file: Path) -> None:
    pipe = opened(name)
    pipe.load_lora_weights(str(file), adapter_name="style")
    changed = latents(pipe)
    found = wrappers(denoiser(pipe))
    attempts: list[Callable[[], Any]] = [
        lambda: pipe.fuse_lora(),
        lambda: pipe.fuse_lora(lora_scale=0.5, safe_fusing=True),
        *(functools.partial(wrapper.merge, safe_merge=safe) for wrapper in found.values() for safe in (False, True)),
    ]
    for attempt in attempts:
        with pytest.raises(UnsupportedError, match=r"Leave them loaded.*merge them before quantizing"):
            attempt()
    assert torch.equal(latents(pipe), changed)
    with pytest.warns(UserWarning, match="Already unmerged"):
        pipe.unfuse_lora()
    assert torch.equal(latents(pipe), changed)


def test_other_kinds_of_adapters_run_and_are_not_fused_either() -> None:
    model = copy.deepcopy(denoiser(quantized("tiny-dit")))
    x = torch.randn(3, model.blocks[0].attn1.to_q.in_features)
    before = model.blocks[0].attn1.to_q(x)
    model.add_adapter(LoKrConfig(r=2, target_modules=["attn1.to_q"], init_weights=False))
    wrapper = model.blocks[0].attn1.to_q
    with torch.no_grad():
        torch.testing.assert_close(wrapper(x), before + x @ wrapper.get_delta_weight("default").T)
    for safe in (False, True):
        with pytest.raises(UnsupportedError, match="not fused"):
            wrapper.merge(safe_merge=safe)


@pytest.mark.parametrize("targets", [["attn1.to_q"], ["conv1"]])
def test_an_adapter_that_needs_the_float_weight_is_refused(targets: list[str]) -> None:
    model = denoiser(opened("tiny-unet"))
    with pytest.raises(UnsupportedError, match=r"DoraLinear|DoraConv2d"):
        model.add_adapter(LoraConfig(r=RANK, target_modules=targets, use_dora=True))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_not_saved_with_its_adapters(name: str, file: Path, tmp_path: Path) -> None:
    pipe = opened(name)
    pipe.load_lora_weights(str(file), adapter_name="style")
    with pytest.raises(UnsupportedError, match=r"unload_lora_weights\(\)"):
        reelquant.save(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnsupportedError, match="unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "stock")
    tensors = get_peft_model_state_dict(denoiser(pipe), adapter_name="style")
    type(pipe).save_lora_weights(tmp_path / "adapter", **{f"{PARTS[name]}_lora_layers": tensors})
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    assert saved.keys() == {f"{PARTS[name]}.{key}" for key in factors(name)}
    assert all(torch.equal(saved[f"{PARTS[name]}.{key}"], value) for key, value in factors(name).items())
    pipe.unload_lora_weights()
    reelquant.save(pipe, tmp_path / "out")
    weights = f"{PARTS[name]}/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (folder(name) / weights).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------- training


def gradients(model: Any, call: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**call)[0].square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted(model: Any, targets: list[str]) -> Any:
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False))
    return realigned(model)


@pytest.mark.parametrize("name", PIPELINES)
def test_gradients_are_those_of_the_float_model_with_the_same_weights(name: str) -> None:
    """Inputs are not rounded in this recipe, so only the order of sums differs; every layer passes gradients on."""
    pipe = reelquant.open_pipeline(name)
    reelquant.quantize(pipe, "w8a16")
    model = denoiser(pipe)
    twin = copy.deepcopy(model)
    twin.dequantize()
    call = Bare(stock_denoiser := denoiser(stock(name))).arguments | {"return_dict": False}
    assert not any(parameter.grad is not None for parameter in stock_denoiser.parameters())
    found, wanted = gradients(adapted(model, TARGETS[name]), call), gradients(adapted(twin, TARGETS[name]), call)
    assert len(found) == 2 * len(wrappers(model))
    for key, value in wanted.items():
        assert (found[key] - value).norm() <= 1e-3 * value.norm()


@pytest.mark.parametrize("name", PIPELINES)
def test_adapters_train_beside_layers_that_round_their_inputs(name: str) -> None:
    model = adapted(denoiser(opened(name)), TARGETS[name])
    call = Bare(denoiser(stock(name))).arguments | {"return_dict": False}
    evaluated = {key: value.clone() for key, value in gradients(model, call).items()}
    model.train()  # other memory, another ulp of an activation, and without oneDNN's integer products codes turn
    found = {key: value.clone() for key, value in gradients(model, call).items()}
    assert all(value.abs().sum() > 0 for value in found.values())
    model.enable_gradient_checkpointing()
    again = gradients(model, call)
    assert all((again[key] - value).norm() <= 1e-2 * value.norm() for key, value in found.items())
    for key, value in evaluated.items() if int8.available() is None else ():
        assert (again[key] - value).norm() <= 1e-2 * value.norm()
    assert model.hf_quantizer.is_trainable


# ------------------------------------------------------------------------------------------------------- merging before quantizing


def fused(name: str, adapters: dict[Path, float]) -> dict[str, Tensor]:
    """The float denoiser's tensors as stock diffusers fuses them."""
    pipe = copy.deepcopy(stock(name))
    names = [f"a{i}" for i in range(len(adapters))]
    for one, path in zip(names, adapters, strict=True):
        pipe.load_lora_weights(str(path), adapter_name=one)
    pipe.set_adapters(names, list(adapters.values()))
    pipe.fuse_lora(adapter_names=names)
    pipe.unload_lora_weights()
    return denoiser(pipe).state_dict()


def assert_merges_like_stock(name: str, adapters: dict[Path, float]) -> int:
    """How many tensors are changed."""
    files, state = LoraFiles(stock(name), {str(path): scale for path, scale in adapters.items()}), denoiser(stock(name)).state_dict()
    for key, value in fused(name, adapters).items():
        merged = files.merged(PARTS[name], key, state[key])
        torch.testing.assert_close(merged, value, rtol=1e-6, atol=1e-6)
        assert torch.equal(merged, state[key]) == (key not in files.tensors(PARTS[name]))
    return len(files.tensors(PARTS[name]))


@pytest.mark.parametrize("name", PIPELINES)
def test_files_are_merged_as_diffusers_fuses_them(name: str, file: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other" / WEIGHTS, name, factors(name, seed=1, targets=["attn1.to_q", "attn1.to_out.0"]))
    layers = {key.rpartition(".lora_")[0] for key in factors(name) | factors(name, targets=["attn1.to_q", "attn1.to_out.0"])}
    assert assert_merges_like_stock(name, {file: 0.8, other: -0.5}) == len(layers)


def test_metadata_and_magnitudes_count(tmp_path: Path) -> None:
    """Alpha is written in the metadata; DoRA cannot run beside quantized layers, and can be merged."""
    model = copy.deepcopy(denoiser(stock("tiny-dit")))
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=3 * RANK, target_modules=["to_q"], use_dora=True, init_lora_weights=False), "style")
    model.save_lora_adapter(tmp_path, adapter_name="style")
    saved = load_file(tmp_path / WEIGHTS)
    from diffusers import WanPipeline

    metadata = {"r": RANK, "lora_alpha": 3 * RANK, "target_modules": ["to_q"], "use_dora": True}
    WanPipeline.save_lora_weights(tmp_path / "pipe", transformer_lora_layers=saved, transformer_lora_adapter_metadata=metadata)
    assert assert_merges_like_stock("tiny-dit", {tmp_path / "pipe" / WEIGHTS: 1.0}) == len(saved) // 3


def test_names_of_kohya_are_understood(tmp_path: Path) -> None:
    """musubi-tuner, and sd-scripts with an adapter of the text encoder in the same file."""
    names = {"self_attn": "attn1", "cross_attn": "attn2"}
    tensors = {}
    for key, value in factors("tiny-dit", targets=["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]).items():
        layer, _, kind = key.removesuffix(".weight").rpartition(".")
        for theirs, ours in names.items():
            layer = layer.replace(ours, theirs)
        for theirs, ours in {"_o": ".to_out.0", "_q": ".to_q", "_k": ".to_k", "_v": ".to_v", "_0": ".net.0.proj", "_2": ".net.2"}.items():
            layer = layer.removesuffix(ours) + (theirs if layer.endswith(ours) else "")
        stem = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{stem}.lora_{'down' if kind == 'lora_A' else 'up'}.weight"] = value
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "musubi.safetensors")
    assert assert_merges_like_stock("tiny-dit", {tmp_path / "musubi.safetensors": 0.7}) == len(tensors) // 3

    tensors = {}
    for key, value in factors("tiny-unet", targets=["attn1.to_q", "attn2.to_k"]).items():
        layer, _, kind = key.removesuffix(".weight").rpartition(".")
        if "motion_modules" not in layer:
            stem = "lora_unet_" + layer.replace(".", "_")
            tensors[f"{stem}.lora_{'down' if kind == 'lora_A' else 'up'}.weight"] = value
            tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "sd.safetensors")
    assert assert_merges_like_stock("tiny-unet", {tmp_path / "sd.safetensors": 0.7}) == len(tensors) // 3


def test_text_encoders_get_their_part_of_a_file(tmp_path: Path) -> None:
    """As sd-scripts writes it: denoiser and text encoder in one file."""
    width, layer = stock("tiny-unet").text_encoder.config.hidden_size, "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    channels = get_module(stock("tiny-unet").unet, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q").in_features
    stems = {f"lora_unet_{layer}": channels, "lora_te_text_model_encoder_layers_0_self_attn_out_proj": width}
    tensors = {}
    for stem, size in stems.items():
        tensors |= {f"{stem}.lora_down.weight": torch.randn(RANK, size), f"{stem}.lora_up.weight": torch.randn(size, RANK)}
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "sd.safetensors")
    files = LoraFiles(stock("tiny-unet"), {str(tmp_path / "sd.safetensors"): 0.5})
    assert len(files.tensors("unet")) == 1
    (name,) = files.tensors("text_encoder")
    weight = stock("tiny-unet").text_encoder.get_parameter(name)
    delta = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"] * 2 / RANK
    torch.testing.assert_close(files.merged("text_encoder", name, weight), weight + 0.5 * delta)


def test_pairs_that_fit_no_layer_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = factors("tiny-dit", targets=["attn1.to_q", "attn1.to_v"])
    LoraFiles(stock("tiny-dit"), {str(written(tmp_path / "all.safetensors", "tiny-dit", good)): 1.0})
    assert not [record for record in caplog.records if record.name.startswith("reelquant")]
    more = {key.replace("blocks.", "blocks.9"): value.clone() for key, value in good.items()}
    LoraFiles(stock("tiny-dit"), {str(written(tmp_path / "half.safetensors", "tiny-dit", good | more)): 1.0})
    (record,) = [record for record in caplog.records if record.name.startswith("reelquant")]
    assert f"{len(good) // 2} of {len(good)} pairs are used, the others fit no layer of WanPipeline" in record.getMessage()
    report = reelquant.quantize(reelquant.open_pipeline("tiny-dit"), "w8a16", lora={str(tmp_path / "half.safetensors"): 1.0})
    assert report.warnings == [record.getMessage()]  # logged once in a process, and in every report
    reelquant.open_pipeline("tiny-dit").save_pretrained(tmp_path / "float")
    report = reelquant.quantize_folder(tmp_path / "float", tmp_path / "out", "w8a16", lora={str(tmp_path / "half.safetensors"): 1.0})
    assert report.warnings == [record.getMessage()]


def test_biases_of_adapters_are_merged(tmp_path: Path) -> None:
    tensors = factors("tiny-dit", targets=["blocks.0.attn1.to_q"])
    bias = torch.randn(len(tensors["blocks.0.attn1.to_q.lora_B.weight"]))
    path = written(tmp_path / WEIGHTS, "tiny-dit", tensors | {"blocks.0.attn1.to_q.lora_B.bias": bias})
    assert assert_merges_like_stock("tiny-dit", {path: 0.5}) == 2


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_bias_for_a_layer_without_one_is_refused(tmp_path: Path) -> None:
    tensors = factors("tiny-unet", targets=["attn1.to_q"])
    bias = {key.replace("weight", "bias"): torch.ones(len(value)) for key, value in tensors.items() if "lora_B" in key}
    layer = next(iter(tensors)).partition(".lora_")[0]
    files = LoraFiles(stock("tiny-unet"), {str(written(tmp_path / WEIGHTS, "tiny-unet", tensors | bias)): 1.0})
    with pytest.raises(CheckpointError, match=f"cannot be merged into 'unet.{layer}': .*bias"):
        files.merged("unet", f"{layer}.weight", get_module(stock("tiny-unet").unet, layer).weight)


def test_small_deltas_survive_merging_on_average_where_a_fused_one_would_vanish() -> None:
    """Float weights lie anywhere between two codes: a delta of a tenth of a step moves a tenth of them to the next one."""
    weight, generator = denoiser(stock("tiny-dit")).blocks[0].ffn.net[0].proj.weight.detach(), torch.Generator().manual_seed(0)
    step = weight.abs().amax(1, keepdim=True) / 127
    delta = 0.1 * step * torch.randn(weight.shape, generator=generator).sign()

    def rounded(values: Tensor) -> Tensor:
        return (values / step).round() * step

    def survival(before: Tensor, after: Tensor) -> float:
        return float(((after - before) * delta).sum() / delta.square().sum())

    assert survival(rounded(weight), rounded(rounded(weight) + delta)) == 0
    assert survival(rounded(weight), rounded(weight + delta)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", PIPELINES)
def test_quantizing_with_an_adapter_is_quantizing_the_fused_pipeline(name: str, file: Path, tmp_path: Path) -> None:
    pipes = [copy.deepcopy(stock(name)) for _ in range(2)]
    report = reelquant.quantize(pipes[0], "w8a16", lora={str(file): 0.5})
    assert report.adapters == {WEIGHTS: 0.5}
    denoiser(pipes[1]).load_state_dict(fused(name, {file: 0.5}))
    reelquant.quantize(pipes[1], "w8a16")
    for a, b in zip(denoiser(pipes[0]).state_dict().values(), denoiser(pipes[1]).state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_run_that_fails_leaves_the_float_weights_as_they_were(name: str, file: Path) -> None:
    pipe = copy.deepcopy(stock(name))
    before = copy.deepcopy(denoiser(pipe).state_dict())
    with pytest.raises(CalibrationError, match="divisible by"):  # the pipeline's own words
        reelquant.quantize(pipe, RECIPE, PROMPT, lora={str(file): 1.0}, overrides={"calibrate.prompts": 1}, height=7, **CALL)
    assert not any(isinstance(part, QuantLayer | BaseTunerLayer) for part in denoiser(pipe).modules())
    assert all(torch.equal(before[key], value) for key, value in denoiser(pipe).state_dict().items())


def test_a_pipeline_with_adapters_beside_its_layers_is_not_quantized(tmp_path: Path) -> None:
    pipe = copy.deepcopy(stock("tiny-dit"))
    pipe.load_lora_weights(str(written(tmp_path / WEIGHTS, "tiny-dit", factors("tiny-dit"))), adapter_name="style")
    with pytest.raises(UnsupportedError, match=r"'style' is loaded into 'transformer'.*unload_lora_weights"):
        reelquant.quantize(pipe, "w8a16")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    reelquant.quantize(pipe, "w8a16")


def test_the_command_line_merges_adapters(tmp_path: Path) -> None:
    path = written(tmp_path / "style.safetensors", "tiny-dit", factors("tiny-dit"))
    command = ["quantize", "tiny-dit", "-r", "w8a16", "-o", str(tmp_path / "out"), "--lora", f"{path}:0.5"]
    refused = CliRunner().invoke(app, [*command, "--gate", "default"])
    assert refused.exit_code == 2 and not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "report.json").read_text())["adapters"] == {"style.safetensors": 0.5}
    pipe = copy.deepcopy(stock("tiny-dit"))
    reelquant.quantize(pipe, "w8a16", lora=[f"{path}:0.5"])
    loaded = reelquant.load(tmp_path / "out").transformer.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in pipe.transformer.state_dict().items())


def test_adapters_are_parsed() -> None:
    assert parse_adapters({"a.safetensors": 2, Path("b.safetensors"): 0.5}) == {"a.safetensors": 2.0, "b.safetensors": 0.5}  # type: ignore[dict-item]
    assert parse_adapters("C:/a.safetensors") == {"C:/a.safetensors": 1.0}
    assert parse_adapters(["a.safetensors:-0.5", "transformer_2=b.st"]) == {"a.safetensors": -0.5, "transformer_2=b.st": 1.0}
    assert parse_adapters(Path("a.safetensors")) == parse_adapters([Path("a.safetensors")]) == {"a.safetensors": 1.0}
    for wrong, why in (
        (["a.safetensors:x"], "not a number"), ({"a": "strong"}, "'a' is 'strong', which is not a number"), ({"a": None}, "not a number"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=why):
            parse_adapters(wrong)  # type: ignore[arg-type]
    for wrong, why in ((["a:nan"], "finite"), (["a:1", "a:2"], "twice")):
        with pytest.raises(RecipeError, match=why):
            parse_adapters(wrong)


def test_equals_signs_of_a_path_are_no_component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("lr=1e-4/style.safetensors")
    path.parent.mkdir()
    path.touch()
    assert adapter_file(str(path)) == ("", path) and adapter_file(str(path.absolute())) == ("", path.absolute())
    assert adapter_file(f"transformer={path}") == ("transformer", path)


def test_reports_name_every_adapter() -> None:
    assert short_names({"a/x.st": 1.0, "transformer_2=b/x.st": 2.0}) == {"x.st": 1.0, "transformer_2=x.st": 2.0}
    assert short_names({"c/a/x.st": 1.0, "b/x.st": 2.0}) == {"a/x.st": 1.0, "b/x.st": 2.0}
    assert short_names({"c/a/x.st": 1.0, "d/a/x.st": 2.0}) == {"c/a/x.st": 1.0, "d/a/x.st": 2.0}


def test_bad_files_get_one_clear_error_and_change_nothing(tmp_path: Path) -> None:
    good = factors("tiny-dit", targets=["blocks.0.attn1.to_q"])
    layer = "blocks.0.attn1.to_q.lora_"
    wrong_rank = good | {f"{layer}A.weight": torch.zeros(RANK, 7)}
    cases: dict[str, tuple[Path | str, type[Exception], str]] = {
        "missing": (tmp_path / "none.safetensors", CheckpointError, "no adapter at"),
        "pickled": (tmp_path / "lora.bin", CheckpointError, "pickled"),
        "truncated": (tmp_path / "cut.safetensors", CheckpointError, "cannot read adapter"),
        "other shape": (written(tmp_path / "shape.safetensors", "tiny-dit", wrong_rank), CheckpointError, "cannot read adapter"),
        "other model": (written(tmp_path / "unet.safetensors", "tiny-unet", factors("tiny-unet")), CheckpointError, "another model"),
        "other component": (f"transformer_2={written(tmp_path / 'x.safetensors', 'tiny-dit', good)}", RecipeError, "transformer_2"),
    }
    (tmp_path / "lora.bin").write_bytes(b"x")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "shape.safetensors").read_bytes()[:200])
    for source, error, why in cases.values():
        with pytest.raises(error, match=why):
            LoraFiles(stock("tiny-dit"), {str(source): 1.0})
    broken = written(tmp_path / "nan.safetensors", "tiny-dit", good | {f"{layer}A.weight": good[f"{layer}A.weight"] * torch.nan})
    files = LoraFiles(stock("tiny-dit"), {str(broken): 1.0})
    with pytest.raises(CheckpointError, match="not finite"):
        files.merged("transformer", "blocks.0.attn1.to_q.weight", stock("tiny-dit").transformer.blocks[0].attn1.to_q.weight)
    with pytest.raises(UnsupportedError, match="no loader of adapters"):
        LoraFiles(Bare(denoiser(stock("tiny-dit"))), {str(broken): 1.0})
    assert not wrappers(denoiser(stock("tiny-dit")))


def test_a_second_expert_has_adapters_of_its_own(tmp_path: Path) -> None:
    """Wan 2.2: a file is for one of the two denoisers."""
    from diffusers import WanPipeline

    pipe = stock("tiny-dit")
    two = WanPipeline(**pipe.components | {"transformer_2": copy.deepcopy(pipe.transformer)}, boundary_ratio=0.5)
    path = written(tmp_path / WEIGHTS, "tiny-dit", factors("tiny-dit"))
    files = LoraFiles(two, [f"transformer_2={path}:0.5"])
    assert not files.tensors("transformer") and files.tensors("transformer_2")
