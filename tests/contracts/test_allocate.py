"""Every member of ALLOCATORS: the budget is met, twice the same, never worse than one format for all, and float again after a failure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from reelquant.allocate import ALLOCATORS
from reelquant.discover import discover
from reelquant.engine import components
from reelquant.engine.report import Report
from reelquant.engine.run import quantize_pipeline
from reelquant.nn import QuantLayer, quantized_layers
from reelquant.recipes.recipe import load_recipe
from reelquant.stages import Specs
from tests.allocation import Work
from tests.tiny.configs import TINY
from tests.tiny.pipelines import FakePipeline

MODEL = "WanTransformer3DModel"
MAPS: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the tiny model once."""

    def cached(denoiser: nn.Module) -> Any:
        return MAPS.get(MODEL) or MAPS.setdefault(MODEL, discover(denoiser))

    monkeypatch.setattr(components, "discover", cached)


def chosen(name: str, bits: float, **options: Any) -> tuple[Work, dict[str, Specs]]:
    work = Work()
    specs = dict(ALLOCATORS[name](bits=bits, **options).choose_specs(work))
    assert set(specs) == set(work.specs)
    return work, specs


def quantized(name: str, pipe: FakePipeline, **options: Any) -> Report:
    """A tiny model whose main layers get formats by this member; all others have 3 bits."""
    recipe = load_recipe(
        {
            "name": "mixed",
            "defaults": {"weight": {"format": "int3", "granularity": "channel"}, "input": {"format": "uint8"}},
            "calibrate": {"prompts": 2},
            "search": {"prompts": 1},
            "steps": [{"allocate": name, "on": "role:main", **options}],
        }
    )
    return quantize_pipeline(pipe, recipe, ["a red circle", "a blue square", "held out"], num_inference_steps=3)[0]


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("bits", [4.5, 5.2, 7.0])
def test_the_budget_is_met_to_one_percent(name: str, bits: float) -> None:
    work, specs = chosen(name, bits)
    assert 0.99 * bits <= 8 * work.stored(specs) / work.weights <= bits * (1 + 1e-6)
    assert work.advanced == work.announced and not work.warnings


@pytest.mark.parametrize("name", ALLOCATORS)
def test_two_runs_choose_the_same(name: str) -> None:
    assert chosen(name, 5.0)[1] == chosen(name, 5.0)[1]


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("bits", [4.5, 6.2])
def test_no_uniform_format_of_as_many_bytes_is_predicted_to_do_less_damage(name: str, bits: float) -> None:
    work, specs = chosen(name, bits, calls=8)
    tried = {name: list(dict.fromkeys(row)) for name, row in work.tried.items()}
    uniform = [dict(zip(tried, column, strict=True)) for column in zip(*tried.values(), strict=True)]
    within = [one for one in uniform if work.stored(one) <= work.stored(specs)]
    assert len(within) >= 1
    for one in within:
        assert work.damage(specs) <= work.damage(one) * (1 + 1e-6)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_what_is_stored_keeps_the_budget_and_other_layers_keep_their_numbers(name: str) -> None:
    pipe = FakePipeline(TINY[MODEL]())
    report = quantized(name, pipe, bits=6.2)
    main = {record.name for record in report.layers if record.role == "main"}
    layers = quantized_layers(pipe.denoiser)
    stored = sum(layers[name].weight.numel() + layers[name].weight_scale.nbytes for name in main)
    weights = sum(math.prod(MAPS[MODEL].layers[name].shape) for name in main)
    assert 0.98 * 6.2 <= 8 * stored / weights <= 6.2 * (1 + 1e-6)  # few and small layers: sums are coarse
    assert {record.weight for record in report.layers if record.name not in main} == {"int3 channel"}
    assert len({record.weight for record in report.layers if record.name in main}) > 1


@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_failure_while_measuring_leaves_the_model_float(name: str) -> None:
    pipe = FakePipeline(TINY[MODEL]())
    before = {key: value.clone() for key, value in pipe.denoiser.state_dict().items()}
    modules = [id(module) for module in pipe.denoiser.modules()]
    counted: list[int] = []

    def break_a_draft(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        counted.append(sum(isinstance(part, QuantLayer) for part in module.modules()))
        if sum(count > 0 for count in counted) == 5:
            raise KeyboardInterrupt

    handle = pipe.denoiser.register_forward_hook(break_a_draft, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        quantized(name, pipe, bits=6.2)
    handle.remove()
    assert counted[-1] > 0
    assert [id(module) for module in pipe.denoiser.modules()] == modules
    after = pipe.denoiser.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert not any(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in pipe.denoiser.modules())


@pytest.mark.parametrize("name", ALLOCATORS)
def test_inputs_keep_their_numbers(name: str) -> None:
    work = Work()
    work.specs = {layer: replace_input(specs, number) for number, (layer, specs) in enumerate(work.specs.items())}
    found = ALLOCATORS[name](bits=5.0).choose_specs(work)
    assert {layer: one.input for layer, one in found.items()} == {layer: one.input for layer, one in work.specs.items()}


def replace_input(specs: Specs, number: int) -> Specs:
    return specs._replace(input=None if number % 2 else replace(specs.weight))
