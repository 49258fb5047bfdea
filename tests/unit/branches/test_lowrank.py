"""The low-rank branch: what it takes over, and that nothing is lost when its layer is rewritten, saved, moved, compiled or adapted."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

import reelquant
from reelquant._errors import RecipeError, UnsupportedError
from reelquant.branches import Lowrank
from reelquant.engine.build import BuiltGroup, Context, build_group
from reelquant.engine.choice import Choice
from reelquant.engine.plan import estimated_bytes
from reelquant.recipes.recipe import load_recipe
from reelquant.sites import Layer
from reelquant.stages import LayerWork, Rewrite, Specs, StageSite
from reelquant.transforms import ScaleSearch
from tests.contracts.test_branches import output
from tests.contracts.test_layers import KINDS, ROTATED, SHIFTED, make
from tests.contracts.test_transforms import Normed
from tests.single import build, one_group, plan_of, statistics, unrounded
from tests.tiny.stock import realigned, wan_pipeline

INT4 = {"format": "int4", "granularity": "group-8"}
INT8 = {"format": "int8", "granularity": "channel"}
STEP = {"branch": "lowrank", "rank": 2}
MIXED = [{"transform": "scale"}, {"transform": "rotate", "always": True, "signs": True}, {"transform": "permute", "clusters": 2}, *SHIFTED]
REWRITES = {"none": [], "shifted": SHIFTED, "rotated": ROTATED, "mixed": MIXED}


def layer_of(weight: Tensor, rewrite: Rewrite | None = None) -> LayerWork:
    """A linear layer before anything was done to it."""
    rewrite = rewrite or Rewrite()
    specs = Specs(load_recipe({"name": "test", "defaults": {"weight": INT4}}).defaults.weight.spec())
    layer = Layer("layer", "Linear", "main", frozenset(), tuple(weight.shape))
    return LayerWork(StageSite(layer, specs), weight, rewrite.weight(weight), None, rewrite)


def works(kind: str, steps: Any) -> tuple[nn.Module, BuiltGroup, list[Tensor]]:
    """A built layer of a kind with what it was made of."""
    module, _, seen = make(kind, INT8, {"format": "int8"})
    model = nn.ModuleDict({"layer": module})
    map_ = one_group(model, ["layer"])
    plan = plan_of(model, map_, INT8, {"format": "int8"}, steps)
    context = Context(plan, model, {"layer": statistics(module, seen)}, [0.0], model.get_submodule)
    return module, build_group(context, map_.groups[0], Choice.first(plan.entries), keep_works=True), seen


# --- what the branch takes over -----------------------------------------------------------------------------------------------------


def test_the_largest_direction_leaves_the_codes() -> None:
    layer = Lowrank(rank=1).split(layer_of(torch.tensor([[4.0, 0.0], [0.0, 1.0], [0.0, 0.0]])))
    ((_, tensors),) = layer.branches
    sign, close = float(tensors["svd_up"][0, 0].sign()), functools.partial(torch.testing.assert_close, atol=1e-6, rtol=0)
    close(tensors["svd_up"].float(), torch.tensor([[2.0 * sign], [0.0], [0.0]]))  # both factors hold the root of 4
    close(tensors["svd_down"].float(), torch.tensor([[2.0 * sign, 0.0]]))
    close(layer.target, torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))


def test_directions_are_those_of_the_rewritten_weight() -> None:
    scale = torch.tensor([1.0, 8.0])  # the second channel is divided by 8, so its weight counts eightfold
    layer = Lowrank(rank=1).split(layer_of(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), Rewrite(scale=scale)))
    torch.testing.assert_close(layer.branch_weight(), torch.tensor([[0.0, 0.0], [0.0, 1.0]]), atol=0.004, rtol=0)  # 8 bits of the factors
    torch.testing.assert_close(layer.target, torch.tensor([[4.0, 0.0], [0.0, 0.0]]), atol=0.04, rtol=0)


def test_the_product_is_the_best_one_of_its_rank() -> None:
    made = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, 40, generator=made)).Q for n in (60, 50))
    values = 0.8 ** torch.arange(40)
    layer = Lowrank(rank=5).split(layer_of(left * values @ right.T))
    best = values[5:].square().sum().sqrt()
    assert float(layer.target.norm() / best) < 1.001


@pytest.mark.parametrize("steps", REWRITES.values(), ids=REWRITES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@torch.no_grad()
def test_branch_and_codes_are_the_float_layer(kind: str, steps: list[Any]) -> None:
    module, built, (x,) = works(kind, [*steps, STEP])
    work = built.works["layer"]
    weight = work.rewrite.weight(module.weight.float())
    torch.testing.assert_close(work.target + work.inside.weight(work.branch_weight()), weight, atol=1e-6, rtol=1e-6)
    layer = unrounded(built).layers["layer"]
    assert layer.svd_down.dtype == layer.svd_up.dtype == torch.bfloat16
    assert layer.svd_down.shape == (2, *module.weight.shape[1:]) and layer.svd_up.shape == (len(module.weight), 2)
    expected = module(x)
    assert float((layer(x) - expected).std() / expected.std()) < 0.01  # 8-bit weights, borders included


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv3d"])
@torch.no_grad()
def test_the_batch_axis_may_be_missing(kind: str) -> None:
    _, built, (x,) = works(kind, [STEP])
    layer = unrounded(built).layers["layer"]
    torch.testing.assert_close(layer(x[0]), layer(x)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_rewrite_in_the_norm_before_is_not_undone_by_the_branch() -> None:
    model = Normed(nn.LayerNorm(8), conv=False)
    nn.init.normal_(model.norm.bias, 3.0)
    seen = model.norm(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9))
    group = {"producer": "norm", "foldable": True, "fold_shift": True}
    built = unrounded(build(model, ("a", "b"), [seen], INT8, {"format": "int8"}, [*SHIFTED, STEP], **group))
    assert built.fold is not None
    difference = built.layers["a"](built.fold.input(seen)) - model.a(seen)
    assert float(difference.abs().amax()) < 0.05  # a lost constant of the branch would be some 3.0 times a weight


@torch.no_grad()
def test_the_error_falls_with_the_rank() -> None:
    made = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(64, 48)})
    outliers = torch.randn(48, 2, generator=made) @ torch.randn(2, 64, generator=made)
    model["layer"].weight.copy_(outliers + 0.05 * torch.randn(48, 64, generator=made))
    errors = []
    for rank in (0, 1, 2, 8, 32):
        layer = build(model, ["layer"], [torch.randn(9, 64)], INT4, None, [STEP | {"rank": rank}]).layers["layer"]
        errors.append(float((layer.dequantized_weight() - model["layer"].weight).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0] / 8  # both outlier directions are gone: codes span 0.05 instead of 1


# --- rank 0, narrow layers, errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folds", [False, True])
def test_rank_0_gives_the_very_same_layer(folds: bool) -> None:
    model = Normed(nn.LayerNorm(8), conv=False)
    seen = [torch.randn(64, 8) * torch.arange(1, 9) + 3]
    group = {"producer": "norm", "foldable": folds, "fold_shift": folds}
    layers = [
        build(model, ("a",), seen, INT4, {"format": "int8"}, [*SHIFTED, *branch, {"solve": "gptq"}], **group).layers["a"]
        for branch in ([], [STEP | {"rank": 0}])
    ]
    plain, none = (layer.state_dict() for layer in layers)
    assert layers[0].layout == layers[1].layout and list(plain) == list(none)
    assert all(torch.equal(plain[name], none[name]) for name in plain)


def test_a_share_bounds_the_rank_of_narrow_layers() -> None:
    branch = Lowrank(rank=32, share=0.25)
    assert [branch.rank_of(shape) for shape in ((512, 256), (64, 4, 3, 3), (16, 64), (3, 3))] == [32, 9, 4, 0]
    assert branch.tensors((3, 3)) == {} and not branch.split(layer_of(torch.randn(3, 3))).branches


def test_wrong_parameters_are_refused() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(8, 6)})
    plan = functools.partial(plan_of, model, one_group(model, ["layer"]), INT4, None)
    with pytest.raises(RecipeError, match="rank counts singular directions, 0 or more, got -1"):
        plan([STEP | {"rank": -1}])
    with pytest.raises(RecipeError, match=r"share of a weight's directions lies in \(0, 1\], got 2"):
        plan([STEP | {"share": 2}])
    with pytest.raises(UnsupportedError, match="layer 'layer': rank 7 exceeds the 6 directions of its 6 x 8 weight; lower it or set share"):
        plan([STEP | {"rank": 7}])
    with pytest.raises(UnsupportedError, match="layer 'layer': it has a low-rank branch already; raise the rank of that one"):
        plan([STEP, STEP])


def test_the_library_recipe_bounds_the_rank() -> None:
    (branch,) = [entry.stage for entry in load_recipe("lowrank-w4a8").entries if isinstance(entry.stage, Lowrank)]
    assert branch.rank_of((3072, 3072)) == 32 and branch.rank_of((192, 192)) == 19


def test_a_branch_of_svdquant_takes_a_sixth_of_a_narrow_layer_and_a_twentieth_of_a_wide_one() -> None:
    recipe = load_recipe("svdquant-w4a4")
    (branch,) = [entry.stage for entry in recipe.entries if isinstance(entry.stage, Lowrank)]
    (search,) = [entry.stage for entry in recipe.entries if isinstance(entry.stage, ScaleSearch)]
    assert (search.rank, search.share) == (branch.rank, branch.share) and branch.rank_of((192, 768)) == 8
    for width, share in ((1536, 0.16), (5120, 0.05)):
        shape = (width, width)
        added = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in branch.tensors(shape).values())
        stored = estimated_bytes(recipe.defaults.weight.spec(), shape) + 4 * width  # with a bias
        assert branch.rank_of(shape) == 32 and added / stored < share


# --- a layer of a pipeline ----------------------------------------------------------------------------------------------------------

RECIPE = {
    "name": "lowrank",
    "defaults": {"weight": INT4},
    "rules": [{"on": "role:entry | role:exit", "skip": True}],
    "steps": [{"branch": "lowrank", "rank": 4, "on": "*.to_q | *.to_v | *.net.2"}],
    "calibrate": None,
}


@functools.cache
def quantized() -> Any:
    """A quantized pipeline; tests must not change it."""
    pipe = wan_pipeline()
    reelquant.quantize(pipe, RECIPE)
    return pipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reelquant.save(quantized(), tmp_path_factory.mktemp("lowrank") / "out")


def model() -> Any:
    return copy.deepcopy(quantized().transformer)


def test_a_loaded_model_is_bit_equal(saved: Path) -> None:
    loaded = realigned(WanTransformer3DModel.from_pretrained(saved, subfolder="transformer"))
    stored, state = loaded.state_dict(), quantized().transformer.state_dict()
    assert sum(name.endswith("svd_up") for name in stored) == 10
    assert list(stored) == list(state) and all(torch.equal(stored[name], state[name]) for name in state)
    layer = loaded.blocks[0].attn1.to_q
    assert layer.layout.branches == (Lowrank(rank=4),)
    assert torch.equal(output(loaded), output(realigned(model())))


def test_compiled_offloaded_and_adapted_models_give_the_same() -> None:
    expected = output(quantized().transformer)
    torch._dynamo.reset()
    torch.testing.assert_close(output(torch.compile(model(), backend="eager", fullgraph=True)), expected, atol=1e-5, rtol=1e-5)
    offloaded = model()
    cpu_offload(offloaded, torch.device("cpu"), offload_buffers=True)
    assert offloaded.blocks[0].attn1.to_q.svd_down.is_meta and torch.equal(output(offloaded), expected)
    grouped, cpu = model(), torch.device("cpu")
    grouped.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(output(grouped), expected)
    adapted = model()
    adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    torch.testing.assert_close(output(adapted), expected)  # a fresh adapter adds zero


def test_an_adapter_is_trained_through_the_branch() -> None:
    layer = model().blocks[0].attn1.to_q
    x = torch.randn(3, layer.in_features, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, layer.dequantized_weight().sum(0).expand(3, -1), atol=1e-5, rtol=1e-5)


def test_exporters_fold_the_branch_and_graphs_refuse_it(saved: Path, tmp_path: Path) -> None:
    made = reelquant.export(saved, "torchao", tmp_path / "torchao")
    folded = [outcome for outcome in made.of("requantized") if outcome.why == "the branch 'lowrank' is folded into the weight"]
    assert len(folded) == 10 and max(outcome.error for outcome in folded) < 1e-3
    pytest.importorskip("openvino")
    with pytest.raises(UnsupportedError, match="has the feature 'branch lowrank'"):
        reelquant.configure(DiffusionPipeline.from_pretrained(saved), runtime="openvino")
