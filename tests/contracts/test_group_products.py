"""Products of inputs in groups of channels: exact integers, with the scales and codes of the reference."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reelquant.formats import parse_format
from reelquant.kernels.cpu import int16_groups
from reelquant.kernels.cpu.group_inputs import LARGEST, multiples
from reelquant.nn import QuantLayer, TensorLayout
from tests.contracts.layers import REWRITES, make, oracle
from tests.grids import sampled

pytestmark = pytest.mark.skipif(int16_groups.available() is not None, reason=str(int16_groups.available()))
LINEAR = ("Linear", "Linear without bias", "Linear of one column")
WEIGHTS = [
    ("int4", "group-64"),
    ("e2m1", "group-16", "e4m3"),
    ("e2m1", "group-32", "e8m0"),
    ("int8", "group-32"),
    ("int8", "channel"),
    ("int6", "tensor"),
    ("e3m0", "channel"),
    ("e1m2", "group-8"),
]
INPUTS = {
    "int4 g64": TensorLayout("int4", "group-64", dynamic=True),
    "int4 g10": TensorLayout("int4", "group-10", dynamic=True),
    "uint6 g32": TensorLayout("uint6", "group-32", dynamic=True),
    "int8 g16": TensorLayout("int8", "group-16", dynamic=True),
    "nvfp4": TensorLayout("e2m1", "group-16", dynamic=True, scale="e4m3"),
    "mxfp4": TensorLayout("e2m1", "group-32", dynamic=True, scale="e8m0"),
    "e2m1 token": TensorLayout("e2m1", "token", dynamic=True),
    "e3m4 token": TensorLayout("e3m4", "token", dynamic=True),
}


def grouped(name: str, weight: tuple[str, ...], numbers: TensorLayout, **rewrite: Any) -> tuple[QuantLayer, Tensor]:
    layer, x = make(name, weight, numbers, **rewrite)
    assert int16_groups.refuses(replace(layer.operands, mix=())) is None
    return layer, x


@pytest.mark.parametrize(
    ("name", "weight", "numbers", "rewrite"),
    sampled([*itertools.product(LINEAR, WEIGHTS, INPUTS, REWRITES)], 100),
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_products_are_those_of_the_reference(name: str, weight: Any, numbers: str, rewrite: str) -> None:
    """Codes that go the other way are rare: almost all outputs agree to the rounding of float32 sums."""
    layer, x = grouped(name, weight, INPUTS[numbers], **REWRITES[rewrite])
    expected = oracle(layer, x)
    with torch.no_grad():
        found = layer(x)
    assert layer.kernel.name in ("int16 groups", "onednn int8") and not layer.simulated
    largest = float(expected.abs().max())
    error = (found - expected).abs()
    if not rewrite:  # the very same values are rounded with the very same scales
        assert float(error.max()) <= 1e-5 * largest
    assert float((error > 1e-5 * largest).float().mean()) < 0.1
    step = float((x.abs().amax() * 3 + 1) * layer.packed.dequantize().abs().max())
    assert float(error.max()) <= step  # no more than a code or two


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["", "silu", "gelu_tanh"])
def test_dtypes_and_activations(dtype: torch.dtype, activation: str) -> None:
    layer, x = grouped("Linear", ("int4", "group-64"), INPUTS["int4 g64"])
    known = {"": lambda y: y, "silu": torch.nn.functional.silu, "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh")}
    runner = int16_groups.GroupProduct(layer.operands)
    found = runner(x.to(dtype), 0, activation)
    expected = known[activation](oracle(layer, x.to(dtype).float()))
    assert found.dtype == dtype
    assert float((found.float() - expected).abs().max()) <= 2 * torch.finfo(dtype).eps * float(expected.abs().max())


@pytest.mark.parametrize(("name", "largest", "unit", "top"), [("e2m1", 128, 0.5, 12), ("e3m0", 128, 0.25, 64), ("int8", 128, 1, 128)])
def test_small_floats_are_multiples_of_their_smallest(name: str, largest: int, unit: float, top: int) -> None:
    fmt = parse_format(name)
    found = multiples(fmt, largest)
    assert found is not None and found.unit == unit and abs(found.values).max() == top
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    assert torch.equal(torch.from_numpy(found.values) * unit, fmt.decode(codes))


def test_what_is_no_multiple_stays_with_the_reference() -> None:
    assert multiples(parse_format("e4m3"), LARGEST) is None
    layer, _ = make("Linear", ("e4m3", "group-32", "e8m0"), TensorLayout("e4m3", "group-32", dynamic=True, scale="e8m0"))
    assert layer.kernel.name == "reference" and layer.simulated
    assert "e4m3 are not multiples of one of them" in layer.selected[1]["int16 groups"]
    affine, _ = make("Linear", ("int4", "group-9"), INPUTS["int4 g64"])
    assert "groups of 9 channels are no whole pairs" in affine.selected[1]["int16 groups"]


@pytest.mark.parametrize("numbers", ["nvfp4", "mxfp4", "e2m1 token"])
def test_values_in_the_middle_go_where_the_reference_puts_them(numbers: str) -> None:
    """Every value is a middle between two numbers of e2m1, or one of them, for a group whose scale is 1."""
    layer, _ = grouped("Linear", ("e2m1", "group-16", "e4m3"), INPUTS[numbers])
    x = torch.tensor([0.25, 0.5, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -2.5, -3.5, -5.0, -6.0]).repeat(2, 6)
    assert torch.equal(layer(x), int16_groups.GroupProduct(layer.operands)(x))
    assert float((layer(x) - oracle(layer, x)).abs().max()) <= 1e-5 * float(oracle(layer, x).abs().max())


@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_strange_numbers_show(strange: float) -> None:
    layer, x = grouped("Linear", ("int4", "group-64"), INPUTS["int4 g64"])
    x[1, 2, 3] = strange
    assert layer(x).isnan().all()


@pytest.mark.parametrize(("name", "weight"), [("Linear", ("int4", "group-64")), ("Linear", ("int8", "group-32"))])
def test_a_prepared_layer_gives_its_codes_back(name: str, weight: Any) -> None:
    layer, x = grouped(name, weight, INPUTS["int4 g64"])
    before, found = layer.codes.clone(), layer(x)
    assert torch.equal(layer.codes, before) and torch.equal(layer(x), found)
    assert torch.equal(int16_groups.GroupProduct(layer.operands).codes(), before)


@pytest.mark.parametrize("rows", [0, 1, 5, 97, 200])
def test_any_number_of_rows(rows: int) -> None:
    layer, _ = grouped("Linear", ("e2m1", "group-16", "e4m3"), INPUTS["nvfp4"])
    x = torch.randn(rows, 96)
    assert layer(x).shape == (rows, 70)
    assert torch.allclose(layer(x), oracle(layer, x), rtol=1e-4, atol=1e-5)
