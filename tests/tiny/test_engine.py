"""quantize_pipeline on tiny random denoisers: every recipe end to end, and what is left when something breaks in the middle."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelquant._errors import CalibrationError, ReelQuantError, UnsupportedError
from reelquant.discover import discover
from reelquant.engine import components
from reelquant.engine import run as engine
from reelquant.engine.report import Report
from reelquant.engine.run import quantize_pipeline
from reelquant.nn import QuantLayer, get_module, quantized_layers
from reelquant.recipes.recipe import Recipe, load_recipe, names
from tests.tiny.configs import TINY
from tests.tiny.pipelines import FakePipeline

PROMPTS = ["a red circle", "a blue square", "a green star", "a cat", "held out"]
SMALL = {"calibrate.prompts": 2, "search.prompts": 1, "search.steps": 1}
MODELS = ["WanTransformer3DModel", "UNetMotionModel"]
MAPS: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Discovery has tests of its own: look at each class once."""

    def cached(denoiser: nn.Module) -> Any:
        name = type(denoiser).__name__
        if name not in MAPS:
            MAPS[name] = discover(denoiser)
        return MAPS[name]

    monkeypatch.setattr(components, "discover", cached)


def recipe(name: str, **overrides: Any) -> Recipe:
    """A library recipe that calibrates on two clips and tries two powers."""
    found = load_recipe(name)
    small = {} if found.data_free else dict(SMALL)
    for number, step in enumerate(found.steps):
        if step.mechanism == "range_integrate":
            small[f"steps.{number}.power"] = [0.0, 1.0]
        if step.axis == "allocate":
            # rows of tiny models are short, so that scales count for more
            small |= {f"steps.{number}.bits": 6.5, f"steps.{number}.calls": 1}
        if step.axis == "reconstruct":
            small |= {f"steps.{number}.iterations": 10, f"steps.{number}.calls": 4}
    return load_recipe(found, small | overrides)


def quantize(pipe: FakePipeline, chosen: Recipe, **options: Any) -> Report:
    call = {} if chosen.data_free else {"num_inference_steps": 3}
    return quantize_pipeline(pipe, chosen, None if chosen.data_free else PROMPTS, **call, **options)[0]


def clip(pipe: FakePipeline, steps: int = 3) -> Tensor:
    with torch.no_grad():
        return pipe(["held out"], [torch.Generator().manual_seed(5)], num_inference_steps=steps).frames


def snapshot(denoiser: nn.Module) -> dict[str, Any]:
    modules = {name: (type(module), id(module), len(module._forward_pre_hooks), len(module._forward_hooks), module.training)
               for name, module in denoiser.named_modules()}  # fmt: skip
    return {"modules": modules, "tensors": {name: value.clone() for name, value in denoiser.state_dict().items()}}


def assert_untouched(denoiser: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(denoiser)
    assert after["modules"] == before["modules"]  # the very same modules, no clock, no hooks
    assert after["tensors"].keys() == before["tensors"].keys()
    assert all(torch.equal(value, before["tensors"][name]) for name, value in after["tensors"].items())


def runs(name: str, model: str) -> bool:
    """Recipes that leave blocks out need a list of equal blocks, and a UNet has none; sizes that change need a scheduler, and the pipeline
    of these tests has none (``tests/tiny/test_resolution.py``)."""
    stages = {entry.name for entry in load_recipe(name).entries}
    return "resolution" not in stages and (model != "UNetMotionModel" or "blocks" not in stages)


ON_BOTH = ("qvd-w4a8", "w4a16")
"""Recipes that ``make test`` runs on the UNet as well; ``make test-all`` runs all of them on both."""


def cases() -> list[Any]:
    """(recipe, model): every recipe of the library on every model that it runs on."""
    pairs = [(name, model) for name in names() for model in MODELS if runs(name, model)]
    rare = [model == "UNetMotionModel" and name not in ON_BOTH for name, model in pairs]
    return [pytest.param(*pair, marks=pytest.mark.full if full else ()) for pair, full in zip(pairs, rare, strict=True)]


@pytest.mark.parametrize(("name", "model"), cases())
def test_every_recipe_end_to_end(name: str, model: str, tmp_path: Path) -> None:
    pipe = FakePipeline(TINY[model](), guided=name == "minmax-w8a8")
    before, linear = (
        clip(pipe),
        {n for n, m in pipe.denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)},
    )
    watched = {n: weakref.ref(get_module(pipe.denoiser, n).weight) for n in linear}
    float_bytes = sum(t.numel() * t.element_size() for t in [*pipe.denoiser.parameters(), *pipe.denoiser.buffers()])
    chosen = recipe(name)
    report = quantize(pipe, chosen)
    after = clip(pipe)

    # the clip is finite and near the float one; 4-bit weights on random models are the worst case here
    assert bool(after.isfinite().all()) and float((after - before).norm() / before.norm()) < 0.25
    # every layer is accounted for, once
    done, kept = [record.name for record in report.layers], [n for names_ in report.skipped.values() for n in names_]
    assert sorted(done + kept) == sorted(linear) and set(done) == set(quantized_layers(pipe.denoiser))
    assert report.recipe == name and report.digest == chosen.digest() and report.denoiser == model and report.component == pipe.name
    # bytes are those of the tensors, tables of outputs apart
    sizes = {
        n: {key: t.numel() * t.element_size() for key, t in layer.state_dict().items()}
        for n, layer in quantized_layers(pipe.denoiser).items()
    }
    tables = {n: size.pop("output_table", 0) for n, size in sizes.items()}
    stored = {n: sum(size.values()) for n, size in sizes.items()}
    assert {record.name: record.bytes_after for record in report.layers} == stored
    assert report.bytes_quantized == sum(stored.values()) and report.bytes_tables == sum(tables.values())
    assert report.bytes_float == sum(record.bytes_before for record in report.layers) and report.bytes_model_float == float_bytes
    assert report.bytes_model < report.bytes_model_float - 0.5 * (report.bytes_float - report.bytes_quantized)
    assert sum(report.kernel.values()) == len(done)
    assert report.simulated == any(layer.simulated for layer in quantized_layers(pipe.denoiser).values())
    assert (report.latent_psnr is None) == chosen.data_free and all((record.error is None) == chosen.data_free for record in report.layers)
    # no float copy of a quantized weight is left, in the denoiser or anywhere else; all others are the same objects
    gc.collect()
    assert {name for name, weight in watched.items() if weight() is None} == set(done)
    # and the report reads back as it was
    report.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data.pop("sha256")  # of the file itself
    assert data == json.loads(json.dumps(report.to_json())) and data["layers"][0]["name"] == done[0] and data["ratio"] == report.ratio


def test_the_same_seed_and_recipe_give_the_same_codes() -> None:
    states = []
    for start in (1, 2):  # whatever the global random state
        torch.manual_seed(start)
        pipe = FakePipeline(TINY["WanTransformer3DModel"]())
        quantize(pipe, recipe("qvd-w4a8"))
        states.append(pipe.denoiser.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_calibration_serves_further_recipes_on_the_same_model() -> None:
    first = FakePipeline(TINY["WanTransformer3DModel"]())
    _, calibration = quantize_pipeline(first, recipe("qvd-w8a8"), PROMPTS, num_inference_steps=3)
    fresh, reused = FakePipeline(TINY["WanTransformer3DModel"]()), FakePipeline(TINY["WanTransformer3DModel"]())
    quantize(fresh, recipe("qvd-w6a6"))
    quantize(reused, recipe("qvd-w6a6"), calibration=calibration)
    assert len(reused.calls) < len(fresh.calls)
    for name, value in fresh.denoiser.state_dict().items():
        assert torch.equal(value, reused.denoiser.state_dict()[name]), name


# --- failures -------------------------------------------------------------------------------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException, call: int = 1) -> None:
    module, _, function = place.rpartition(".")
    owner = importlib.import_module(f"reelquant.{module}")
    original, seen = getattr(owner, function), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, function, wrapped)


# function -> the call of it that fails
STAGES = {
    "engine.run.calibrate_together": 1,
    "engine.session.sample": 3,
    "engine.store.build_group": 4,
    "engine.session.set_module": 9,
    "engine.session.mean_and_worst": 2,
    "reuse.temporal_table.add_table": 2,
    "reuse.temporal_table.drop_unused": 1,
    "engine.run._check": 1,
    "engine.run._account": 1,
}
BREAKS = [(stage, KeyboardInterrupt()) for stage in STAGES]
BREAKS += [("engine.session.set_module", error) for error in (CalibrationError("broken"), RuntimeError("out of memory"))]


@pytest.mark.parametrize(("stage", "error"), BREAKS, ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_the_pipeline_is_as_it_was_after_a_failure(stage: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FakePipeline(TINY["WanTransformer3DModel"]())
    before, clip_before = snapshot(pipe.denoiser), clip(pipe)
    fail_at(monkeypatch, stage, error, STAGES[stage])
    with pytest.raises(type(error)):
        quantize(pipe, recipe("qvd-w8a8", temporal="table"))
    assert_untouched(pipe.denoiser, before)
    assert torch.equal(clip(pipe), clip_before)


def test_folded_norms_come_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FakePipeline(TINY["UNetMotionModel"]())
    before = snapshot(pipe.denoiser)
    changed: list[bool] = []

    def check(session: Any, *rest: Any) -> None:
        changed.append(bool(session.norms))
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_check", check)
    with pytest.raises(KeyboardInterrupt):
        quantize(pipe, recipe("minmax-w8a8", steps=[{"transform": "shift"}, {"transform": "range_integrate"}]))
    assert changed == [True]
    assert_untouched(pipe.denoiser, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_name_the_layer(bad: float) -> None:
    pipe = FakePipeline(TINY["WanTransformer3DModel"]())
    with torch.no_grad():
        pipe.denoiser.blocks[1].attn1.to_out[0].weight[2, 3] = bad
    before = snapshot(pipe.denoiser)["modules"]
    with pytest.raises(CalibrationError, match=r"'blocks\.1\.attn1\.to_out\.0'"):
        quantize(pipe, recipe("w8a16"))
    assert snapshot(pipe.denoiser)["modules"] == before
    with pytest.raises(CalibrationError, match=r"the weight of layer 'blocks\.1\.attn1\.to_out\.0'"):
        quantize(pipe, recipe("minmax-w8a8"))
    assert not pipe.calls and snapshot(pipe.denoiser)["modules"] == before  # said before anything is sampled


def test_activations_that_are_not_finite_name_the_first_layer_and_step() -> None:
    pipe = FakePipeline(TINY["WanTransformer3DModel"]())
    before = snapshot(pipe.denoiser)

    def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * torch.inf if pipe.calls else output  # from the first sampling on: step 1 breaks every layer of the model

    handle = pipe.denoiser.blocks[1].norm2.register_forward_hook(poison)
    with pytest.raises(CalibrationError, match=r"'blocks.1.attn2.to_q' holds NaN or inf at step 0 \(timestep 1000\)"):
        quantize(pipe, recipe("minmax-w8a8"))
    handle.remove()
    assert_untouched(pipe.denoiser, before)


def test_no_prompts_and_nothing_to_do_are_errors() -> None:
    pipe = FakePipeline(TINY["WanTransformer3DModel"]())
    before = snapshot(pipe.denoiser)
    with pytest.raises(CalibrationError, match="got none"):
        quantize_pipeline(pipe, recipe("qvd-w8a8"), [])
    with pytest.raises(ReelQuantError, match="quantizes none"):
        quantize_pipeline(pipe, recipe("w8a16"), skip=["*"])
    assert_untouched(pipe.denoiser, before)


# --- tables of temporal outputs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def float_temporal(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Tensor]]:
    """Outputs of the float time projection by timestep, as the float model computes them."""
    pipe, seen = FakePipeline(TINY["WanTransformer3DModel"]()), {}
    pipe.denoiser.condition_embedder.time_proj.register_forward_hook(
        lambda module, args, out: seen.setdefault(len(seen), out.detach().clone())
    )
    clip(pipe)
    return seen


def test_tables_are_exact_at_stored_timesteps_and_fall_back_elsewhere(float_temporal: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipe = FakePipeline(TINY["WanTransformer3DModel"]())
    report = quantize(pipe, recipe("qvd-w6a6", temporal="table"))
    layers = quantized_layers(pipe.denoiser)
    tabled = {n for n, layer in layers.items() if layer.layout.table}
    assert tabled == {f"condition_embedder.{n}" for n in ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj")}
    unused = {n for n in tabled if layers[n].layout.unused}
    assert unused == {"condition_embedder.time_embedder.linear_1"}  # linear_2 is also read by the last norm
    assert report.bytes_tables == sum(layers[n].output_table.numel() * 4 for n in tabled - unused) and not hasattr(
        layers[min(unused)], "output_table"
    )
    outputs: list[Tensor] = []
    handle = layers["condition_embedder.time_proj"].register_forward_hook(lambda module, args, out: outputs.append(out.clone()))
    with caplog.at_level(logging.WARNING, "reelquant"):
        clip(pipe)
        assert not caplog.records
        # the float outputs themselves; a batch of another size multiplies in another order
        torch.testing.assert_close(torch.stack(outputs), torch.stack(list(float_temporal.values())), rtol=1e-5, atol=1e-6)
        kept = [one.clone() for one in outputs]
        outputs.clear()
        clip(pipe, steps=5)  # 1000 is stored, 800 ... 200 are not
    assert len(caplog.records) == 1 and "timestep 800 is none of the 3 in the table" in caplog.text
    assert torch.equal(outputs[0], kept[0])
    for layer in layers.values():
        if layer.layout.table:
            layer.clock = ()  # without a clock the layers always compute
    clock_free = []
    handle.remove()
    layers["condition_embedder.time_proj"].register_forward_hook(lambda module, args, out: clock_free.append(out.clone()))
    clip(pipe, steps=5)
    assert all(torch.equal(a, b) for a, b in zip(outputs[1:], clock_free[1:], strict=True)) and not torch.equal(outputs[0], clock_free[0])


def test_unused_layers_are_really_not_needed() -> None:
    pipe = FakePipeline(TINY["WanTransformer3DModel"]())
    quantize(pipe, recipe("qvd-w8a8", temporal="table"))
    before = clip(pipe)
    layers = [layer for layer in quantized_layers(pipe.denoiser).values() if layer.layout.unused]
    assert layers
    for layer in layers:
        layer.weight.data.zero_()
        layer.register_forward_hook(lambda module, args, out: torch.full_like(out, 1e9))
    assert torch.equal(clip(pipe), before)


def test_folded_layers_have_their_outputs_alone_and_refuse_other_timesteps() -> None:
    made = {}
    for word in ("table", "fold"):
        pipe = FakePipeline(TINY["WanTransformer3DModel"]())
        made[word] = pipe, quantize(pipe, recipe("qvd-w8a8", temporal=word)), clip(pipe)
    (table, stored, expected), (folded, report, found) = made.values()
    assert torch.equal(found, expected)
    layers = {name: layer for name, layer in quantized_layers(folded.denoiser).items() if layer.layout.table}
    assert len(layers) == 3 and all(layer.weight.numel() == 0 for layer in layers.values())
    weights = sum(quantized_layers(table.denoiser)[name].weight.numel() for name in layers)
    assert report.bytes_tables == stored.bytes_tables and stored.bytes_quantized - report.bytes_quantized > weights
    with pytest.raises(UnsupportedError, match=r"3 stored outputs has no weight \(temporal: fold\)"):
        clip(folded, steps=5)
    folded.components["transformer"] = copy.deepcopy(folded.denoiser)
    assert torch.equal(clip(folded), expected)


def test_a_layer_that_depends_on_more_than_the_timestep_has_no_table() -> None:
    pipe = FakePipeline(TINY["WanTransformer3DModel"]())
    embedder = pipe.denoiser.condition_embedder.time_embedder
    # the input of linear_1 differs between clips: as if a size or a guidance strength were mixed in
    embedder.linear_1.register_forward_pre_hook(lambda module, args: (args[0] + torch.arange(len(args[0]))[:, None] + len(pipe.calls),))
    report = quantize(pipe, recipe("minmax-w8a8", temporal="table"))
    layers = quantized_layers(pipe.denoiser)
    assert not any(layer.layout.table for layer in layers.values())
    refused = [text for text in report.warnings if "has no table" in text]
    assert len(refused) == 3 and "'condition_embedder.time_embedder.linear_1' has no table" in refused[0]
    assert "inputs leave the calibrated ranges" in report.warnings[-1]  # they grow with every call


def test_per_step_scales_follow_the_sampler() -> None:
    pipe = FakePipeline(TINY["WanTransformer3DModel"]())
    chosen = recipe("minmax-w8a8", **{"defaults.input.slots": "per_step"})
    quantize(pipe, chosen)
    layer = get_module(pipe.denoiser, "condition_embedder.time_proj")
    assert isinstance(layer, QuantLayer) and layer.input_scale.shape == (3, 1) and len(layer.input_scale.unique()) > 1
    slots: list[int] = []
    layer.register_forward_hook(lambda module, args, out: slots.append(int(module.clock[0].slot)))
    clip(pipe, steps=6)
    assert slots == [0, 0, 1, 1, 2, 2] or slots == [0, 1, 1, 2, 2, 2]  # 833 and 500 lie half way
