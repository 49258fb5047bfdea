"""The checks that diffusers runs on its own quantization methods, in our words: one function a check, one line a check in ``CHECKS``.

A check takes a :class:`Case`, asserts, and returns the figure that the published matrix shows (``""`` if it has none). What a class of
diffusers cannot do in float either is :class:`UpstreamError`, and the float model is asked to prove it.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from reelquant import ReelQuantConfig
from reelquant.checkpoint.stored import adopt
from reelquant.clock import AS_STORED, NAME, Apart, Clock, Widths
from reelquant.discover import discover
from reelquant.integrations import loading
from reelquant.nn import QuantLayer, change_bits, quantized_class, quantized_layers, start_clock
from reelquant.reuse import AttentionReuse, BlockReuse
from reelquant.reuse.attention import MODES
from reelquant.sites import DenoiserMap
from tests.families.features import FEATURES, Feature
from tests.families.models import FAMILIES, Inputs, awake
from tests.tiny.stock import realigned

RECIPE = "w8a16"
DYNAMIC: dict[str, Any] = {
    "name": "dynamic-w8a8",
    "defaults": {
        "weight": {"format": "int8", "granularity": "channel"},
        "input": {"format": "int8", "granularity": "tensor", "dynamic": True},
    },
    "rules": [{"on": "role:entry | role:exit", "keep": True}],
    "calibrate": None,
}
"""Inputs in 8 bits, ranged in the forward: the most that works without data."""

LEAST = 1.2
"""What the whole model must shrink by, in bf16, as diffusers asks of its own methods; these models are small and their ends stay float."""


class UpstreamError(Exception):
    """The float model of diffusers cannot do this either; the message says how it fails."""


class Case:
    """A family with its float checkpoint on disk, as a user has one, and what several checks look at."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.family, self.folder = name, FAMILIES[name], folder
        model = awake(self.family.make())
        self.cls: Any = type(model)
        self.maps: dict[torch.dtype, DenoiserMap] = {}
        model.save_pretrained(folder / "float")

    def float(self, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        return realigned(self.cls.from_pretrained(self.folder / "float", torch_dtype=dtype, **options))

    def quantized(
        self, recipe: Any = RECIPE, dtype: torch.dtype = torch.float32, config: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        """Quantized while loading, the way users write it."""
        settings = ReelQuantConfig(recipe, **config or {})
        with self._probed_once(dtype):
            return self.cls.from_pretrained(self.folder / "float", quantization_config=settings, torch_dtype=dtype, **options)

    @contextmanager
    def _probed_once(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside, loading probes the model the first time only, for each dtype: what it finds depends on nothing else."""
        probe = loading._map

        def known(model: nn.Module) -> DenoiserMap:
            if dtype not in self.maps:
                self.maps[dtype] = probe(model)
            return self.maps[dtype]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "_map", known)
            yield

    @functools.cached_property
    def shared(self) -> Any:
        """A quantized model that checks must not change."""
        return realigned(self.quantized())

    @functools.cached_property
    def half(self) -> Any:
        """The same for bf16."""
        return self.quantized(dtype=torch.bfloat16)

    def copy(self) -> Any:
        """A copy of the quantized model that a check may change; quantizing again would probe the model again."""
        return copy.deepcopy(self.shared)

    @functools.cached_property
    def answer(self) -> Tensor:
        """What the shared model computes."""
        return output(self.shared, self.inputs())

    @functools.cached_property
    def reference(self) -> Tensor:
        """What the float model computes."""
        return output(self.float(), self.inputs())

    def inputs(self, dtype: torch.dtype = torch.float32) -> Inputs:
        return self.family.inputs(dtype)

    def adapters(self) -> LoraConfig:
        """Rank 4 on the attention's projections, none of them zero."""
        return LoraConfig(r=4, lora_alpha=4, target_modules=list(self.family.attention), init_lora_weights=False)


def output(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def snr(reference: Tensor, other: Tensor) -> float:
    """Signal over error in dB."""
    error = (other.float() - reference.float()).square().mean()
    return float(10 * torch.log10(reference.float().square().mean() / error))


def close(reference: Tensor, other: Tensor) -> None:
    """Equal but for the order of sums."""
    torch.testing.assert_close(other, reference, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------- sizes and kinds


def num_parameters(case: Case) -> str:
    """Packed weights report the count of the unpacked ones."""
    count = case.float().num_parameters()
    for model in (case.shared, case.quantized("w4a16")):
        assert model.num_parameters() == count
        assert model.num_parameters(only_trainable=True) < count
    return f"{count:,}"


def memory_footprint(case: Case) -> str:
    """The model shrinks by exactly what the recipe says of the layers it names, and by enough altogether."""
    before, model = case.float(torch.bfloat16), case.half
    weights = [before.get_submodule(name).weight for name in quantized_layers(model)]
    stated = sum(weight.nbytes - weight.numel() - 2 * weight.shape[0] for weight in weights)  # one byte a weight, bf16 a row
    sizes = before.get_memory_footprint(), model.get_memory_footprint()
    assert sizes[0] - sizes[1] == stated
    assert sizes[0] / sizes[1] >= LEAST
    return f"{sizes[0] / sizes[1]:.2f}x"


def inference(case: Case) -> str:
    """Finite, and close to float: weights of 8 bits are 48 dB from float, and errors of many layers add up."""
    assert case.answer.isfinite().all()
    assert not torch.equal(case.answer, case.reference)
    found = snr(case.reference, case.answer)
    assert found > 30, found
    dynamic = output(case.quantized(DYNAMIC), case.inputs())
    assert dynamic.isfinite().all()
    assert snr(case.reference, dynamic) > 15, snr(case.reference, dynamic)
    assert not torch.equal(dynamic, case.answer)
    half = output(case.half, case.inputs(torch.bfloat16))
    assert half.isfinite().all()
    return f"{found:.0f} dB, W8A8 {snr(case.reference, dynamic):.0f} dB"


def dtype_assignment(case: Case) -> str:
    """Casts to another dtype are refused; moves, and casts to the dtype that the model has, are not."""
    model = case.copy()
    assert model.to(dtype=model.dtype) is model and model.float() is model
    for cast in (
        model.half, model.double, lambda: model.to(torch.float16), lambda: model.to(device="cpu", dtype=torch.bfloat16),
        lambda: model.to("cpu", torch.float16),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="quantized"):
            cast()
    model.to("cpu")
    assert torch.equal(output(model, case.inputs()), case.answer)
    return ""


def quantized_layers_are_all(case: Case) -> str:
    """Every linear layer and convolution is quantized but the first, the last, what the class keeps in float32, and depthwise ones."""
    model = case.float()
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    found = discover(model, case.inputs())
    kept = {name for role in ("entry", "exit") for name in found.by_role(role)}
    kept |= {name for name in names if set(case.cls._keep_in_fp32_modules or ()) & set(name.split("."))}
    odd = {name for name in names if not _has_a_form(model.get_submodule(name))}
    assert set(quantized_layers(case.shared)) == set(names) - kept - odd
    for name in kept | odd:
        assert type(case.shared.get_submodule(name)) is type(model.get_submodule(name))
    return f"{len(names) - len(kept | odd)}/{len(names)}"


def _has_a_form(module: Any) -> bool:
    return quantized_class(module) is not None and getattr(module, "groups", 1) == 1 and getattr(module, "padding_mode", "zeros") == "zeros"


def keep_modules_in_fp32(case: Case) -> str:
    """What the class lists, and what a user adds to the list, is float32 and not quantized."""
    listed = list(case.cls._keep_in_fp32_modules or [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case.cls, "_keep_in_fp32_modules", [*listed, "to_k"])
        model = case.quantized(dtype=torch.bfloat16)
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and {*listed, "to_k"} & set(name.split("."))]
    assert kept
    for name in kept:
        module = model.get_submodule(name)
        assert not isinstance(module, QuantLayer), name
        assert module.weight.dtype == torch.float32, name
    assert any("to_q" in name for name in quantized_layers(model))
    return f"{len(listed)} listed"


def modules_to_not_convert(case: Case) -> str:
    """Names of modules and parts of names keep layers float; the others stay quantized."""
    model = case.quantized(config={"modules_to_not_convert": ["to_v"]})
    chosen = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "to_v" in name.split(".")}
    assert chosen
    assert set(quantized_layers(model)) == set(quantized_layers(case.shared)) - chosen
    assert model.get_memory_footprint() > case.shared.get_memory_footprint()
    assert output(model, case.inputs()).isfinite().all()
    return f"{len(chosen)} kept"


# -------------------------------------------------------------------------------------------------------------- saving and loading


def serialization(case: Case) -> str:
    """Saved and opened by stock diffusers: the same bits come out, and the same file."""
    with folder() as here:
        case.shared.save_pretrained(here / "a")
        loaded = realigned(case.cls.from_pretrained(here / "a"))
        assert set(quantized_layers(loaded)) == set(quantized_layers(case.shared))
        assert torch.equal(output(loaded, case.inputs()), output(realigned(case.copy()), case.inputs()))
        loaded.save_pretrained(here / "b")
        name = "diffusion_pytorch_model.safetensors"
        assert (here / "a" / name).read_bytes() == (here / "b" / name).read_bytes()
    return "bit-equal"


def sharded_serialization(case: Case) -> str:
    """The same over many files, which may part a weight from its scales."""
    with folder() as here:
        case.shared.save_pretrained(here, max_shard_size=max(case.shared.get_memory_footprint() // 5, 1))
        shards = len(list(here.glob("*.safetensors")))
        assert shards > 1
        loaded = realigned(case.cls.from_pretrained(here))
        assert torch.equal(output(loaded, case.inputs()), output(realigned(case.copy()), case.inputs()))
    return f"{shards} files"


def config_serialization(case: Case) -> str:
    """The configuration is plain data, before and after quantizing, and comes back equal."""
    with folder() as here:
        case.shared.save_pretrained(here)
        stored = json.loads((here / "config.json").read_text())["quantization_config"]
    for config in (ReelQuantConfig(RECIPE), ReelQuantConfig(RECIPE, modules_to_not_convert=["to_v"]), ReelQuantConfig.from_dict(stored)):
        plain = config.to_dict()
        assert json.loads(json.dumps(plain)) == plain == json.loads(config.to_json_string())
        assert ReelQuantConfig.from_dict(plain) == config
        assert plain["quant_method"] == "reelquant"
        assert set(config.to_diff_dict()) <= set(plain)
    return ""


def original_dtype(case: Case) -> str:
    """The model remembers what it was loaded as, and does not write that down."""
    model = case.half
    assert model.config["_pre_quantization_dtype"] == torch.bfloat16
    with folder() as here:
        model.save_pretrained(here)
        assert "_pre_quantization_dtype" not in json.loads((here / "config.json").read_text())
    return ""


def dequantize(case: Case) -> str:
    """Back to stock layers that compute what the codes stand for, and can be saved and cast as a float model."""
    model = case.copy()
    model.dequantize()
    assert not quantized_layers(model)
    assert "quantization_config" not in model.config
    close(case.answer, output(model, case.inputs()))
    with folder() as here:
        model.save_pretrained(here)
        loaded = realigned(case.cls.from_pretrained(here))
    assert not quantized_layers(loaded)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in case.float().modules()]
    assert torch.equal(output(loaded, case.inputs()), output(realigned(model), case.inputs()))
    model.half()
    return ""


# ----------------------------------------------------------------------------------------------------------------------- features


def features(case: Case) -> str:
    """Rotations, branches, groups, scales per sample, low-bit attention: near float, saved and opened by stock diffusers bit for bit."""
    found = [_feature(case, feature) for feature in FEATURES.values()]
    assert any(found)
    return f"{sum(found)} of {len(found)}"


def _feature(case: Case, feature: Feature) -> bool:
    """Whether the family has a layer for it; if so, it passed."""
    model = realigned(case.quantized(feature.recipe))
    if not feature.used(model):
        return False
    answer = output(model, case.inputs())
    assert answer.isfinite().all()
    assert snr(case.reference, answer) > feature.least, (feature.recipe["name"], snr(case.reference, answer))
    with folder() as here:
        model.save_pretrained(here)
        loaded = realigned(case.cls.from_pretrained(here))
    assert feature.used(loaded)
    assert torch.equal(output(loaded, case.inputs()), output(realigned(copy.deepcopy(model)), case.inputs()))
    loaded.dequantize()
    assert not quantized_layers(loaded)
    floats = output(loaded, case.inputs())
    assert floats.isfinite().all() and snr(case.reference, floats) > feature.least
    return True


def step_bits(case: Case) -> str:
    """Weights and inputs in fewer bits at a step, from the codes of the other, and half of the layers in other bits: a coarser answer,
    saved and opened by stock diffusers."""
    model, name = realigned(case.quantized(DYNAMIC)), "timestep"
    steps = [case.inputs(), case.inputs() | {name: case.inputs()[name] / 2}]
    times = [float(one[name].max()) for one in steps]
    plain = [output(model, one) for one in steps]
    start_clock(model, Clock(times, widths=(AS_STORED, Widths(6, 4))), name)
    coarse = [output(model, one) for one in steps]
    assert torch.equal(coarse[0], plain[0]) and 0 < snr(plain[1], coarse[1]) < 60
    layers = [*quantized_layers(model)]
    change_bits(model, (AS_STORED, Widths(6, 4)), [half := Apart(tuple(layers[::2]), (Widths(4), AS_STORED))])
    found = [output(model, one) for one in steps]
    assert all(0 < snr(one, other) < 60 for one, other in zip(coarse, found, strict=True))
    adopt(model)
    with folder() as here:
        model.save_pretrained(here)
        loaded = realigned(case.cls.from_pretrained(here))
    assert (loaded.get_submodule(NAME).widths, loaded.get_submodule(NAME).apart) == ((AS_STORED, Widths(6, 4)), (half,))
    assert all(torch.equal(output(loaded, one), answer) for one, answer in zip(reversed(steps), reversed(found), strict=True))
    return f"{snr(plain[1], coarse[1]):.0f} dB"


@torch.no_grad()
def reuse(case: Case) -> str:
    """Blocks left out at every second step, the whole answer, and attention in every mode: where all is computed the same bits, elsewhere
    near them; a second clip equals the first."""
    model, inputs = case.float(), case.inputs()
    found = discover(model)
    stage = BlockReuse(stretch=(0.0, 1.0))
    facts = stage.facts(SimpleNamespace(denoiser=model, component="transformer", map=found))  # type: ignore[arg-type]
    later = inputs | {str(found.timestep_argument): inputs[str(found.timestep_argument)] / 2}
    exact = output(model, later)
    installed = stage.install(model, facts)
    clips = [(output(model, inputs), output(model, later)) for _ in range(2)]
    assert installed.counts() == {"computed": 2, "reused": 2}
    for computed, reused in clips:
        assert torch.equal(computed, case.reference) and torch.equal(reused, clips[0][1])
        assert 0 < float((reused - exact).norm()) < 0.5 * float(exact.norm())
    installed.remove()
    answers = BlockReuse(stretch=())
    installed = answers.install(model, answers.facts(SimpleNamespace(denoiser=model, component="transformer", map=found)))  # type: ignore[arg-type]
    assert all(torch.equal(output(model, given), case.reference) for given in (inputs, later))
    assert installed.counts() == {"computed": 1, "reused": 1}
    installed.remove()
    for mode in MODES:
        attention = AttentionReuse(rules=({"on": "*", "mode": mode},))
        acting = attention.install(model, attention.facts(SimpleNamespace(denoiser=model, component="transformer", map=found)))  # type: ignore[arg-type]
        clips = [(output(model, inputs), output(model, later)) for _ in range(2)]
        whole, saved = acting.by_step()[0], acting.by_step()[1]
        assert mode != "share" or (saved[0], saved[1]) == (0, sum(whole))
        acting.remove()
        for computed, reused in clips:
            assert torch.equal(computed, case.reference) and torch.equal(reused, clips[0][1])
            assert float((reused - exact).norm()) < 0.5 * float(exact.norm())
    return f"{facts['keeps']} of {len(facts['blocks'])} blocks, attention of {len(found.attention)} places"


# ------------------------------------------------------------------------------------------------------------------------ devices


def device_map(case: Case) -> str:
    """``auto``: everything has a place and nothing is left on meta."""
    try:
        case.float(device_map="auto")
    except ValueError as error:
        raise UpstreamError(str(error)) from None
    with folder() as here:
        case.shared.save_pretrained(here)
        return _placed(case, case.cls.from_pretrained(here, device_map="auto"))


def cpu_device_map(case: Case) -> str:
    """The whole model mapped to the CPU, while it is quantized."""
    return _placed(case, case.quantized(device_map={"": "cpu"}))


def _placed(case: Case, model: Any) -> str:
    assert model.hf_device_map
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert not [name for name, tensor in tensors if tensor.is_meta]
    close(case.answer, output(model, case.inputs()))
    return ""


# ----------------------------------------------------------------------------------------------------------------------- adapters


def lora_inference(case: Case) -> str:
    """An adapter on quantized projections does what it does on the float ones."""
    model = inject(case, case.copy())
    wrapped = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert wrapped
    assert any(isinstance(model.get_submodule(name).base_layer, QuantLayer) for name in wrapped)
    found, plain = output(model, case.inputs()), output(inject(case, case.float()), case.inputs())
    assert found.isfinite().all()
    effects = found - case.answer, plain - case.reference
    assert effects[0].abs().max() > 0
    alike = float(nn.functional.cosine_similarity(*(effect.flatten() for effect in effects), dim=0))
    assert alike > 0.95, alike
    return f"{len(wrapped)} layers, cos {alike:.3f}"


def inject(case: Case, model: Any) -> Any:
    """Put the adapters in, the same ones every time; classes without diffusers' adapter mixin get them from peft itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.add_adapter(case.adapters()) if hasattr(model, "add_adapter") else inject_adapter_in_model(case.adapters(), model)
    return model


def training(case: Case) -> str:
    """Gradients reach every adapter that they reach in the float model, and are close to those."""
    found, plain = gradients(inject(case, case.copy()), case), gradients(inject(case, case.float()), case)
    live = [name for name, gradient in plain.items() if gradient.norm() > 0]
    assert live
    for name in live:
        assert found[name].isfinite().all()
        assert found[name].norm() > 0, name
    alike = nn.functional.cosine_similarity(*(torch.cat([g[name].flatten() for name in live]) for g in (found, plain)), dim=0)
    assert alike > 0.95, float(alike)
    return f"{len(live)} tensors, cos {float(alike):.3f}"


def gradients(model: Any, case: Case) -> dict[str, Tensor]:
    """By adapter tensor, of the mean square of the output."""
    model.requires_grad_(False)
    tensors = {name: p.requires_grad_(True) for name, p in model.named_parameters() if re.search(r"\.lora_[AB]\.", name)}
    model(**case.inputs())[0].square().mean().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in tensors.items()}


# -------------------------------------------------------------------------------------------------------------------- compilation


def torch_compile(case: Case) -> str:
    """One graph without breaks, which later steps use again."""
    try:
        compiled_steps(case.copy(), case)
    except torch._dynamo.exc.Unsupported as error:
        with pytest.raises(torch._dynamo.exc.Unsupported) as own:
            compiled_steps(case.float(), case)
        if (reason := _reason(own.value)) != _reason(error):
            raise
        raise UpstreamError(reason) from None
    return "1 graph"


def compiled_steps(model: Any, case: Case) -> None:
    """Three steps through one compilation."""
    later = [case.inputs() | {"timestep": case.inputs()["timestep"] * part} for part in (1.0, 0.5, 0.1)]
    expected = [output(model, inputs) for inputs in later]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for inputs, right in zip(later, expected, strict=True):
            close(right, output(compiled, inputs))


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0]


def torch_compile_with_group_offload(case: Case) -> str:
    """Every layer's tensors are on disk but while it runs, and the model is compiled."""
    if not case.cls._supports_group_offloading:
        raise UpstreamError(f"{case.cls.__name__} says _supports_group_offloading = False")
    model = case.copy()
    with folder() as here:
        torch._dynamo.reset()
        model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(here))
        assert list(here.glob("*.safetensors"))
        model.compile(backend="eager")
        for _ in range(2):
            close(case.answer, output(model, case.inputs()))
    return ""


@contextmanager
def folder() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


CHECKS: dict[str, Callable[[Case], str]] = {
    "num_parameters": num_parameters,
    "memory_footprint": memory_footprint,
    "inference": inference,
    "dtype_assignment": dtype_assignment,
    "lora_inference": lora_inference,
    "serialization": serialization,
    "sharded_serialization": sharded_serialization,
    "config_serialization": config_serialization,
    "original_dtype": original_dtype,
    "quantized_layers": quantized_layers_are_all,
    "keep_modules_in_fp32": keep_modules_in_fp32,
    "modules_to_not_convert": modules_to_not_convert,
    "device_map": device_map,
    "cpu_device_map": cpu_device_map,
    "dequantize": dequantize,
    "features": features,
    "step_bits": step_bits,
    "reuse": reuse,
    "training": training,
    "torch_compile": torch_compile,
    "torch_compile_with_group_offload": torch_compile_with_group_offload,
}
"""Name in the published matrix -> the check: the seventeen of diffusers; sharding, a variant of theirs; three of ours."""
