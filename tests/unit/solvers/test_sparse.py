from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reelquant
from reelquant._errors import RecipeError, UnsupportedError
from reelquant.checkpoint.verify import layer_sum, tile_checksum
from reelquant.discover import denoiser_of
from reelquant.formats import Kept, fit
from reelquant.nn import QuantLayer, quantized_layers
from reelquant.recipes.recipe import load_recipe
from reelquant.solvers import SOLVERS, Problem, Sparse
from tests.contracts.test_solvers import correlated, spec_of
from tests.single import build, one_group, plan_of
from tests.tiny.stock import CALL, PROMPTS, wan_pipeline

STEPS = [{"solve": "sparse", "correct_bias": True}]


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("keep", ["2:4", "1:2", "5:8"])
def test_every_group_keeps_as_many_weights_as_it_should(keep: str, compensate: bool) -> None:
    problem = Problem(torch.randn(16, 48), spec_of("int8", "channel"), correlated(48))
    values = Sparse(keep, compensate).solve(problem).values
    pattern = Kept.parse(keep)
    left = pattern.in_groups((values != 0).float()).sum(-1)
    assert bool((left <= pattern.keep).all()) and float(left.mean()) > 0.95 * pattern.keep  # some kept weights round to zero


def test_the_largest_weights_by_hand() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.5]])
    values = Sparse(compensate=False).solve(Problem(weight, spec_of("int8", "channel"))).values
    assert torch.equal(values != 0, torch.tensor([[False, True, False, True, True]]))
    torch.testing.assert_close(values, weight * (values != 0), rtol=0, atol=4.0 / 127 / 2 * 1.01)  # half a step; scales are bfloat16


def by_the_book(problem: Problem, keep: int, of: int, damping: float) -> Tensor:
    """Column by column with the inverse itself, in float64: the update of optimal brain surgery, and none of our code."""
    covariance = problem.covariance.double()
    inverse = torch.linalg.inv(covariance + damping * torch.diag(covariance.diagonal()))
    quantizer, work = fit(problem.spec, problem.weight), problem.weight.double().clone()
    full = inverse.clone()
    pivots = []  # [H^-1]_cc once all columns to the left are decided
    for column in range(work.shape[1]):
        pivots.append(full[column, column].clone())
        full = full - torch.outer(full[:, column], full[column]) / full[column, column]
    out = torch.zeros_like(problem.weight)
    for column in range(work.shape[1]):
        if column % of == 0:
            group = range(column, min(column + of, work.shape[1]))
            scores = torch.stack([work[:, one].square() / pivots[one] for one in group], 1)
            stays = torch.zeros_like(scores, dtype=torch.bool)
            stays.scatter_(1, scores.argsort(1, descending=True)[:, :keep], True)
        rounded = quantizer.round_columns(work[:, column : column + 1].float(), column)[:, 0]
        out[:, column] = torch.where(stays[:, column % of], rounded, 0.0)
        error = (work[:, column] - out[:, column].double()) / inverse[column, column]
        work -= torch.outer(error, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return out


@pytest.mark.parametrize("block", [4, 64])
def test_compensation_is_the_published_algorithm(block: int) -> None:
    problem = Problem(torch.randn(8, 22), spec_of("int4", "channel"), correlated(22, noise=0.5))
    found = Sparse(block=block).solve(problem)
    assert torch.equal(found.values, by_the_book(problem, 2, 4, 0.01))


def test_compensation_beats_the_largest_weights_where_inputs_are_correlated() -> None:
    problem = Problem(torch.randn(16, 48), spec_of("int8", "channel"), correlated(48))
    found = Sparse().checked(problem)
    assert found.replaced is None and found.solver == "sparse"
    assert problem.objective(found.values) < 0.3 * problem.objective(Sparse(compensate=False).solve(problem).values)


def test_the_largest_weights_need_no_data() -> None:
    recipe = {"name": "pruned", "defaults": {"weight": {"format": "int8"}}, "calibrate": None}
    assert load_recipe(recipe | {"steps": [{"solve": "sparse", "compensate": False}]}).data_free
    with pytest.raises(RecipeError, match="needs statistics"):
        load_recipe(recipe | {"steps": [{"solve": "sparse"}]})


def with_zeros(module: Any, pruned: QuantLayer) -> QuantLayer:
    """A layer of the same codes that stores all of them."""
    layout = replace(pruned.layout, weight=replace(pruned.layout.weight, kept=""))
    layer: QuantLayer = type(pruned).like(module, layout)
    layer.load_state_dict(pruned.state_dict() | {"weight": pruned.packed.codes.clone()})
    return layer


@pytest.mark.parametrize("weight", [("int8", "channel"), ("int4", "group-8"), ("uint4", "channel"), ("e2m1", "group-8")])
@pytest.mark.parametrize("module", [lambda: nn.Linear(20, 6), lambda: nn.Conv2d(5, 6, 3, padding=1)], ids=["linear", "conv"])
def test_layers_compute_with_zeros_and_store_none_of_them(weight: tuple[str, str], module: Any) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(module())
    shape = (7, 20) if isinstance(model[0], nn.Linear) else (2, 5, 4, 4)
    calls = [torch.randn(shape) for _ in range(3)]
    spec = {"format": weight[0], "granularity": weight[1]}
    layer = build(model, ["0"], calls, spec, {"format": "int8"}, STEPS).layers["0"]
    width, bits = model[0].weight[0].numel(), layer.packed.quantizer.format.bits
    assert layer.weight.shape == (6, Kept(2, 4).row_bytes(width, bits)) and layer.weight.dtype == torch.uint8
    dense = layer.dequantized_weight().flatten(1)
    assert bool((Kept(2, 4).in_groups((dense != 0).float()).sum(-1) <= 2).all())
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    sums = tile_checksum(layer), layer_sum(layer)
    assert torch.equal(layer(calls[0]), with_zeros(model[0], layer)(calls[0]))  # a kernel may hold the weight from here on
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert (tile_checksum(layer), layer_sum(layer)) == sums


def test_a_pipeline_is_smaller_and_opens_again(tmp_path: Path) -> None:
    recipe = {
        "name": "pruned",
        "defaults": {"weight": {"format": "int8", "granularity": "channel"}},
        "rules": [{"on": "role:entry | role:exit", "skip": True}],
        "calibrate": {"prompts": 2, "steps": 3, "probes": 0},
    }
    files, outputs = {}, {}
    for name, solver in {"all": {"solve": "gptq"}, "half": {"solve": "sparse"}}.items():
        pipe = wan_pipeline()
        report = reelquant.quantize(pipe, recipe | {"steps": [solver]}, PROMPTS, **CALL)
        reelquant.save(pipe, tmp_path / name, report)
        files[name] = report.bytes_quantized
        outputs[name] = pipe
    opened = quantized_layers(denoiser_of(reelquant.load(tmp_path / "half"))[1])
    there = quantized_layers(denoiser_of(outputs["half"])[1])
    pruned = [name for name, layer in opened.items() if layer.layout.weight.kept == "2:4"]
    assert pruned and all(torch.equal(opened[name].codes, there[name].codes) for name in opened)
    assert files["half"] < 0.85 * files["all"]
    with pytest.raises(UnsupportedError, match="removed weights"):
        reelquant.export(tmp_path / "half", "gguf", tmp_path / "model.gguf")


def test_training_does_not_bring_removed_weights_back() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    steps = [*STEPS, {"reconstruct": "adaround", "scope": "layer"}]
    with pytest.raises(UnsupportedError, match="of which weights were removed"):
        plan_of(model, one_group(model, ["0"]), {"format": "int8"}, None, steps)


def test_plans_know_the_size() -> None:
    model = nn.Sequential(nn.Linear(64, 10))
    plain, pruned = (
        plan_of(model, one_group(model, ["0"]), {"format": "int8", "granularity": "channel"}, None, steps) for steps in ([], STEPS)
    )
    assert plain.quantized[0].bytes_after - pruned.quantized[0].bytes_after == 10 * (64 - 40)


def test_parameters_that_make_no_sense_are_refused() -> None:
    for wrong in ({"keep": "4:2"}, {"damping": 0.0}, {"block": 0}):
        with pytest.raises(RecipeError):
            SOLVERS["sparse"](**wrong)
