"""Every quantized layer as operators of OpenVINO against the reference, for every combination of weight, input, rewrite and step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from reelquant import UnsupportedError
from reelquant.clock import Clock
from reelquant.nn import QuantLayer, TensorLayout, start_clock
from tests.contracts.layers import INPUTS, LAYERS, REWRITES, WEIGHTS, make, one_code, oracle
from tests.grids import sampled

openvino = pytest.importorskip("openvino", reason="pip install openvino", exc_type=ImportError)

from reelquant.graphs import convert  # noqa: E402
from reelquant.graphs.runner import OPTIONS  # noqa: E402

STEPS = (1, 4)
FORMATS = [*WEIGHTS, ("uint4", "channel"), ("e4m3", "channel")]
SAFE = [("int6", "channel"), ("int4", "channel")]  # codes so small that no processor cuts sums of their products off


def compiled(layer: QuantLayer, x: Tensor, exact: bool = False) -> Any:
    """The layer alone as a compiled graph of its input and the step."""
    given, slot = openvino.opset13.parameter(x.shape, openvino.Type.f32), openvino.opset13.parameter([], openvino.Type.i64)
    out = convert.emit(layer, given, convert.Conversion(slot, exact))
    model = openvino.Model([openvino.opset13.result(out)], [given, slot])
    return openvino.Core().compile_model(model, "CPU", OPTIONS | {"INFERENCE_PRECISION_HINT": "f32"})


def answer(graph: Any, x: Tensor, slot: int = 0) -> Tensor:
    return torch.from_numpy(graph([x.numpy(), torch.tensor(slot).numpy()])[0].copy())


def arithmetic(graph: Any) -> set[str]:
    """Kernels of products, by name."""
    nodes = [node.get_rt_info() for node in graph.get_runtime_model().get_ops()]
    kinds = ("FullyConnected", "MatMul", "Convolution")
    return {node["primitiveType"].astype(str) for node in nodes if node["layerType"].astype(str) in kinds}


def unrounded_border(layer: QuantLayer, x: Tensor) -> Tensor | float:
    """What the reference loses by rounding the border of a convolution to codes, which the graph does not do (``graphs/borders.py``)."""
    given, slot = layer.operands, openvino.opset13.parameter([], openvino.Type.i64)
    border = convert.Emission(given, convert.Conversion(slot, False), "").border
    if border is None:
        return 0.0
    assert given.window is not None and given.input is not None
    axes, fmt = tuple(range(1, x.ndim)), given.input.format
    inside = given.rewritten_input(torch.nn.functional.pad(x, given.window.padding))
    scale = torch.maximum(inside.amax(axes, True) / fmt.high, inside.amin(axes, True) / fmt.low)
    values = border.reshape(1, -1, *[1] * (x.ndim - 2))
    lost = values - (values / scale).round().clamp(fmt.low, fmt.high) * scale
    outside = 1 - torch.nn.functional.pad(torch.ones_like(x[:1, :1]), given.window.padding)
    return given.window.convolve(lost * outside, given.weight.dequantize().reshape(given.weight.shape))


LINEAR = [name for name in LAYERS if "Linear" in name]
GRID = [*itertools.product(LAYERS, FORMATS, INPUTS, REWRITES, [convert.SMALL])]
GRID += itertools.product(LINEAR, FORMATS, ["float"], REWRITES, [0])
"""The last axis: weights up to this size are multiplied as floats where products are, which linear layers of float inputs are."""


@pytest.mark.parametrize(
    ("name", "weight", "numbers", "rewrite", "small"),
    sampled(GRID, 135),
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_graph_computes_what_the_reference_computes(
    name: str, weight: Any, numbers: str, rewrite: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(convert, "SMALL", small)
    static = INPUTS[numbers] is not None and not INPUTS[numbers].dynamic
    for slots in STEPS if static else STEPS[:1]:
        layer, x = make(name, weight, INPUTS[numbers], slots=slots, **REWRITES[rewrite])
        graph = compiled(layer, x)
        start_clock(torch.nn.Sequential(layer), Clock([900.0, 600.0, 300.0, 100.0]), "input")
        for slot in range(slots):
            layer.clock[0].tick(float(layer.clock[0].timesteps[slot]))
            expected, found = oracle(layer, x) + unrounded_border(layer, x), answer(graph, x, slot)
            assert found.shape == expected.shape
            largest = float(expected.abs().max())
            rounding = 2e-5 * largest
            folded = largest / 64 if weight[1].startswith("group") and convert.in_integers(layer.operands) is None else 0.0
            error = (found - expected).abs()
            assert float(error.max()) <= rounding + folded + (0 if numbers == "float" else 2 * one_code(layer)), (slots, slot)
            if numbers != "float":  # codes that go the other way are rare, so most outputs agree to rounding
                assert float(error.median()) <= rounding + folded / 4


@pytest.mark.parametrize("slots", STEPS)
@pytest.mark.parametrize("numbers", ["int8", "uint8", "int6"])
@pytest.mark.parametrize("weight", SAFE, ids="-".join)
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "Conv3d"])
def test_products_of_codes_that_fit_are_integer_ones_on_every_processor(name: str, weight: Any, numbers: str, slots: int) -> None:
    layer, x = make(name, weight, INPUTS[numbers], slots=slots, shift=True, scale=True)
    assert convert.in_integers(layer.operands) is None
    assert all(kernel.lower().endswith("i8") for kernel in arithmetic(compiled(layer, x)))


@pytest.mark.parametrize("weight", SAFE, ids="-".join)
@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize(
    ("name", "numbers"), [("Linear", "int8 token"), ("Conv2d", "int8 sample"), ("Conv2d same", "int8 sample"), ("Conv3d", "int8 sample")]
)
def test_a_scale_found_at_run_time_leaves_products_integer(name: str, numbers: str, weight: Any, rewrite: str) -> None:
    layer, x = make(name, weight, INPUTS[numbers], **REWRITES[rewrite])
    assert convert.in_integers(layer.operands) is None
    names = arithmetic(compiled(layer, x))
    assert any(kernel.lower().endswith("i8") for kernel in names)


@pytest.mark.parametrize("weight", SAFE, ids="-".join)
def test_convolutions_have_no_tokens(weight: Any) -> None:
    convolution, _ = make("Conv2d", weight, INPUTS["int8 token"])
    assert convert.in_integers(convolution.operands) == "inputs are int8 per token and dynamic"


def extreme(weight: tuple[str, str]) -> tuple[QuantLayer, Tensor]:
    """A layer whose products of codes are the largest there are, all of one sign."""
    layer, x = make("Linear without bias", weight, INPUTS["int8"])
    largest = 127 if weight[0] == "int8" else 63
    layer.weight.data.fill_(largest if weight[0] == "int8" else 255)
    return layer, torch.full_like(x, 1e3)


def test_sums_are_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = extreme(("int8", "channel"))
    expected = oracle(layer, x)
    assert float((answer(compiled(layer, x), x) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    if convert.integers_saturate():
        assert "without VNNI instructions" in str(convert.in_integers(layer.operands))
        monkeypatch.setattr(convert, "integers_saturate", lambda: False)  # what it would be without the rule
        assert float((answer(compiled(layer, x), x) - expected).abs().max()) > 0.1 * float(expected.abs().max())


def test_layers_that_read_one_tensor_with_the_same_numbers_share_its_codes() -> None:
    one, x = make("Linear", ("int6", "channel"), INPUTS["int8"], shift=True)
    given, slot = openvino.opset13.parameter(x.shape, openvino.Type.f32), openvino.opset13.parameter([], openvino.Type.i64)
    to = convert.Conversion(slot, False)
    for _ in range(3):
        convert.emit(one, given, to)
    assert len(to.rounded) == 1
    one.pre_quant_shift = one.pre_quant_shift + 1
    convert.emit(one, given, to)
    assert len(to.rounded) == 2


@pytest.mark.parametrize(("granularity", "words"), [("frame-2", "no input scales per frame-2")])
def test_inputs_that_graphs_do_not_know_are_refused(granularity: str, words: str) -> None:
    layer, x = make("Linear", ("int8", "channel"), TensorLayout("int8", granularity))
    with pytest.raises(UnsupportedError, match=words):
        compiled(layer, x)
