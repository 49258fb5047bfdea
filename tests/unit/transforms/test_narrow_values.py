"""Values of attention with fewer channels: the mathematics, what is stored, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

import reelquant
from reelquant._errors import RecipeError, UnsupportedError
from reelquant.discover import discover
from reelquant.nn import quantized_layers
from reelquant.recipes.recipe import load_recipe
from reelquant.transforms import NarrowValues
from reelquant.transforms.narrow_values import Moments, Pair, directions, look, narrow
from tests.tiny.stock import CALL, PROMPTS, contents, frames, stored_pipeline, wan_pipeline

HEADS, WIDTH, KEPT = 2, 8, 6
RECIPE: dict[str, Any] = {
    "name": "narrow",
    "defaults": {
        "weight": {"format": "int8", "granularity": "channel"},
        "input": {"format": "int8", "granularity": "token", "dynamic": True},
    },
    "rules": [{"on": "role:entry | role:exit", "skip": True}],
    "calibrate": {"prompts": 2, "steps": 3, "probes": 0},
}
NARROW = {"transform": "narrow_values", "keep": KEPT / WIDTH, "clips": 2, "calls": 4}
GPTQ = {"solve": "gptq", "correct_bias": True}


def with_steps(*steps: dict[str, Any]) -> dict[str, Any]:
    return RECIPE | {"steps": list(steps)}


# --- the mathematics ----------------------------------------------------------------------------------------------------------------


def projections(bias: bool = True) -> Pair:
    torch.manual_seed(0)
    values, reader = nn.Linear(12, HEADS * WIDTH, bias=bias).double(), nn.Linear(HEADS * WIDTH, 10, bias=bias).double()
    return Pair(values, reader, HEADS)


def attention(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the output projection reads and gives: softmax of random scores, head by head, as the definition has it."""
    scores = torch.randn(HEADS, len(x), len(x), generator=torch.Generator().manual_seed(1), dtype=x.dtype).softmax(-1)
    values = pair.values(x).unflatten(-1, (HEADS, WIDTH)).movedim(1, 0)
    mixed = (scores @ values).movedim(0, 1).flatten(1)
    return mixed, pair.reader(mixed)


def moments(mixed: Tensor) -> Moments:
    rows = mixed.unflatten(-1, (HEADS, WIDTH)).movedim(1, 0)
    mean = rows.mean(1, keepdim=True)
    return Moments(mean.squeeze(1), (rows - mean).mT @ (rows - mean) / rows.shape[1])


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_all_channels_give_the_same_output(bias: bool) -> None:
    pair, x = projections(bias), torch.randn(50, 12, dtype=torch.float64)
    before = pair.values.weight.clone()
    mixed, expected = attention(pair, x)
    narrow(pair, moments(mixed), WIDTH)
    assert not torch.allclose(pair.values.weight, before)
    torch.testing.assert_close(attention(pair, x)[1], expected)


@torch.no_grad()
def test_the_error_is_that_of_the_nearest_matrix_and_its_mean_is_zero() -> None:
    """Eckart and Young, head by head: the sum of the squares of the singular values that are left out."""
    pair, x = projections(), torch.randn(200, 12, dtype=torch.float64) + 3
    pair.reader.weight[:, WIDTH:] = 0  # one head: errors of two would add up with their correlation
    mixed, expected = attention(pair, x)
    seen, weight = moments(mixed), pair.reader.weight[:, :WIDTH].clone()
    sizes, axes = torch.linalg.eigh(seen.covariance[0])
    lost = torch.linalg.svdvals(weight @ axes * sizes.sqrt())[KEPT:].square().sum()
    narrow(pair, seen, KEPT)
    error = attention(pair, x)[1] - expected
    torch.testing.assert_close(error.square().sum(1).mean(), lost)
    assert float(error.mean(0).abs().amax()) < 1e-12 < float(lost)
    for matrix in (pair.values.weight, pair.reader.weight.T):
        empty = matrix.unflatten(0, (HEADS, WIDTH)).abs().amax(-1) == 0
        assert bool(empty[:, KEPT:].all()) and not bool(empty[0, :KEPT].any())


@torch.no_grad()
def test_a_channel_that_never_moves_costs_nothing() -> None:
    pair, x = projections(), torch.randn(50, 12, dtype=torch.float64)
    pair.values.weight[[3, WIDTH]] = 0
    mixed, expected = attention(pair, x)
    narrow(pair, moments(mixed), WIDTH - 1)
    torch.testing.assert_close(attention(pair, x)[1], expected)


def test_inputs_decide_which_directions_are_left() -> None:
    """Both columns weigh the same; the second channel is ten times as large."""
    basis, output = directions(torch.eye(2, dtype=torch.float64)[None], torch.diag(torch.tensor([1.0, 100.0]).double())[None], 1)
    torch.testing.assert_close(basis.abs(), torch.tensor([[[0.0], [1.0]]]).double())
    torch.testing.assert_close((output @ basis.mT)[0], torch.diag(torch.tensor([0.0, 1.0]).double()))


@torch.no_grad()
def test_all_channels_give_the_same_output_for_inputs_that_were_never_seen() -> None:
    pair, few, others = projections(), torch.randn(3, 12, dtype=torch.float64), torch.randn(50, 12, dtype=torch.float64)
    expected = attention(pair, others)[1]
    narrow(pair, moments(attention(pair, few)[0]), WIDTH)
    torch.testing.assert_close(attention(pair, others)[1], expected)


# --- a pipeline ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A quantized pipeline, its report, and the folder it was saved to."""
    pipe, folder = wan_pipeline(), tmp_path_factory.mktemp("narrow") / "out"
    report = reelquant.quantize(pipe, with_steps(NARROW, GPTQ), PROMPTS, **CALL)
    reelquant.save(pipe, folder, report)
    return pipe, report, folder


def test_a_pipeline_is_smaller_by_what_is_left_out(made: tuple[Any, Any, Path]) -> None:
    pipe, report, folder = made
    whole = reelquant.quantize(wan_pipeline(), with_steps(GPTQ), PROMPTS, **CALL)
    layers = quantized_layers(pipe.transformer)
    rows = {name for name, layer in layers.items() if layer.layout.weight.rows}
    columns = {name for name, layer in layers.items() if layer.layout.weight.columns}
    assert rows == {name for name in layers if name.endswith("to_v")} and columns == {name for name in layers if name.endswith("to_out.0")}
    heads = {name: layer.heads_out or layer.heads_in for name, layer in discover(wan_pipeline().transformer).layers.items()}
    left = 0
    for name in rows | columns:
        high, wide = layers[name].weight_shape
        of = (high if name in rows else wide) // heads[name]
        kept = round(KEPT / WIDTH * of)
        assert (layers[name].layout.weight.rows or layers[name].layout.weight.columns) == f"{kept}:{of}"
        assert tuple(layers[name].weight.shape) == ((high * kept // of, wide) if name in rows else (high, wide * kept // of))
        left += high * wide * (of - kept) // of
    assert whole.bytes_quantized - report.bytes_quantized == left > 0
    config = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert '"rows"' in json.dumps(config) and '"columns"' in json.dumps(config)


def test_plans_know_the_size(made: tuple[Any, Any, Path]) -> None:
    whole, narrower = (reelquant.plan(wan_pipeline(), with_steps(*steps)) for steps in ([GPTQ], [NARROW, GPTQ]))
    layers = [layer for layer in quantized_layers(made[0].transformer).values() if layer.layout.weight.removed]
    before, after = (sum(row.bytes_after for row in plan.quantized) for plan in (whole, narrower))
    assert before - after == sum(math.prod(layer.weight_shape) - layer.weight.numel() for layer in layers) > 0


def test_stock_classes_open_it_and_give_the_same_frames_and_bytes(made: tuple[Any, Any, Path], tmp_path: Path) -> None:
    pipe, _, folder = made
    opened = DiffusionPipeline.from_pretrained(folder)
    opened.set_progress_bar_config(disable=True)
    assert torch.equal(frames(opened), frames(pipe))
    reelquant.save(opened, tmp_path / "again")  # kernels hold the weights by now
    reelquant.save(pipe, tmp_path / "more")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert contents(tmp_path / "again")[weights] == contents(tmp_path / "more")[weights] == contents(folder)[weights]
    reelquant.verify(folder)


def test_what_a_layer_does_not_store_is_zero(made: tuple[Any, Any, Path]) -> None:
    layers = quantized_layers(made[0].transformer)
    values, reader = layers["blocks.0.attn1.to_v"], layers["blocks.0.attn1.to_out.0"]
    kept, of = map(int, values.layout.weight.rows.split(":"))
    for weight in (values.dequantized_weight(), reader.dequantized_weight().T):
        assert not bool(weight.unflatten(0, (-1, of))[:, kept:].any()) and bool(weight.unflatten(0, (-1, of))[:, :kept].any())
    assert not bool(values.bias.unflatten(0, (-1, of))[:, kept:].any())


@torch.no_grad()
def test_graphs_compute_the_zeros_that_are_not_stored(made: tuple[Any, Any, Path]) -> None:
    graphs = pytest.importorskip("tests.contracts.test_graphs", reason="needs openvino", exc_type=ImportError)
    layers = quantized_layers(made[0].transformer)
    for name in ("blocks.0.attn1.to_v", "blocks.0.attn1.to_out.0"):
        x = torch.randn(1, 5, layers[name].weight_shape[1], generator=torch.Generator().manual_seed(0))
        found = graphs.answer(graphs.compiled(layers[name], x), x)
        torch.testing.assert_close(found, layers[name](x), rtol=0, atol=0.02 * float(found.abs().amax()))
    reelquant.configure(opened := reelquant.load(made[2]), runtime="openvino")
    assert float((frames(opened) - frames(made[0])).square().mean()) < 1e-3


def test_one_keeps_everything() -> None:
    pipe = wan_pipeline()
    expected = frames(wan_pipeline())
    reelquant.quantize(pipe, with_steps(NARROW | {"keep": 1.0}) | {"defaults": {"weight": {"format": "int8"}}}, PROMPTS, **CALL)
    assert not any(layer.layout.weight.removed for layer in quantized_layers(pipe.transformer).values())
    assert float((frames(pipe) - expected).square().mean()) < 1e-3


def test_every_number_of_bits_is_stored_and_comes_back() -> None:
    for fmt, grain in (("int4", "group-4"), ("uint3", "channel"), ("e2m1", "channel"), ("int8", "tensor")):
        pipe = wan_pipeline()
        steps = [{**NARROW, "on": "role:main | role:prompt"}]
        recipe = with_steps(*steps) | {"defaults": {"weight": {"format": fmt, "granularity": grain}}}
        reelquant.quantize(pipe, recipe, PROMPTS, **CALL)
        for name, layer in quantized_layers(pipe.transformer).items():
            if layer.layout.weight.removed:
                before, weight = layer.weight.clone(), layer.dequantized_weight()
                layer(torch.randn(3, layer.weight_shape[1]))  # a kernel may hold the weight from here on
                assert torch.equal(layer.codes, before) and torch.equal(layer.dequantized_weight(), weight), (fmt, name)


# --- refusals -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([{"transform": "shift", "on": "role:main"}, NARROW], "make it the first one"),
        ([NARROW, {"transform": "rotate", "on": "role:main"}], "transform 'rotate' fills the columns that 'narrow_values' leaves out"),
        ([NARROW, {"transform": "permute", "on": "role:main"}], "transform 'permute' fills the columns"),
        ([NARROW, {"branch": "lowrank", "rank": 2}], "branch 'lowrank' fills the rows"),
        ([NARROW, {"solve": "sparse"}], "solve 'sparse' fills the columns"),
        ([NARROW, {"reconstruct": "adaround", "scope": "layer"}], "of which rows or columns are not stored"),
        ([NARROW | {"on": "*.to_v"}], "stays as it is"),
        ([NARROW | {"on": "*.ffn.net.0.proj"}], "finds no attention in WanTransformer3DModel"),
    ],
)
def test_what_cannot_be_is_said(steps: list[dict[str, Any]], sentence: str) -> None:
    pipe = wan_pipeline()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    with pytest.raises(UnsupportedError, match=sentence):
        reelquant.quantize(pipe, with_steps(*steps), PROMPTS, **CALL)
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())


def test_no_calls_are_no_directions() -> None:
    class Work:
        map = discover(wan_pipeline().transformer)

    with pytest.raises(UnsupportedError, match="sees no call of WanTransformer3DModel"):
        look(cast(Any, Work()), [projections()], [])


def test_formats_without_a_zero_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="needs a format with a zero"):
        reelquant.plan(wan_pipeline(), with_steps(NARROW) | {"defaults": {"weight": {"format": "power_4", "granularity": "channel"}}})


def test_parameters_that_make_no_sense_are_refused() -> None:
    for wrong in ({"keep": 0.0}, {"keep": 1.1}, {"clips": 0}, {"calls": 0}):
        with pytest.raises(RecipeError, match="keep in"):
            NarrowValues(**wrong)
    with pytest.raises(RecipeError, match="cannot be a choice of the search"):
        load_recipe(with_steps(NARROW | {"keep": [0.5, 0.75]}))


def test_streaming_is_refused(tmp_path: Path) -> None:
    folder = stored_pipeline(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="narrow_values changes two float layers at once"):
        reelquant.quantize_folder(folder, tmp_path / "out", with_steps(NARROW, GPTQ))


def test_exporters_and_adapters_say_what_is_in_their_way(made: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, _, folder = made
    with pytest.raises(UnsupportedError, match=r"(columns|rows) that are not stored"):
        reelquant.export(folder, "gguf", tmp_path / "model.gguf")
    opened = reelquant.load(folder)
    opened.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "others")
    opened = reelquant.load(folder)
    with pytest.raises(UnsupportedError, match="trained with other channels"):
        opened.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_v"]), "values")
