"""Steps: which get more precise activations, which scales another sampler gets, and the two halves of guidance."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

import reelquant
from reelquant._errors import CalibrationError, CheckpointError, RecipeError
from reelquant.checkpoint.stored import Slots, Stored
from reelquant.clock import ANY, BOTH, FIRST, FLOAT, NAME, SECOND, Clock, Moment, Widths
from reelquant.discover import discover
from reelquant.engine import components
from reelquant.engine.report import Report
from reelquant.engine.run import quantize_pipeline
from reelquant.formats import Granularity, Int
from reelquant.formats.criteria import latent_psnr
from reelquant.kernels import InputQuant
from reelquant.models.pipelines import calibration_prompts
from reelquant.models.sampling import sample
from reelquant.nn import QuantLayer, dequantized, quantized_layers, set_module
from reelquant.nn.runners.guidance import GuidanceHalves
from reelquant.policies.protect_steps import measure_steps, slots_of
from reelquant.recipes.recipe import Recipe, load_recipe
from reelquant.reconstruct import AdaRound
from tests.tiny.configs import TINY
from tests.tiny.pipelines import FakePipeline, call
from tests.tiny.stock import CALL, PROMPTS, realigned, wan_pipeline

TEXTS = ["a red circle", "a blue square", "a green star", "a cat", "held out"]
MAPS: dict[Any, Any] = {}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler and UniPC, numpy 2


@pytest.fixture(autouse=True)
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Discovery has tests of its own: look at each model once. Models of one class may have other layers."""

    def cached(denoiser: Any) -> Any:
        key = type(denoiser), tuple(name for name, _ in denoiser.named_modules())
        if key not in MAPS:
            MAPS[key] = discover(denoiser)
        return MAPS[key]

    monkeypatch.setattr(components, "discover", cached)


def recipe(base: str = "minmax-w6a6", **keys: Any) -> Recipe:
    return load_recipe(base, {"calibrate.prompts": 2, "search.prompts": 1, **keys})


def quantized(steps: int = 4, model: str = "WanTransformer3DModel", pipe: Any = None, **keys: Any) -> tuple[Any, Report]:
    pipe = pipe or FakePipeline(TINY[model]())
    return pipe, quantize_pipeline(pipe, recipe(**keys), TEXTS, num_inference_steps=steps)[0]


def latents(pipe: Any, steps: int = 4) -> Tensor:
    return sample(pipe, ["held out"], seed=5, output="latent", num_inference_steps=steps)


def clock_of(denoiser: Any) -> Clock:
    return denoiser.get_submodule(NAME)


# --- protected steps ----------------------------------------------------------------------------------------------------------------


def test_protected_steps_round_no_inputs_and_the_others_do() -> None:
    pipe, report = quantized(protect_steps=[0, -1])
    plain, _ = quantized()
    assert report.protected == [0, 3] and clock_of(pipe.denoiser).protected_slots == (0, 3)
    assert all(torch.equal(a, b) for a, b in zip(pipe.denoiser.state_dict().values(), plain.denoiser.state_dict().values(), strict=True))
    unrounded = copy.deepcopy(plain.denoiser)
    for name, layer in quantized_layers(unrounded).items():
        set_module(unrounded, name, dequantized(layer, torch.float32))
    for slot, timestep in enumerate(report.timesteps):
        found, rounded, exact = (call(denoiser, timestep) for denoiser in (pipe.denoiser, plain.denoiser, unrounded))
        assert not torch.allclose(rounded, exact, rtol=1e-3)
        if slot in report.protected:
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(found, rounded)


def test_eight_bits_at_protected_steps_come_from_the_same_bytes() -> None:
    pipe, report = quantized(protect_steps={"steps": [1], "inputs": "8-bit"})
    before = {name: layer.codes.clone() for name, layer in quantized_layers(pipe.denoiser).items()}
    outputs = {timestep: call(pipe.denoiser, timestep) for timestep in report.timesteps}
    fast = [layer for layer in quantized_layers(pipe.denoiser).values() if layer.kernel.name in ("int8 tiles", "int8 quads")]
    assert all(layer.prepare().roundings[8].panels is layer.prepare().runner.panels for layer in fast)  # type: ignore[union-attr]
    assert all(torch.equal(layer.codes, before[name]) for name, layer in quantized_layers(pipe.denoiser).items())
    with reelquant.kernels.backend("reference"):  # type: ignore[attr-defined]
        for layer in quantized_layers(pipe.denoiser).values():
            layer.release()
        for timestep, found in outputs.items():
            expected = call(pipe.denoiser, timestep)
            assert latent_psnr(expected, found) > 50
    plain, _ = quantized()
    assert torch.equal(outputs[report.timesteps[0]], call(plain.denoiser, report.timesteps[0]))
    assert not torch.allclose(outputs[report.timesteps[1]], call(plain.denoiser, report.timesteps[1]), rtol=1e-3)


@pytest.mark.parametrize("signed", [True, False])
def test_every_level_of_few_bits_is_a_level_of_eight(signed: bool) -> None:
    zero = None if signed else torch.tensor([[11.0]])
    few = InputQuant(Int(6, signed), Granularity(), torch.tensor([[0.3]]), zero)
    codes = torch.arange(64, dtype=torch.uint8)
    levels = few.quantizer(torch.zeros(1), 0).dequantize(codes)
    finer = few.with_bits(8).quantizer(torch.zeros(1), 0)
    assert finer.format == Int(8, signed) and torch.allclose(finer(levels), levels, atol=1e-6)
    assert few.with_bits(6) is few


def test_compiled_graphs_follow_protection_with_one_compilation() -> None:
    pipe, report = quantized(protect_steps=[0, -1])
    expected = [call(pipe.denoiser, timestep) for timestep in report.timesteps]
    compiled = torch.compile(pipe.denoiser, fullgraph=True, backend="aot_eager")
    call(compiled, report.timesteps[1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for timestep, wanted in zip(report.timesteps, expected, strict=True):
            torch.testing.assert_close(call(compiled, timestep), wanted)


def test_protection_is_saved_and_holds_after_loading(tmp_path: Path) -> None:
    pipe = wan_pipeline()
    report = reelquant.quantize(pipe, recipe(protect_steps=[0]), PROMPTS, **CALL)
    reelquant.save(pipe, tmp_path / "out", report)
    stored = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]["slots"]
    assert stored["protected"] == [0] and stored["protected_inputs"] == "float"
    again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    again.set_progress_bar_config(disable=True)
    for part in (pipe, again):
        realigned(part.transformer), realigned(part.vae), realigned(part.text_encoder)
    assert torch.equal(sample(again, PROMPTS, **CALL), sample(pipe, PROMPTS, **CALL))
    clock_of(again.transformer).protect([])
    assert not torch.equal(sample(again, PROMPTS, **CALL), sample(pipe, PROMPTS, **CALL))


def test_recipes_without_the_keys_are_the_same_as_ever() -> None:
    off = {"protect_steps": None, "guidance": "joint", "attention": None, "temporal": "quantize"}
    digests = [load_recipe(name).digest() for name in ("qvd-w8a8", "minmax-w8a8", "w8a16")]
    assert digests == [load_recipe(name, off).digest() for name in ("qvd-w8a8", "minmax-w8a8", "w8a16")]
    assert Slots((1.0,), "t").to_json() == {"timesteps": [1.0], "argument": "t"}
    assert load_recipe("qvd-w8a8", {"protect_steps": "auto"}).digest() != digests[0]


@pytest.mark.parametrize("damage", [{"protected": [7]}, {"protected": ["x"]}, {"protected_inputs": "9-bit"}, {"pairs": "twice"}])
def test_a_damaged_description_is_refused(damage: dict[str, Any]) -> None:
    data = Stored({}, {}, slots=Slots((900.0, 100.0), "timestep", (1,), "8-bit")).to_json()
    assert Stored.from_json(data).slots == Slots((900.0, 100.0), "timestep", (1,), "8-bit")
    data["slots"] |= damage
    with pytest.raises(CheckpointError, match="slots is damaged"):
        Stored.from_json(data)


def test_auto_protects_the_steps_that_cost_most() -> None:
    pipe, report = quantized(steps=5, protect_steps={"steps": "auto", "share": 0.4})
    _, without = quantized(steps=5)
    assert [found.step for found in report.steps] == [0, 1, 2, 3, 4] and [found.timestep for found in report.steps] == report.timesteps
    worst = sorted(report.steps, key=lambda found: found.psnr)
    assert 1 <= len(report.protected) <= 2 and set(report.protected) == {found.step for found in worst[: len(report.protected)]}
    assert report.protected == [found.step for found in report.steps if found.protected] == list(clock_of(pipe.denoiser).protected_slots)
    assert report.latent_psnr > without.latent_psnr  # type: ignore[operator]
    assert report.seconds["measure steps"] > 0 and report.to_json()["steps"][0]["psnr"] == report.steps[0].psnr


def test_the_error_of_a_step_is_that_of_rounding_there_alone() -> None:
    costs = torch.tensor([0.5, 0.01, 0.3, 0.0, 0.02])
    asked: list[tuple[int, ...]] = []

    def final(protected: Any) -> Tensor:
        asked.append(tuple(protected))
        return torch.tensor([[0.0, 1.0 + float(sum(cost for step, cost in enumerate(costs) if step not in protected))]])

    found = measure_steps([5.0, 4.0, 3.0, 2.0, 1.0], final, share=0.6)
    assert asked[0] == (0, 1, 2, 3, 4) and asked[1] == (1, 2, 3, 4) and asked[-1] == (0, 1, 2, 3)
    assert [one.protected for one in found] == [True, False, True, False, False]  # a third place is free, no step deserves it
    assert [one.protected for one in measure_steps([5.0, 4.0, 3.0, 2.0, 1.0], final, share=0.2)] == [True, False, False, False, False]


def test_steps_go_on_from_one_expert_to_the_other() -> None:
    sampled = [1000.0, 700.0, 400.0, 100.0]
    assert slots_of([0, 2, -1], sampled, sampled[:2]) == (0,) and slots_of([0, 2, -1], sampled, sampled[2:]) == (0, 1)
    with pytest.raises(RecipeError, match="names step 4, the sampler that calibrates takes 4"):
        slots_of([4], sampled, sampled)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"protect_steps": "some"}, "protect_steps"),
        ({"protect_steps": {"step": [1]}}, "did you mean 'steps'"),
        ({"protect_steps": {"inputs": "4-bit"}}, "protect_steps.inputs"),
        ({"guidance": "split"}, "guidance"),
        ({"calibrate": None, "protect_steps": [0], "defaults.input": None, "steps": []}, "'protect_steps' needs statistics"),
        ({"calibrate": None, "guidance": "apart", "defaults.input": None, "steps": []}, "'guidance: apart' needs statistics"),
    ],
)
def test_recipes_that_cannot_be_followed(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("minmax-w8a8", keys)


def test_a_step_that_the_sampler_has_not_is_told_before_anything_changes() -> None:
    pipe = FakePipeline(TINY["WanTransformer3DModel"]())
    with pytest.raises(RecipeError, match="names step 9, the sampler that calibrates takes 4"):
        quantized(pipe=pipe, protect_steps=[9])
    assert not quantized_layers(pipe.denoiser)


# --- other samplers -----------------------------------------------------------------------------------------------------------------

FLOW = {"num_train_timesteps": 1000}
SAMPLERS = {
    "flow": lambda: FlowMatchEulerDiscreteScheduler(**FLOW),
    "flow, shift 5": lambda: FlowMatchEulerDiscreteScheduler(**FLOW, shift=5.0),
    "UniPC, flow": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0),
    "DDIM": lambda: DDIMScheduler(),
    "Euler": lambda: EulerDiscreteScheduler(),
    "UniPC": lambda: UniPCMultistepScheduler(),
    "EDM": lambda: EulerDiscreteScheduler(
        timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0, prediction_type="v_prediction"
    ),
}


def times(name: str, steps: int) -> Tensor:
    scheduler = SAMPLERS[name]()
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.float()


@pytest.mark.parametrize(
    ("calibrated", "used"),
    [("flow", "flow"), ("flow", "flow, shift 5"), ("flow", "UniPC, flow"), ("DDIM", "Euler"), ("DDIM", "UniPC"), ("EDM", "EDM")],
)
@pytest.mark.parametrize("steps", [50, 20, 8])
def test_another_sampler_gets_the_scales_of_its_own_noise_level(calibrated: str, used: str, steps: int) -> None:
    known = times(calibrated, 50)
    clock = Clock(known.tolist())
    gap = float((known[:-1] - known[1:]).abs().max())
    slots = []
    for timestep in times(used, steps):
        clock.tick(timestep)
        slots.append(clock.now().slot)
        outside = max(float(timestep - known.max()), float(known.min() - timestep), 0.0)
        assert abs(float(known[slots[-1]] - timestep)) <= gap / 2 + outside + 1e-3
    assert slots == sorted(slots)  # the trajectory goes down, so do the slots
    if (calibrated, steps) == (used, 50):
        assert slots == list(range(50))


def test_noise_levels_of_svd_are_logarithms() -> None:
    """SVD passes ``0.25 log(sigma)``, which goes below zero: the nearest slot is the nearest ratio of noise."""
    clock = Clock(times("EDM", 25).tolist())
    sigmas = (4 * clock.timesteps).exp()
    assert sigmas[0] == pytest.approx(700, rel=1e-3) and sigmas[-1] == pytest.approx(0.002, rel=1e-2)
    for sigma in (300.0, 1.0, 0.01, 0.002):
        clock.tick(torch.tensor([0.25 * math.log(sigma)] * 2))
        assert clock.now().slot == int((sigmas.log() - math.log(sigma)).abs().argmin())


def test_the_noisiest_token_counts() -> None:
    """Wan 2.2 5B and LTX give every token its timestep; tokens of a known first frame carry zero."""
    clock = Clock(times("flow", 50).tolist(), protected=[0])
    noisy = clock.timesteps[0].expand(2, 6).clone()
    noisy[:, :2] = 0
    clock.tick(noisy)
    assert clock.now() == Moment(0, False, True, ANY, widths=Widths(FLOAT))
    clock.tick(torch.zeros(2, 6) + float(clock.timesteps[30]))
    assert clock.now() == Moment(30, True, False, ANY)


def test_a_short_sampler_protects_the_noise_levels_of_the_long_one() -> None:
    known = times("flow", 50).tolist()
    clock = Clock(known, protected=[0, 1, 2, 3, 49])
    found = {}
    for steps in (50, 20, 8):
        found[steps] = []
        for number, timestep in enumerate(times("flow", steps)):
            clock.tick(timestep)
            found[steps] += [number] if clock.now().protected else []
    assert found == {50: [0, 1, 2, 3, 49], 20: [0, 1, 19], 8: [0, 7]}


@pytest.mark.full
def test_scales_per_step_serve_fewer_steps_of_another_sampler() -> None:
    """tiny-dit: calibrated with 8 Euler steps, run with 5 of Euler and of UniPC: no worse than a scale for all, on the mean of four clips.

    What a scale per step gains under many samplers is measured in docs/steps-and-components.md; this is about slots that are found wrong,
    which costs ten times the margin.
    """
    reference = reelquant.open_pipeline("tiny-dit")
    prompts = calibration_prompts(reference, 7)
    keys = {"calibrate.prompts": 4, "search.prompts": 1}
    samplers = (reference.scheduler, SAMPLERS["UniPC, flow"]())
    psnr: dict[str, list[float]] = {}
    for slots in ("per_step", "shared"):
        pipe = reelquant.open_pipeline("tiny-dit")
        reelquant.quantize(pipe, "minmax-w8a8", prompts, overrides=keys | {"defaults.input.slots": slots}, num_inference_steps=8)
        psnr[slots] = []
        for scheduler in samplers:
            finals = []
            for one in (reference, pipe):
                one.scheduler = copy.deepcopy(scheduler)
                finals.append(sample(one, prompts[-4:], seed=99, output="latent", num_inference_steps=5))
            psnr[slots].append(latent_psnr(*finals))
    assert min(psnr["per_step"]) > 33
    assert all(own > shared - 1 for own, shared in zip(psnr["per_step"], psnr["shared"], strict=True)), psnr


# --- guidance -----------------------------------------------------------------------------------------------------------------------


class Batched(FakePipeline):
    """Both halves of guidance in one call: ``[without prompt, with prompt]``."""

    def __init__(self, denoiser: Any, *, guided: bool = True) -> None:
        super().__init__(denoiser)

    def denoise(self, x: Tensor, timestep: Tensor, prompt: Any) -> Tensor:
        without, with_ = super().denoise(torch.cat([x] * 2), timestep, ["" for _ in prompt] + list(prompt)).chunk(2)
        return without + 1.5 * (with_ - without)


@pytest.mark.parametrize(("kind", "pairs"), [(FakePipeline, "sequential"), (Batched, "batched")])
@pytest.mark.parametrize("slots", ["shared", "per_step"])
def test_each_half_of_guidance_has_its_scales(kind: Any, pairs: str, slots: str) -> None:
    pipe = kind(TINY["WanTransformer3DModel"](), guided=True)
    _, report = quantized(pipe=pipe, base="minmax-w8a8", guidance="apart", **{"defaults.input.slots": slots})
    assert clock_of(pipe.denoiser).pairs == pairs and report.latent_psnr > 40  # type: ignore[operator]
    apart = [layer for layer in quantized_layers(pipe.denoiser).values() if layer.layout.cfg_halves]
    assert len(apart) > 10
    for layer in apart:
        any_, first, second = layer.input_scale.view(-1, 3).unbind(1)
        assert len(any_) == (4 if slots == "per_step" else 1)
        torch.testing.assert_close(torch.maximum(first, second), any_, rtol=0.2, atol=0)  # zero points round ends of uint8 ranges
    assert any(not torch.allclose(*layer.input_scale.view(-1, 3)[:, 1:].unbind(1)) for layer in apart)


def test_a_batch_is_split_where_its_halves_meet() -> None:
    pipe = Batched(TINY["WanTransformer3DModel"](), guided=True)
    quantized(pipe=pipe, base="minmax-w8a8", guidance="apart", **{"defaults.input.slots": "per_step"})
    layer = next(layer for layer in quantized_layers(pipe.denoiser).values() if layer.layout.cfg_halves and layer.kernel.low_bit)
    x = 3 * torch.randn(4, 7, layer.weight_shape[1])

    def rounded_as(rows: Tensor, row: int) -> Tensor:
        single = copy.deepcopy(layer)
        single.input_scale = layer.input_scale[row : row + 1]
        single.input_zero_point = layer.input_zero_point[row : row + 1]
        single.layout = type(layer.layout)(layer.layout.weight, layer.layout.input, bias=layer.layout.bias)
        return single.compute(rows, Moment())

    both = layer.compute(x, Moment(2, half=BOTH))
    assert torch.equal(both, torch.cat([rounded_as(x[:2], 7), rounded_as(x[2:], 8)]))
    for half, row in ((ANY, 6), (FIRST, 7), (SECOND, 8)):
        assert torch.equal(layer.compute(x, Moment(2, half=half)), rounded_as(x, row))
    assert torch.equal(layer.compute(x[:3], Moment(2, half=BOTH)), rounded_as(x[:3], 6))  # an odd batch is not a pair


def test_a_clock_knows_the_halves_by_their_latents() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    batched = Clock([1.0], pairs="batched", latent="x")
    for latent, half in ((torch.cat([a, a]), BOTH), (torch.cat([a, b]), ANY), (a[:1], ANY), (torch.cat([a, a, a[:1]]), ANY)):
        batched.look(latent)
        assert int(batched.which) == half
    sequential = Clock([1.0], pairs="sequential", latent="x")
    found = []
    for latent in (a, a, b, b, a, b, b):  # two guided steps, one without guidance, one guided
        sequential.look(latent)
        found.append(int(sequential.which))
    assert found == [FIRST, SECOND, FIRST, SECOND, FIRST, FIRST, SECOND]


def test_compiled_graphs_tell_the_halves_apart() -> None:
    pipe = Batched(TINY["WanTransformer3DModel"](), guided=True)
    _, report = quantized(pipe=pipe, base="minmax-w8a8", guidance="apart", **{"defaults.input.slots": "per_step"})
    denoiser = pipe.denoiser
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(1, 4, 2, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)

    def run(model: Any, latents: Tensor, timestep: float) -> Tensor:
        with torch.no_grad():
            return model(hidden_states=latents, timestep=torch.full((2,), timestep), encoder_hidden_states=text, return_dict=False)[0]

    calls = [(torch.cat([x, x]), timestep) for timestep in report.timesteps] + [(torch.cat([x, -x]), report.timesteps[1])]
    expected = [run(denoiser, *one) for one in calls]
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    run(compiled, *calls[-1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for one, wanted in zip(calls, expected, strict=True):
            torch.testing.assert_close(run(compiled, *one), wanted)


def test_the_halves_are_saved_and_told_apart_after_loading(tmp_path: Path) -> None:
    pipe = wan_pipeline()
    report = reelquant.quantize(pipe, recipe(guidance="apart"), PROMPTS, **CALL)
    reelquant.save(pipe, tmp_path / "out", report)
    again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert clock_of(again.transformer).pairs == "sequential" and any(
        x.layout.cfg_halves for x in quantized_layers(again.transformer).values()
    )
    for part in (pipe, again):
        part.set_progress_bar_config(disable=True)
        realigned(part.transformer), realigned(part.vae), realigned(part.text_encoder)
    assert torch.equal(sample(again, PROMPTS, **CALL), sample(pipe, PROMPTS, **CALL))


ON_RECORDED_CALLS: dict[str, dict[str, Any]] = {
    "reconstruct": {"reconstruct": "adaround", "calls": 8, "iterations": 4, "on": "role:main"},
    "allocate": {"allocate": "milp", "calls": 8, "bits": 6.5, "formats": ["int4/channel", "int8/channel"], "on": "blocks.0.attn1"},
}


@pytest.mark.parametrize(("kind", "halves"), [(FakePipeline, {FIRST, SECOND}), (Batched, {BOTH})])
@pytest.mark.parametrize("stage", ON_RECORDED_CALLS)
def test_recorded_calls_are_made_again_as_the_half_that_they_were(
    kind: Any, halves: set[int], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = kind(TINY["WanTransformer3DModel"](), guided=True)
    now, met, empty = [ANY], set[int](), torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    compute, solve = GuidanceHalves.__call__, AdaRound.solve_block

    def see(module: Any, args: Any, kwargs: Any) -> None:
        without = torch.equal(kwargs["encoder_hidden_states"][0], empty)
        now[0] = BOTH if halves == {BOTH} else SECOND if without else FIRST
        known.append(now[0])

    def checked(link: Any, x: Tensor, moment: Moment, activation: str) -> Tensor:
        assert moment.half == now[0]
        met.add(moment.half)
        return compute(link, x, moment, activation)

    def watched(member: Any, block: Any) -> Any:
        known.clear()
        calls = block.calls(True)
        for one, now[0] in zip(calls, known[: len(calls)], strict=True):
            block.output(one)
        assert set(known) == halves
        now[0] = ANY
        monkeypatch.setattr(GuidanceHalves, "__call__", compute)
        solutions = solve(member, block)
        monkeypatch.setattr(GuidanceHalves, "__call__", checked)
        return solutions

    known: list[int] = []
    pipe.denoiser.register_forward_pre_hook(see, with_kwargs=True)
    monkeypatch.setattr(GuidanceHalves, "__call__", checked)
    monkeypatch.setattr(AdaRound, "solve_block", watched)
    chosen = recipe("minmax-w8a8", guidance="separate", steps=[ON_RECORDED_CALLS[stage]])
    quantize_pipeline(pipe, chosen, TEXTS, num_inference_steps=4)
    assert met == halves


def test_inputs_whose_ranges_come_from_samples_share_them_between_halves() -> None:
    """Nobody observed the halves of an input that is rotated after a scale."""
    steps = [{"transform": "scale"}, {"transform": "rotate", "always": True, "on": "re:.*to_q"}]
    pipe = FakePipeline(TINY["WanTransformer3DModel"](), guided=True)
    quantize_pipeline(pipe, recipe("minmax-w8a8", guidance="apart", steps=steps), TEXTS, num_inference_steps=4)
    layers = quantized_layers(pipe.denoiser)
    assert {layer.layout.cfg_halves for layer in layers.values()} == {False, True}
    assert not any(layer.layout.cfg_halves for layer in layers.values() if layer.layout.rotate)


def test_without_guidance_there_are_no_halves() -> None:
    pipe = FakePipeline(TINY["WanTransformer3DModel"]())
    with pytest.raises(CalibrationError, match="samples without classifier-free guidance"):
        quantized(pipe=pipe, base="minmax-w8a8", guidance="apart")
    assert not any(isinstance(module, QuantLayer) for module in pipe.denoiser.modules())
