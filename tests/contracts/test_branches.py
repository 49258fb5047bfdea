"""What every branch can rely on: its tensors are saved, moved, copied, offloaded and compiled with the layer, without an edit anywhere."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

import reelquant
from reelquant._errors import CheckpointError, RecipeError, UnsupportedError
from reelquant.branches import BRANCHES, Branch, TensorSpec, branch_name, register_branch
from reelquant.checkpoint import Stored
from reelquant.clock import Clock
from reelquant.kernels.activations import ACTIVATIONS
from reelquant.nn import LayerLayout, QuantLayer, TensorLayout, dequantized, quantized_layers, start_clock
from reelquant.stages import LayerWork
from tests.contracts.test_layers import KINDS, make
from tests.contracts.test_transforms import Normed
from tests.single import build, one_group, plan_of, unrounded
from tests.tiny.stock import wan_pipeline

MEMBERS = sorted(BRANCHES)
SMALL: dict[str, dict[str, Any]] = {"lowrank": {"rank": 2}}  # parameters for the few channels of these layers, where defaults are too large


@dataclass(frozen=True)
class Extra(Branch):
    """Adds the product of the raw input with a float weight."""

    gain: float = 1.0

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {"extra_weight": TensorSpec(shape, torch.bfloat16)}

    def run(self, inner: Any, x: Tensor, moment: Any, tensors: Any, window: Any) -> Tensor:
        weight = tensors["extra_weight"].to(x.dtype) * self.gain
        product = F.linear(x, weight) if window is None else window.convolve(F.pad(x, window.padding), weight)
        return inner(x) + product

    def weight(self, tensors: Any, shape: tuple[int, ...]) -> Tensor | None:
        return tensors["extra_weight"].float() * self.gain


@dataclass(frozen=True)
class Squared(Branch):
    """Adds something that is not a product with a weight."""

    exports = "the square of an input is not a weight"

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {"square_gain": TensorSpec((1,), torch.float32)}

    def run(self, inner: Any, x: Tensor, moment: Any, tensors: Any, window: Any) -> Tensor:
        return inner(x) + tensors["square_gain"] * x.square().mean()

    def weight(self, tensors: Any, shape: tuple[int, ...]) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Half(Extra):
    """Takes half of a weight over."""

    gain: float = 1.0

    def split(self, layer: LayerWork) -> LayerWork:
        raw = layer.target / 2 if layer.inside.scale is None else layer.target / 2 / layer.inside.scale
        tensors = {"extra_weight": raw.bfloat16()}
        return layer.with_branch(self, tensors, layer.target - layer.inside.weight(self.weight(tensors, tuple(layer.weight.shape))))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_branch("extra", Extra)
    register_branch("squared", Squared)
    register_branch("half", Half)
    yield
    del BRANCHES["extra"], BRANCHES["squared"], BRANCHES["half"]


def attach(layer: QuantLayer, branch: Branch) -> QuantLayer:
    """Put a branch with random tensors into a layer."""
    layer.layout = replace(layer.layout, branches=(*layer.layout.branches, branch))
    for name, spec in branch.tensors(layer.weight_shape).items():
        layer.register_buffer(name, (0.1 * torch.randn(spec.shape)).to(spec.dtype))
    return layer


def with_branch(kind: str, branch: Branch | None = None, **more: Any) -> tuple[QuantLayer, QuantLayer, Tensor]:
    """A layer without its branch, the same with it, and an input."""
    _, plain, seen = make(kind, {"format": "int8"}, {"format": "int8"}, **more)
    return plain, attach(copy.deepcopy(plain), branch or Extra(0.5)), seen[0]


KIND_NAMES = ["Linear", "Linear without bias", "Conv2d", "Conv2d same"]


@torch.no_grad()
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_the_branch_is_added_to_the_product_before_the_activation(kind: str) -> None:
    plain, layer, x = with_branch(kind)
    product = layer.operands.product(layer.operands.padded(x), 0.5 * layer.extra_weight.float())
    torch.testing.assert_close(layer(x), plain(x) + product)
    for name, function in ACTIVATIONS.items():
        torch.testing.assert_close(layer.activated(x, name), function(layer(x)))


@torch.no_grad()
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_tensors_follow_the_layer(kind: str) -> None:
    _, layer, x = with_branch(kind)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    twin.extra_weight.zero_()
    assert torch.equal(layer(x), expected) and not torch.equal(twin(x), expected)
    empty = type(layer).like(KINDS[kind][1](), layer.layout)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), expected)
    assert empty.bfloat16().extra_weight.dtype == torch.bfloat16 and empty.half().weight_scale.dtype == layer.weight_scale.dtype


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_a_compiled_layer_gives_the_same_bits(kind: str) -> None:
    _, layer, x = with_branch(kind)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@torch.no_grad()
@pytest.mark.parametrize("inputs", ["float", "8-bit"])
def test_protected_steps_have_the_branch_too(inputs: Any) -> None:
    plain, layer, x = with_branch("Linear", calls=2)
    start_clock(nn.ModuleList([plain, layer]), Clock((900.0, 100.0), (0,), inputs), "input")
    for time in (900.0, 100.0):
        plain.clock[0].tick(time)
        torch.testing.assert_close(layer(x), plain(x) + F.linear(x, 0.5 * layer.extra_weight.float()))


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_the_float_layer_and_the_gradient_hold_the_branch(kind: str) -> None:
    plain, layer, x = with_branch(kind)
    share = 0.5 * layer.extra_weight.float()
    torch.testing.assert_close(layer.dequantized_weight(), plain.dequantized_weight() + share)
    torch.testing.assert_close(dequantized(layer, torch.float32).weight, plain.dequantized_weight() + share)
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    (base,) = torch.autograd.grad(plain(x).sum(), x)
    (added,) = torch.autograd.grad(layer.operands.product(layer.operands.padded(x), share).sum(), x)
    torch.testing.assert_close(gradient, base + added)


def test_a_branch_that_is_not_a_weight_runs_and_has_no_float_weight() -> None:
    plain, layer, x = with_branch("Linear", Squared())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x) + layer.square_gain * x.square().mean())
    with pytest.raises(UnsupportedError, match=r"branch 'squared' of a layer of shape \(7, 10\) is not a product with a weight"):
        layer.dequantized_weight()


@torch.no_grad()
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("folds", [False, True])
def test_a_branch_reads_what_the_layer_reads_wherever_the_rewrite_happens(folds: bool, corrected: bool) -> None:
    model = Normed(nn.LayerNorm(8), conv=False)
    nn.init.normal_(model.norm.bias, 3.0)
    seen = model.norm(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9))
    steps = [{"transform": "shift"}, {"transform": "range_integrate", "power": 0.5}, {"branch": "half"}]
    steps += [{"solve": "nearest", "correct_bias": corrected}]
    weight, group = {"format": "int8", "granularity": "channel"}, {"producer": "norm", "foldable": folds, "fold_shift": folds}
    built = unrounded(build(model, ("a", "b"), [seen], weight, {"format": "int8"}, steps, **group))
    assert (built.fold is not None) == folds
    read = seen if built.fold is None else built.fold.input(seen)
    difference = built.layers["a"](read) - model.a(seen)
    # half of each weight is rounded to 127 steps; the shifts that a wrong bias would miss are some 3.0 large
    assert float(difference.abs().amax()) < 0.05
    if corrected:
        assert float(difference.mean(0).abs().amax()) < 1e-5
    assert built.records[0].error is not None and built.records[0].error < 1e-3


@pytest.mark.parametrize("name", MEMBERS)
def test_tensors_lie_in_memory_as_a_file_gives_them(name: str) -> None:
    """Products of a matrix that lies by columns sum in another order, and a model that is opened again would differ from this one."""
    branch = {"branch": name, **SMALL.get(name, {})}
    built = build(nn.ModuleDict({"layer": nn.Linear(16, 12)}), ["layer"], [torch.randn(4, 16)], {"format": "int8"}, None, [branch])
    layer = built.layers["layer"]
    stored = [value for one in layer.layout.branches for value in layer.branch_tensors(one).values()]
    assert stored and all(value.is_contiguous() for value in stored)


def test_plans_and_reports_count_what_a_branch_stores() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(8, 6)})
    map_, weight, steps = one_group(model, ["layer"]), {"format": "int8", "granularity": "channel"}, [{"branch": "half", "gain": 0.5}]
    planned, plain = (plan_of(model, map_, weight, None, some).layers["layer"] for some in (steps, ()))
    record = build(model, ["layer"], [torch.randn(4, 8)], weight, None, steps).records[0]
    assert planned.bytes_after == plain.bytes_after + 8 * 6 * 2 == record.bytes_after
    assert record.options == {"half.gain": 0.5}


def test_layouts_are_read_back_and_unknown_branches_refused() -> None:
    layout = LayerLayout(TensorLayout("int8", "channel"), branches=(Extra(0.25), Squared()))
    data = json.loads(json.dumps(layout.to_json()))
    assert data["branches"] == {"extra": {"gain": 0.25}, "squared": {}}
    assert LayerLayout.from_json(data) == layout and layout.features == {"branch extra", "branch squared"}
    with pytest.raises(CheckpointError, match="unknown branch 'extar'; did you mean 'extra'"):
        LayerLayout.from_json(data | {"branches": {"extar": {}}})
    with pytest.raises(CheckpointError, match=r"branch 'extra' does not take the options \{'rank': 3\}"):
        LayerLayout.from_json(data | {"branches": {"extra": {"rank": 3}}})
    with pytest.raises(RecipeError, match="'extra' is Extra already"):
        register_branch("extra", Squared)


# --- the members of the table ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MEMBERS)
def test_members_compute_the_weight_that_they_name(name: str, kind: str) -> None:
    branch = BRANCHES[name](**SMALL.get(name, {}))
    plain, layer, x = with_branch(kind, branch)
    weight = branch.weight(layer.branch_tensors(branch), layer.weight_shape)
    if weight is None:
        assert branch.exports is not None, "exporters have to refuse what is not a weight"
        return
    product = layer.operands.product(layer.operands.padded(x), weight)
    torch.testing.assert_close(layer(x), plain(x) + product, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MEMBERS)
def test_members_leave_the_float_weight_as_it_was(name: str, kind: str) -> None:
    weight, steps = {"format": "int8", "granularity": "channel"}, [{"branch": name, **SMALL.get(name, {})}]
    module, layer, _ = make(kind, weight, None, steps)
    assert [branch_name(branch) for branch in layer.layout.branches] == [name]
    assert LayerLayout.from_json(json.loads(json.dumps(layer.layout.to_json()))) == layer.layout
    error = (layer.dequantized_weight() - module.weight).abs().amax()
    assert float(error / module.weight.abs().amax()) < 0.01  # 8 bits of what the branch left


# --- a whole pipeline ---------------------------------------------------------------------------------------------------------------


def branched(branch: Branch) -> Any:
    """A Wan in 8 bits, every other layer of which has a branch."""
    pipe = wan_pipeline()
    reelquant.quantize(pipe, "w8a16")
    for layer in list(quantized_layers(pipe.transformer).values())[::2]:
        attach(layer, branch)
    return pipe


@torch.no_grad()
def output(model: Any) -> Tensor:
    made = torch.Generator().manual_seed(0)
    channels, text = model.config.in_channels, model.config.text_dim
    noise, prompt = torch.randn(1, channels, 3, 8, 8, generator=made), torch.randn(1, 5, text, generator=made)
    return model(hidden_states=noise, timestep=torch.tensor([500.0]), encoder_hidden_states=prompt, return_dict=False)[0]


def test_a_saved_pipeline_opens_bit_equal_and_exports_folded(tmp_path: Path) -> None:
    pipe = branched(Extra(0.5))
    folder = reelquant.save(pipe, tmp_path / "out")
    loaded = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    assert torch.equal(output(loaded), output(pipe.transformer))
    states = pipe.transformer.state_dict(), loaded.state_dict()
    assert list(states[0]) == list(states[1]) and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    made = reelquant.export(folder, "torchao", tmp_path / "torchao")
    why = {outcome.why for outcome in made.of("requantized")}
    assert why == {"the branch 'extra' is folded into the weight"} and max(outcome.error for outcome in made.of("requantized")) < 1e-3
    config = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert Stored.from_json(config).layers == {name: layer.layout for name, layer in quantized_layers(loaded).items()}


def test_exporters_and_graphs_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    pipe = branched(Squared())
    folder = reelquant.save(pipe, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="has the branch 'squared', and the square of an input is not a weight"):
        reelquant.export(folder, "torchao", tmp_path / "torchao")
    pytest.importorskip("openvino")
    with pytest.raises(UnsupportedError, match="has the feature 'branch squared'"):
        reelquant.configure(pipe, runtime="openvino")


def test_adapters_and_offloading_leave_the_branch_alone() -> None:
    pipe = branched(Extra(0.5))
    expected = output(pipe.transformer)
    model = copy.deepcopy(pipe.transformer)
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(output(model), expected)
    layer = next(layer for layer in quantized_layers(model).values() if layer.layout.branches)
    assert layer.extra_weight.is_meta
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    torch.testing.assert_close(output(pipe.transformer), expected)  # a fresh adapter adds zero
