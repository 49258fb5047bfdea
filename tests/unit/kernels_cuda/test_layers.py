"""Quantized layers through the Triton kernels against the reference, and the weights that kernels repack."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reelquant.kernels import Reference
from reelquant.kernels.cuda import available, layers
from reelquant.nn import TensorLayout
from tests.contracts.test_kernels import INPUTS, make, one_code

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES: list[tuple[str, Any, str, Any, Any]] = [
    ("Linear", ("int8", "channel"), "int8", layers.CodeLinear, layers.refuses_linear),
    ("Linear", ("int8", "tensor"), "uint8", layers.CodeLinear, layers.refuses_linear),
    ("Linear without bias", ("int8", "channel"), "int8 token", layers.CodeLinear, layers.refuses_linear),
    ("Linear", ("int4", "group-64"), "int8", layers.NibbleLinear, layers.refuses_nibbles),
    ("Linear", ("int4", "group-64"), "uint8", layers.NibbleLinear, layers.refuses_nibbles),
    ("Conv2d", ("int8", "channel"), "int8", layers.CodeConvolution, layers.refuses_convolution),
    ("Conv2d same", ("int8", "channel"), "uint8", layers.CodeConvolution, layers.refuses_convolution),
    ("Conv2d strided", ("int8", "channel"), "uint8", layers.CodeConvolution, layers.refuses_convolution),
    ("Conv3d", ("int8", "channel"), "int8", layers.CodeConvolution, layers.refuses_convolution),
]


@pytest.mark.parametrize(("name", "weight", "numbers", "runner", "refuses"), CASES)
@pytest.mark.parametrize("rewrite", [{}, {"shift": True, "scale": True}, {"rotate": True}], ids=["", "affine", "rotate"])
def test_layers_compute_what_the_reference_computes(
    name: str, weight: Any, numbers: str, runner: Any, refuses: Any, rewrite: dict[str, bool]
) -> None:
    slots = 1 if "token" in numbers else 3
    layer, x = make(name, weight, INPUTS[numbers], slots=slots, **rewrite)
    layer, x = layer.to(DEVICE), x.to(DEVICE)
    if rewrite.get("rotate") and "Conv" in name:
        assert refuses(layer.operands) == "the input of a convolution is rotated"
        return
    assert refuses(layer.operands) is None
    built, oracle = runner(layer.operands), Reference(layer.operands)
    for slot in range(slots):
        expected = oracle(x, slot)
        for where in (slot, torch.tensor(slot, device=DEVICE)):
            found = built(x, where)
            assert found.shape == expected.shape and found.dtype == expected.dtype
            error = (found - expected).abs()
            assert float(error.max()) <= 2 * one_code(layer) + 1e-4 and float(error.median()) <= 1e-4
    if getattr(built, "codes", None):
        assert torch.equal(built.codes(), layer.codes)


@pytest.mark.parametrize("weight", [("int8", "channel"), ("int4", "group-64")], ids="-".join)
def test_weight_only_layers(weight: Any) -> None:
    layer, x = make("Linear", weight, None)
    layer, x = layer.to(DEVICE), x.to(DEVICE).bfloat16()
    assert layers.refuses_float(layer.operands) is None
    built = layers.FloatLinear(layer.operands)
    torch.testing.assert_close(built(x, 0), Reference(layer.operands)(x, 0), rtol=2e-2, atol=2e-2)
    if weight[0] == "int4":
        assert built.codes is not None and torch.equal(built.codes(), layer.codes)


def test_what_they_do_not_take_is_said() -> None:
    def operands(name: str, weight: Any, numbers: TensorLayout | None) -> Any:
        return make(name, weight, numbers)[0].operands

    assert layers.refuses_linear(operands("Linear", ("int8", "channel"), None)) == "the input stays float"
    assert "int6" in str(layers.refuses_linear(operands("Linear", ("int6", "channel"), INPUTS["int8"])))
    assert "inputs are int6" in str(layers.refuses_linear(operands("Linear", ("int8", "channel"), INPUTS["int6"])))
    assert layers.refuses_linear(operands("Conv2d", ("int8", "channel"), INPUTS["int8"])) == "a convolution"
    assert "static inputs" in str(layers.refuses_nibbles(operands("Linear", ("int4", "group-64"), INPUTS["int8 token"])))
    assert "two or three axes" in str(layers.refuses_convolution(operands("Conv1d", ("int8", "channel"), INPUTS["int8"])))
    assert "plain float inputs" in str(layers.refuses_float(operands("Linear", ("int8", "channel"), INPUTS["int8"])))
