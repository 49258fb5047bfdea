"""What users of diffusers do with any pipeline, done with quantized ones: same outputs as in memory, or one sentence that says no."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from diffusers import DiffusionPipeline, WanPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

import reelquant
from reelquant import UnsupportedError
from reelquant.models.sampling import call_arguments
from reelquant.nn import quantized_layers
from tests import processes
from tests.tiny import bundled
from tests.tiny.bundled import CPU, NAMES, OFFLOAD, PIPELINES, Mode, denoiser, expected, folder, is_expected, latents, opened, quantized
from tests.tiny.stock import realigned


def tiled(pipe: Any, model: Any) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()


MODES: dict[str, Mode] = {
    **OFFLOAD,
    "dispatched": lambda pipe, model: dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True),
    "pipe.to": lambda pipe, model: pipe.to("cpu"),
    "tiled and sliced vae": tiled,
    "reset attention": lambda pipe, model: model.set_attn_processor(copy.deepcopy(next(iter(model.attn_processors.values())))),
    "shared memory": lambda pipe, model: model.share_memory(),
}


@pytest.mark.parametrize(("name", "mode"), bundled.cases(MODES))
def test_a_loaded_pipeline_gives_what_the_one_in_memory_gave(name: str, mode: str) -> None:
    """Kernels hold the weights already when the mode is switched on."""
    pipe = opened(name)
    latents(pipe, num_inference_steps=1)
    MODES[mode](pipe, denoiser(pipe))
    assert is_expected(latents(pipe), name)


@pytest.mark.parametrize("mode", OFFLOAD)
def test_offloading_that_is_switched_on_before_the_first_run_gives_the_same(mode: str) -> None:
    pipe = opened("tiny-dit")
    MODES[mode](pipe, denoiser(pipe))
    for _ in range(2):
        assert is_expected(latents(pipe), "tiny-dit")


@pytest.mark.parametrize("name", PIPELINES)
def test_sequential_offload_keeps_nothing_of_what_it_moved_away(name: str) -> None:
    """Kernels hold repacked weights; those of layers whose weights are on the meta device go when the next layer runs."""
    pipe = opened(name)
    model = denoiser(pipe)
    cpu_offload(model, CPU, offload_buffers=True)
    latents(pipe)
    held = [layer for layer in quantized_layers(model).values() if layer.residency.current is not None]
    assert len(held) <= 1
    assert all(layer.weight.device.type == "meta" for layer in quantized_layers(model).values())


def test_an_offloaded_model_is_saved_once_its_weights_are_back(tmp_path: Path) -> None:
    pipe = opened("tiny-dit")
    cpu_offload(pipe.transformer, CPU, offload_buffers=True)
    latents(pipe)
    with pytest.raises(UnsupportedError, match="remove_all_hooks"):
        reelquant.save(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnsupportedError, match=r"layer '.*' is offloaded; .*remove_all_hooks.* before dequantizing"):
        pipe.transformer.dequantize()
    pipe.remove_all_hooks()
    remove_hook_from_module(pipe.transformer, recurse=True)
    reelquant.save(pipe, tmp_path / "out")
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (folder("tiny-dit") / name).read_bytes()


class Swapped:
    """Group offloading with streams as it moves a layer: ``.data`` of the same parameter, between memory that it keeps and fresh memory."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.kept = {parameter: parameter.data.clone() for parameter in layer.parameters()}
        self.offload()

    def onload(self) -> None:
        for parameter in self.layer.parameters():
            parameter.data = self.kept[parameter].clone()

    def offload(self) -> None:
        for parameter in self.layer.parameters():
            parameter.data = self.kept[parameter]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", ["attn1.to_q", "attn1.to_v", "attn1.to_k"])  # int8, int4, float inputs
def test_weights_that_are_swapped_behind_a_layers_back_are_found_again(kind: str, prepared: bool) -> None:
    """Also where what was kept is the placeholder of a weight that a kernel had taken over."""
    model = copy.deepcopy(denoiser(quantized("tiny-dit")))
    layer = model.get_submodule(f"blocks.0.{kind}")
    other, codes = model.get_submodule("blocks.1.attn1.to_q"), layer.codes.clone()
    x = torch.randn(4, layer.in_features)
    y = layer(x)
    if not prepared:
        layer.release()
    swapped = Swapped(layer)
    for _ in range(3):
        swapped.onload()
        assert torch.equal(layer(x), y)
        swapped.offload()
        other.release()
        other(x)  # the layer that is prepared next cleans up
        assert layer.residency.current is None
        assert torch.equal(layer.codes, codes)


def test_a_copied_placeholder_is_no_weight() -> None:
    """A parameter that was copied while a kernel held its weight, and put into another layer."""
    model = copy.deepcopy(denoiser(quantized("tiny-dit")))
    layer, twin = (model.get_submodule(f"blocks.{i}.attn1.to_q") for i in (0, 1))
    x = torch.randn(4, layer.in_features)
    layer(x)
    twin.release()
    twin.weight.data = layer.weight.data.clone()
    with pytest.raises(UnsupportedError, match="load the model again"):
        twin(x)
    with pytest.raises(UnsupportedError, match="load the model again"):
        model.state_dict()


def test_a_device_map_of_accelerate_opens_the_model() -> None:
    transformer = type(denoiser(opened("tiny-dit"))).from_pretrained(folder("tiny-dit") / "transformer", device_map="auto")
    pipe = bundled.quiet(DiffusionPipeline.from_pretrained(folder("tiny-dit"), transformer=transformer))
    assert is_expected(latents(pipe), "tiny-dit")


@pytest.mark.parametrize("name", ["tiny-dit", pytest.param("tiny-unet", marks=pytest.mark.full)])
def test_a_fresh_process_gives_the_same(name: str, tmp_path: Path) -> None:
    code = f"""
import torch, reelquant
from pathlib import Path
from diffusers import DiffusionPipeline, WanPipeline
from safetensors.torch import save_file
from tests.tiny.bundled import latents
pipe = DiffusionPipeline.from_pretrained({str(folder(name))!r}, dtype=torch.float32)  # its text encoder is stored in half precision
save_file({{"latents": latents(pipe)}}, {str(tmp_path / "latents.safetensors")!r})
"""
    processes.run(code)
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "latents.safetensors")["latents"], expected(name))


@pytest.mark.parametrize("name", PIPELINES)
def test_copies_of_pipelines_and_models_go_their_own_ways(name: str) -> None:
    pipe = opened(name)
    latents(pipe, num_inference_steps=1)
    twin = copy.deepcopy(pipe)
    denoiser(pipe).dequantize()
    assert not quantized_layers(denoiser(pipe))
    assert is_expected(latents(twin), name)
    assert is_expected(latents(copy.deepcopy(twin)), name)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_denoiser_serves_two_pipelines(name: str) -> None:
    pipe = opened(name)
    other = bundled.quiet(type(pipe)(**pipe.components))
    size = call_arguments(pipe) | bundled.CALL  # a pipeline put together by hand knows no recommendations of a folder
    assert is_expected(latents(other, **size), name)
    assert is_expected(latents(pipe), name)


def test_two_pipelines_in_one_process_do_not_meet() -> None:
    pipes = {name: opened(name) for name in NAMES}
    for name in (*NAMES, *NAMES):
        assert is_expected(latents(pipes[name]), name)


@pytest.mark.parametrize("name", PIPELINES)
def test_threads_that_share_a_denoiser_get_what_they_get_one_after_the_other(name: str) -> None:
    """Each at a step of its own: slots of scales and rows of tables are those of the thread's own call."""
    model = denoiser(opened(name))
    times = [float(time) for time in model.reelquant_clock.timesteps] + [500.0]
    calls = [inputs(model, name, time, seed) for seed in range(2) for time in times]
    model.reelquant_clock._told = True  # "timestep 500 is not in the table" is logged once, by the layer that runs first
    alone = [run(model, call) for call in calls]
    start = threading.Barrier(3)

    def work(number: int) -> list[Tensor]:
        start.wait()
        return [run(model, calls[i]) for i in range(number, len(calls), 3) for _ in range(2)]

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, range(3)))
    for number, outputs in enumerate(found):
        expected_here = [alone[i] for i in range(number, len(calls), 3) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected_here, strict=True))


def inputs(model: Any, name: str, time: float, seed: int) -> dict[str, Any]:
    from reelquant.discover import dummy_inputs

    made = dummy_inputs(model)
    latent = "hidden_states" if name == "tiny-dit" else "sample"
    noise = torch.randn(made[latent].shape, generator=torch.Generator().manual_seed(seed))
    return made | {latent: noise, "timestep": torch.full_like(torch.as_tensor(made["timestep"]), time), "return_dict": False}


@torch.no_grad()
def run(model: Any, call: dict[str, Any]) -> Tensor:
    return model(**call)[0]


@pytest.mark.parametrize("name", PIPELINES)
def test_one_graph_serves_all_steps(name: str) -> None:
    """Tables, per-step scales and steps that are in no table, compiled whole, once."""
    model = denoiser(opened(name))
    realigned(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    model.reelquant_clock._told = True
    times = [float(time) for time in model.reelquant_clock.timesteps] + [500.0]
    expected_outputs = [run(model, inputs(model, name, time, 0)) for time in times]
    run(compiled, inputs(model, name, times[0], 0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for time, output in zip(times, expected_outputs, strict=True):
            torch.testing.assert_close(run(compiled, inputs(model, name, time, 0)), output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_model_is_not_pickled(name: str, tmp_path: Path) -> None:
    pipe = opened(name)
    latents(pipe, num_inference_steps=1)
    for write in (pickle.dumps, copy.copy, lambda model: torch.save(model, tmp_path / "model.pt")):
        with pytest.raises(UnsupportedError, match="save_pretrained or reelquant"):
            write(next(iter(quantized_layers(denoiser(pipe)).values())))
    with pytest.raises(UnsupportedError, match="save_pretrained or reelquant"):
        pickle.dumps(denoiser(pipe))
    assert is_expected(latents(pipe), name)


@pytest.mark.parametrize("name", PIPELINES)
def test_state_dicts_hold_the_codes_also_while_a_kernel_owns_them(name: str) -> None:
    model, other = denoiser(opened(name)), denoiser(opened(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run(model, inputs(model, name, 500.0, 0) | {"return_dict": False})
    after = model.state_dict()
    assert all(torch.equal(before[key], value) for key, value in after.items())
    for value in other.state_dict().values():
        value.zero_()
    other.load_state_dict(after)
    torch.testing.assert_close(run(other, inputs(model, name, 500.0, 0)), run(model, inputs(model, name, 500.0, 0)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_casting_is_refused(name: str) -> None:
    pipe = opened(name)
    for cast in (denoiser(pipe).half, denoiser(pipe).bfloat16, lambda: denoiser(pipe).to(torch.bfloat16)):
        with pytest.raises(ValueError, match="quantized"):
            cast()
    assert is_expected(latents(pipe), name)


def test_a_cast_to_the_dtype_that_the_model_has_passes_and_changes_nothing() -> None:
    pipe = opened("tiny-dit")
    model = denoiser(pipe)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for cast in (model.float, lambda: model.to(torch.float32), lambda: model.to("cpu", torch.float32), lambda: model.to(dtype=model.dtype)):
        assert cast() is model
    assert all(value.dtype == before[key].dtype and torch.equal(value, before[key]) for key, value in model.state_dict().items())
    other = WanPipeline.from_pipe(pipe)
    assert is_expected(latents(other), "tiny-dit")
    twin = copy.deepcopy(model)
    assert twin.to(torch.float32) is twin, "the copy would answer with the model that it was copied from"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_image_adapters_are_loaded_beside_quantized_layers(dtype: torch.dtype) -> None:
    """diffusers casts the UNet to its own dtype in the end, which the adapter is then in."""
    pipe = reelquant.load(folder("tiny-unet"), dtype=dtype)
    unet = pipe.unet
    layers = {name: layer.weight.dtype for name, layer in quantized_layers(unet).items()}
    crossed = [name for name in unet.attn_processors if "attn2" in name and "motion_modules" not in name]
    width = unet.config.cross_attention_dim
    widths = {name: unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in crossed}
    state = {
        "image_proj": {
            "proj.weight": torch.randn(4 * width, 8), "proj.bias": torch.randn(4 * width),
            "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
        },
        "ip_adapter": {
            f"{2 * number + 1}.to_{part}_ip.weight": torch.randn(widths[name], width)
            for number, name in enumerate(crossed)
            for part in "kv"
        },
    }  # fmt: skip
    unet._load_ip_adapter_weights([state])
    assert {name: layer.weight.dtype for name, layer in quantized_layers(unet).items()} == layers
    assert {parameter.dtype for name, parameter in unet.named_parameters() if "_ip." in name or "encoder_hid" in name} == {dtype}
    embeds = [torch.randn(2, 1, 8, dtype=dtype)]
    call = call_arguments(pipe) | dict(num_inference_steps=1, num_frames=4, output_type="latent", ip_adapter_image_embeds=embeds)
    assert bool(bundled.quiet(pipe)("a red ball", **call).frames.isfinite().all())


@pytest.mark.parametrize("name", PIPELINES)
def test_fused_projections_are_refused_before_anything_changes(name: str) -> None:
    pipe = opened(name)
    with pytest.raises(UnsupportedError, match="stay apart"):
        denoiser(pipe).fuse_qkv_projections()
    assert is_expected(latents(pipe), name)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_dequantized_model_is_a_stock_one(name: str, tmp_path: Path) -> None:
    pipe = opened(name)
    model = denoiser(pipe)
    model.dequantize()
    assert not quantized_layers(model) and not model._forward_pre_hooks and not model._forward_hooks
    assert not {"fuse_lora", "fuse_qkv_projections"} & set(vars(model))
    latent = latents(pipe)
    if name == "tiny-unet":  # shifts folded into norms left biases that the stock architecture has no place for
        with pytest.raises(UnsupportedError, match=r"\d+ layers \('.*', '.*' \.\.\.\) .* have biases that quantization made"):
            reelquant.save(pipe, tmp_path / "float")
        assert not (tmp_path / "float").exists()
    else:
        reelquant.save(pipe, tmp_path / "float")
        assert torch.equal(latents(bundled.quiet(DiffusionPipeline.from_pretrained(tmp_path / "float"))), latent)
    model.to(torch.bfloat16)


@pytest.mark.parametrize("name", PIPELINES)
def test_shards_come_back(name: str, tmp_path: Path) -> None:
    reelquant.save(quantized(name), tmp_path / "out", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("*/*-of-*.safetensors"))) > 3
    opened = DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)  # its text encoder is stored in half precision
    assert torch.equal(latents(bundled.quiet(opened)), expected(name))


@pytest.mark.parametrize("name", PIPELINES)
def test_layerwise_casting_leaves_quantized_layers_alone(name: str) -> None:
    """Float layers are stored in float8, which costs what it costs a float model; codes, scales and biases stay."""
    pipe = opened(name)
    model = denoiser(pipe)
    before = {key: layer.state_dict() for key, layer in quantized_layers(model).items()}
    latents(pipe, num_inference_steps=1)
    kept = [layer.residency.current for layer in quantized_layers(model).values()]
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert latents(pipe, num_inference_steps=1).isfinite().all()
    for key, layer in quantized_layers(model).items():
        assert all(torch.equal(before[key][tensor], value) for tensor, value in layer.state_dict().items())
    assert [layer.residency.current for layer in quantized_layers(model).values()] != kept or kept


def test_attention_processors_of_the_user_are_used() -> None:
    pipe = opened("tiny-unet")
    seen: list[str] = []

    class Watching(AttnProcessor2_0):
        def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(type(attn.to_q).__name__)
            return super().__call__(attn, *args, **kwargs)

    pipe.unet.set_attn_processor(Watching())
    assert is_expected(latents(pipe), "tiny-unet")
    assert set(seen) == {"QuantLinear"}


def test_attention_slicing_gives_the_same_up_to_the_order_of_sums() -> None:
    pipe = opened("tiny-unet")
    pipe.enable_attention_slicing()
    difference = (latents(pipe) - expected("tiny-unet")).abs().max()
    assert difference < 0.05 * expected("tiny-unet").abs().max()  # rounding of inputs to 8 bits makes more of a last bit


def test_freeu_runs_on_a_quantized_unet() -> None:
    pipe = opened("tiny-unet")
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not torch.equal(latents(pipe), expected("tiny-unet"))
    pipe.disable_freeu()
    assert is_expected(latents(pipe), "tiny-unet")


def test_hooks_on_fused_layers_are_called() -> None:
    """A layer that is computed together with its activation is called like any other once somebody watches it."""
    model = denoiser(opened("tiny-dit"))
    layer, seen = model.blocks[0].ffn.net[0].proj, []
    call = inputs(model, "tiny-dit", 500.0, 0)
    before = run(model, call)
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(run(model, call), before, rtol=1e-2, atol=1e-2)
    assert len(seen) == 1
    handle.remove()
    run(model, call)
    assert len(seen) == 1


def test_tables_give_way_only_to_steps_that_they_do_not_hold(caplog: pytest.LogCaptureFixture) -> None:
    pipe = opened("tiny-dit")
    with caplog.at_level(logging.WARNING, logger="reelquant"):
        latents(pipe)
        assert not caplog.text
        latents(pipe, num_inference_steps=3)
    assert "temporal layers are computed" in caplog.text
