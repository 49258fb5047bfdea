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
from tests.contracts.test_kernels import INPUTS, LAYERS, REWRITES, WEIGHTS, make, one_code, oracle

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


CASES = [
    case for case in itertools.product(LAYERS, FORMATS, INPUTS, REWRITES) if "Linear" in case[0] or "token" not in case[2]
]  # a scale per token belongs to linear layers


@pytest.mark.parametrize(
    ("name", "weight", "numbers", "rewrite"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_a_graph_computes_what_the_reference_computes(name: str, weight: Any, numbers: str, rewrite: str) -> None:
    static = INPUTS[numbers] is not None and not INPUTS[numbers].dynamic
    for slots in STEPS if static else STEPS[:1]:
        layer, x = make(name, weight, INPUTS[numbers], slots=slots, **REWRITES[rewrite])
        graph = compiled(layer, x)
        start_clock(torch.nn.Sequential(layer), Clock([900.0, 600.0, 300.0, 100.0]), "input")
        for slot in range(slots):
            layer.clock[0].tick(float(layer.clock[0].timesteps[slot]))
            expected, found = oracle(layer, x), answer(graph, x, slot)
            assert found.shape == expected.shape
            largest = float(expected.abs().max())
            rounding = 2e-5 * largest
            folded = largest / 64 if weight[1].startswith("group") and convert.in_integers(layer.operands) is None else 0.0
            error = (found - expected).abs()
            assert float(error.max()) <= rounding + folded + (0 if numbers == "float" else 2 * one_code(layer)), (slots, slot)
            if numbers != "float":  # codes that go the other way are rare, so most outputs agree to rounding
                assert float(error.median()) <= rounding + folded / 4
