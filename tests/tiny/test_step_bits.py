"""Bits of inputs and of weights that change over the steps, from one stored weight."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import reelquant
from reelquant._errors import CheckpointError, RecipeError
from reelquant.checkpoint.stored import Slots, Stored
from reelquant.clock import AS_STORED, FLOAT, NAME, Apart, Clock, Moment, Widths
from reelquant.discover import discover
from reelquant.engine.report import Report
from reelquant.engine.run import quantize_pipeline
from reelquant.formats import Granularity, Int, MinMax, Mse, Quantizer, QuantSpec, fit, in_bits, pack, parse_granularity
from reelquant.formats.criteria import latent_psnr
from reelquant.kernels import InputQuant, PackedWeight, Reference
from reelquant.models.sampling import sample
from reelquant.nn import QuantLayer, change_bits, quantized_layers
from reelquant.policies import StepBits
from reelquant.recipes.recipe import Recipe, load_recipe
from tests.tiny.configs import TINY
from tests.tiny.pipelines import FakePipeline, call
from tests.tiny.stock import CALL, PROMPTS, realigned, wan_pipeline

TEXTS = ["a red circle", "a blue square", "a green star", "held out"]
TOKENS = {"format": "int8", "granularity": "token", "dynamic": True}


GROUPS = {"format": "int8", "granularity": "group-16", "dynamic": True}


def recipe(base: str = "minmax-w8a8", **keys: Any) -> Recipe:
    return load_recipe(base, {"calibrate.prompts": 2, "search.prompts": 1, **keys})


def quantized(pipe: Any = None, **keys: Any) -> tuple[Any, Report]:
    pipe = pipe or FakePipeline(TINY["WanTransformer3DModel"]())
    return pipe, quantize_pipeline(pipe, recipe(**keys), TEXTS, num_inference_steps=4)[0]


def layers(denoiser: Any) -> list[QuantLayer]:
    return list(quantized_layers(denoiser).values())


def expected(layer: QuantLayer, x: Tensor, widths: Widths, row: int = 0) -> Tensor:
    """What the reference computes from the stored codes and scales."""
    given = layer.operands
    assert given.input is not None
    weight = given.weight if not widths.weights else given.weight.narrowed(widths.weights)
    inputs = {0: given.input, FLOAT: None}.get(widths.inputs, given.input.with_bits(widths.inputs or 8))
    return Reference(replace(given, weight=weight, input=inputs))(x, row)


SCALES = {
    "shared": {},
    "per step": {"defaults.input.slots": "per_step"},
    "dynamic": {"defaults.input": TOKENS},
    "groups": {"defaults.input": GROUPS},
}


@pytest.mark.parametrize("keys", SCALES.values(), ids=list(SCALES))
def test_every_step_has_its_bits_from_the_same_stored_tensors(keys: dict[str, Any]) -> None:
    bits = {"inputs": [8, 4, 6, 3], "weights": [8, 4, 8, 5]}
    pipe, report = quantized(step_bits=bits, **keys)
    plain, _ = quantized(**keys)
    states = (part.denoiser.state_dict() for part in (pipe, plain))
    assert all(torch.equal(one, other) for one, other in zip(*(state.values() for state in states), strict=True))
    assert report.step_bits == bits
    for layer in [one for one in layers(pipe.denoiser) if one.layout.input is not None][::5]:
        codes, x = layer.codes.clone(), 2 * torch.randn(3, 7, layer.weight_shape[1], generator=torch.Generator().manual_seed(0))
        for slot, timestep in enumerate(report.timesteps):
            layer.clock[0].tick(timestep)
            moment = layer.clock[0].now()
            assert moment.widths == Widths(bits["inputs"][slot], bits["weights"][slot])
            found, right = layer(x), expected(layer, x, moment.widths, slot)
            assert latent_psnr(right, found) > 45  # a code in the middle between two may be rounded to either
            assert torch.equal(found, layer(x))
        assert torch.equal(layer.codes, codes)


LAST = "role:main & blocks.1 | role:main & blocks.0.ffn"  # of the tiny denoiser
GROUPED = [
    {"inputs": [8, 4, 6, 3], "weights": [8, 4, 8, 5]},
    {"on": "blocks.0", "inputs": [3, 3, 3, 3]},  # the next entry takes a part of it back
    {"on": LAST, "inputs": [5, 8, 8, 7]},
    {"on": "blocks.0.ffn.net.2", "weights": [6, 6, 6, 8]},
]


def rows(name: str) -> tuple[list[int], list[int]]:
    """Bits of inputs and weights that a layer has by :data:`GROUPED`, worked out by hand."""
    inputs = [5, 8, 8, 7] if name.startswith(("blocks.1.", "blocks.0.ffn.")) else [3] * 4 if name.startswith("blocks.0.") else [8, 4, 6, 3]
    return inputs, [6, 6, 6, 8] if name == "blocks.0.ffn.net.2" else [8, 4, 8, 5]


@pytest.mark.parametrize("keys", [{}, {"defaults.input": TOKENS}], ids=["shared", "dynamic"])
def test_groups_of_layers_have_bits_of_their_own_and_the_last_entry_wins(keys: dict[str, Any]) -> None:
    pipe, report = quantized(step_bits=GROUPED, **keys)
    found = quantized_layers(pipe.denoiser)
    mains = {name for name, layer in discover(TINY["WanTransformer3DModel"]()).layers.items() if layer.role == "main"}
    tested = [name for name in found if name in mains and found[name].layout.input is not None]
    assert len({layer.bits_group for layer in found.values()}) == 4
    for name in [*tested[::4], "blocks.0.ffn.net.2"]:
        layer, (inputs, weights) = found[name], rows(name)
        x = 2 * torch.randn(3, 7, layer.weight_shape[1], generator=torch.Generator().manual_seed(0))
        for slot, timestep in enumerate(report.timesteps):
            layer.clock[0].tick(timestep)
            right = expected(layer, x, Widths(inputs[slot], weights[slot]), slot)
            assert latent_psnr(right, layer(x)) > 45, (name, slot)
            other = expected(layer, x, Widths(9 - inputs[slot] if inputs[slot] in (3, 4, 5, 6) else 4, 8), slot)
            assert latent_psnr(other, layer(x)) < 45, (name, slot)
    assert report.step_bits["inputs"] == [8, 4, 6, 3] and len(report.step_bits["apart"]) == 3
    single = next(one for one in report.step_bits["apart"] if one["layers"] == ["blocks.0.ffn.net.2"])
    assert single == {"layers": ["blocks.0.ffn.net.2"], "inputs": [5, 8, 8, 7], "weights": [6, 6, 6, 8]}


def test_groups_are_saved_copied_and_hold_after_loading(tmp_path: Path) -> None:
    pipe = wan_pipeline()
    steps = CALL["num_inference_steps"]
    bits = [{"inputs": [8] * (steps - 1) + [4]}, {"on": "blocks.0", "inputs": [4] + [8] * (steps - 1), "weights": [6] * steps}]
    report = reelquant.quantize(pipe, recipe(step_bits=bits), PROMPTS, **CALL)
    reelquant.save(pipe, tmp_path / "out", report)
    stored = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]["slots"]
    assert stored["input_bits"] == bits[0]["inputs"] and "weight_bits" not in stored
    (group,) = stored["groups"]
    assert (group["input_bits"], group["weight_bits"]) == (bits[1]["inputs"], bits[1]["weights"])
    assert all(name.startswith("blocks.0.") for name in group["layers"])
    again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    again.set_progress_bar_config(disable=True)
    copied = copy.deepcopy(pipe.transformer)
    for part in (pipe, again):
        realigned(part.transformer), realigned(part.vae), realigned(part.text_encoder)
    expected_clips = sample(pipe, PROMPTS, **CALL)
    assert torch.equal(sample(again, PROMPTS, **CALL), expected_clips)
    pipe.transformer = realigned(copied)
    assert torch.equal(sample(pipe, PROMPTS, **CALL), expected_clips)
    change_bits(again.transformer, again.transformer.get_submodule(NAME).widths)  # the group has the bits of all others
    assert not torch.equal(sample(again, PROMPTS, **CALL), expected_clips)


def test_a_protected_step_of_a_group_keeps_its_own_inputs() -> None:
    bits = [{"inputs": [4] * 4}, {"on": "blocks.0", "inputs": [5] * 4, "weights": [6] * 4}]
    pipe, _ = quantized(step_bits=bits, protect_steps=[1])
    clock = pipe.denoiser.get_submodule(NAME)
    assert [clock.at(slot) for slot in (0, 1)] == [Widths(4), Widths(FLOAT)]
    assert [clock.at(slot, 1) for slot in (0, 1)] == [Widths(5, 6), Widths(FLOAT, 6)]
    clock.tick(clock.timesteps[0])
    assert not clock.reads_stored


def test_a_group_at_a_step_as_stored_is_seen_by_all_who_ask() -> None:
    clock = Clock([900.0, 100.0], apart=[Apart(("a",), (Widths(4), AS_STORED))])
    clock.tick(900.0)
    assert clock.now().widths == AS_STORED and clock.now(clock.group_of("a")).widths == Widths(4) and not clock.reads_stored
    clock.tick(100.0)
    assert clock.reads_stored and clock.group_of("b") == 0 and clock.changes_bits


def test_a_step_with_the_stored_bits_is_computed_as_ever() -> None:
    pipe, report = quantized(step_bits={"inputs": [8, 4, 8, 8], "weights": [8, 8, 4, 8]})
    plain, _ = quantized()
    same = [torch.equal(call(pipe.denoiser, time), call(plain.denoiser, time)) for time in report.timesteps]
    assert same == [True, False, False, True]


def test_integer_products_stay_integer_products() -> None:
    pipe, report = quantized(step_bits={"inputs": [5, 8, 8, 8], "weights": [8, 8, 6, 8]})
    fast = [layer for layer in layers(pipe.denoiser) if layer.kernel.name == "onednn int8"]
    call(pipe.denoiser, report.timesteps[0]), call(pipe.denoiser, report.timesteps[2])
    for layer in fast:
        ready = layer.prepare()
        assert ready.roundings[5].packed is ready.runner.packed  # the same memory
        assert ready.narrow is not None and ready.narrow[0] == 6 and ready.narrow[1].kernel is ready.kernel


def test_protected_steps_keep_theirs() -> None:
    pipe, report = quantized(step_bits={"inputs": [4] * 4, "weights": [8, 8, 8, 4]}, protect_steps={"steps": [1, -1], "inputs": "8-bit"})
    clock = pipe.denoiser.get_submodule(NAME)
    assert [clock.at(slot) for slot in range(4)] == [Widths(4, 8), Widths(8, 8), Widths(4, 8), Widths(8, 4)]
    assert report.protected == [1, 3]


@pytest.mark.parametrize("bits", [{"inputs": [8, 4, 6, 8], "weights": [8, 8, 4, 5]}, GROUPED], ids=["steps", "groups"])
def test_compiled_graphs_follow_the_bits_with_one_compilation(bits: Any) -> None:
    pipe, report = quantized(step_bits=bits)
    right = [call(pipe.denoiser, timestep) for timestep in report.timesteps]
    compiled = torch.compile(pipe.denoiser, fullgraph=True, backend="aot_eager")
    call(compiled, report.timesteps[1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for timestep, wanted in zip(report.timesteps, right, strict=True):
            torch.testing.assert_close(call(compiled, timestep), wanted)


def test_guidance_halves_keep_their_scales() -> None:
    pipe = FakePipeline(TINY["WanTransformer3DModel"](), guided=True)
    _, report = quantized(pipe, guidance="apart", step_bits={"inputs": [8, 5, 5, 8], "weights": [4, 4, 8, 8]})
    layer = next(layer for layer in layers(pipe.denoiser) if layer.layout.cfg_halves)
    x = 2 * torch.randn(2, 7, layer.weight_shape[1])
    for half in (1, 2):
        found = layer.compute(x, Moment(1, half=half, widths=Widths(5, 4)))
        assert latent_psnr(expected(layer, x, Widths(5, 4), half), found) > 45
    assert report.latent_psnr is not None


def test_bits_are_saved_and_hold_after_loading(tmp_path: Path) -> None:
    pipe = wan_pipeline()
    steps = CALL["num_inference_steps"]
    bits = {"inputs": [5] + [8] * (steps - 1), "weights": [8] * (steps - 1) + [4]}
    report = reelquant.quantize(pipe, recipe(step_bits=bits), PROMPTS, **CALL)
    reelquant.save(pipe, tmp_path / "out", report)
    stored = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]["slots"]
    assert (stored["input_bits"], stored["weight_bits"]) == (bits["inputs"], bits["weights"])
    again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    again.set_progress_bar_config(disable=True)
    for part in (pipe, again):
        realigned(part.transformer), realigned(part.vae), realigned(part.text_encoder)
    expected_clips = sample(pipe, PROMPTS, **CALL)
    assert torch.equal(sample(again, PROMPTS, **CALL), expected_clips)
    again.transformer.get_submodule(NAME).change_bits(())
    assert not torch.equal(sample(again, PROMPTS, **CALL), expected_clips)


@pytest.mark.parametrize("damage", [{"input_bits": [8]}, {"input_bits": [8, 9]}, {"weight_bits": [4, "x"]}, {"weight_bits": 4}])
def test_a_damaged_description_is_refused(damage: dict[str, Any]) -> None:
    slots = Slots((900.0, 100.0), "timestep", widths=(Widths(4), Widths(8, 6)))
    data = Stored({}, {}, slots=slots).to_json()
    assert "groups" not in data["slots"]  # as earlier versions wrote it
    assert Stored.from_json(data).slots == slots
    data["slots"] |= damage
    with pytest.raises(CheckpointError, match="slots is damaged"):
        Stored.from_json(data)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"layers": ["a"], "input_bits": [8]}], "slots is damaged"),
        ([{"input_bits": [8, 8]}], "slots is damaged"),
        ([{"layers": ["a"], "input_bits": [8, 8]}], "slots.groups gives bits to 'a'"),
    ],
)
def test_damaged_groups_are_refused(groups: Any, message: str) -> None:
    data = Stored({}, {}, slots=Slots((900.0, 100.0), "timestep")).to_json()
    data["slots"]["groups"] = groups
    with pytest.raises(CheckpointError, match=message):
        Stored.from_json(data)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([9, 8], "step_bits.inputs are whole numbers from 2 to 8, got 9"),
        ({"weights": [1, 8]}, "step_bits.weights are whole numbers from 2 to 8, got 1"),
        ({}, "step_bits says nothing"),
        ({"input": [8]}, "did you mean 'inputs'"),
        ({"inputs": ["float"]}, "inputs of"),
        ([{"on": "blocks.0", "inputs": [8, 1]}], "step_bits.inputs are whole numbers from 2 to 8, got 1"),
        ([{"on": "blocks.0"}], "step_bits says nothing"),
        ([{"on": "blocks.0", "input": [8]}], "did you mean 'inputs'"),
        ({"on": 3, "inputs": [8]}, "step_bits.on is a pattern of layers, got 3"),
        ([{"inputs": 8}], "step_bits.inputs is a list with a number for each step, got 8"),
    ],
)
def test_bits_that_cannot_be(value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("minmax-w8a8", {"step_bits": value})


def test_as_many_numbers_as_steps() -> None:
    pipe = FakePipeline(TINY["WanTransformer3DModel"]())
    with pytest.raises(RecipeError, match=r"step_bits\.inputs has 3 numbers, and the sampler that calibrates takes 4 steps"):
        quantized(pipe, step_bits=[8, 8, 6])
    assert not layers(pipe.denoiser)


def test_bits_that_nothing_has_are_told() -> None:
    _, report = quantized(base="minmax-w4a8", step_bits={"weights": [4, 8, 6, 8]})
    assert any("step_bits.weights change nothing: no integer weight has more than 4 bits" in one for one in report.warnings)


def test_two_experts_share_the_numbers_of_the_sampler() -> None:
    sampled, found = [1000.0, 700.0, 400.0, 100.0], []
    for times in (sampled[:2], sampled[2:]):
        work = SimpleNamespace(clock=Clock(times), sampled=sampled, timesteps=times, specs={}, warnings=[], component="transformer")
        StepBits(inputs=(8, 7, 6, 5)).before_choosing(work)  # type: ignore[arg-type]
        found += [one.inputs for one in work.clock.widths]
    assert found == [8, 7, 6, 5]


# --- numbers ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 7])
def test_fewer_bits_cover_the_same_range(signed: bool, bits: int) -> None:
    scale, zero = torch.tensor([0.1]), None if signed else torch.tensor([90.0])
    wide, (fmt, coarse, moved) = Quantizer(Int(8, signed), Granularity(), scale, zero), in_bits(Int(8, signed), bits, scale, zero)
    narrow = Quantizer(fmt, Granularity(), coarse, moved)
    x = torch.linspace(*(float(end) for end in wide.ends(torch.zeros(1))), 1000)
    assert float((narrow(x) - x).abs().max()) <= float(coarse) * (0.51 if signed else 1.01)
    assert float(narrow(torch.zeros(1))) == 0.0


@pytest.mark.parametrize("grain", ["channel", "group-64", "tensor"])
@pytest.mark.parametrize(("bits", "least"), [(3, 0.3), (4, 0.5), (5, 0.7)])
def test_fewer_bits_of_a_stored_weight_are_as_good_as_their_own(grain: str, bits: int, least: float) -> None:
    """dB below rounding the float weight to these bits; the second rounding alone costs 0.2 dB at 5 bits of 8."""
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    by = parse_granularity(grain, 0)
    wide = fit(QuantSpec(Int(8), by, MinMax()), weight)
    stored = PackedWeight(pack(wide.codes(weight), 8), wide, (48, 256))
    own = fit(QuantSpec(Int(bits), by, Mse(p=2)), weight)(weight)
    errors = [float((one - weight).square().sum()) for one in (own, stored.narrowed(bits).dequantize())]
    assert 10 * torch.tensor(errors[1] / errors[0]).log10() < least
    again = stored.narrowed(bits, stored.narrowed(bits).quantizer)  # known scales
    assert torch.equal(again.codes, stored.narrowed(bits).codes)


def test_other_formats_are_the_same_at_all_steps() -> None:
    from reelquant.formats import parse_format

    inputs = InputQuant(parse_format("e4m3"), Granularity(), torch.ones(1, 1))
    assert inputs.with_bits(4) is inputs
    static = InputQuant(parse_format("e2m1"), Granularity(), torch.ones(1, 1))
    assert static.with_bits(8) is static


@pytest.mark.parametrize("scale", ["float", "e4m3", "e8m0"])
def test_small_floats_become_integers_of_the_same_groups(scale: str) -> None:
    """NVFP4 inputs at a step of 8 bits: the error falls by the ratio of the steps at least, and groups keep scales of their own."""
    from reelquant.formats import FourOverSix, parse_format

    grain = Granularity("group", 16, -1, scale)
    rule = QuantSpec(parse_format("e2m1"), grain, FourOverSix(), dynamic=True)
    inputs = InputQuant(parse_format("e2m1"), grain, rule=rule)
    sizes = torch.logspace(-2, 2, 4).repeat_interleave(16)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * sizes
    wider = inputs.with_bits(8)
    assert inputs.with_bits(4) is inputs
    assert wider.format == Int(8) and wider.rule is not None and wider.rule.range == MinMax()
    errors = [float(((one.quantizer(x, 0)(x) - x) / sizes).square().mean().sqrt()) for one in (inputs, wider)]
    assert errors[1] < errors[0] / 6
    assert Clock([1.0]).at(0) == AS_STORED
