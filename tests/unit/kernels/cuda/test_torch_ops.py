"""The fall-back without Triton against float64; needs no triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from reelquant._errors import UnsupportedError
from reelquant.kernels import Reference, cuda, select
from reelquant.kernels.cuda import layers, refusals
from reelquant.kernels.torch_ops import FP8, linear_8bit, product
from tests.contracts.layers import INPUTS, make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATE: dict[str, Any] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def codes(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    low = 0 if dtype == torch.uint8 else -128
    return (torch.randn(shape).to(FP8) if dtype == FP8 else torch.randint(low, low + 256, shape, dtype=dtype)).to(DEVICE)


@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 40),
    depth=st.integers(0, 70),
    dtype=st.sampled_from([torch.int8, torch.uint8, FP8]),
    per_token=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATE)),
)
def test_against_float64(rows: int, columns: int, depth: int, dtype: torch.dtype, per_token: bool, activation: str) -> None:
    x, weight = codes(rows, depth, dtype=dtype), codes(columns, depth, dtype=FP8 if dtype == FP8 else torch.int8)
    table, slot = torch.tensor([[3.0], [2**-10]], device=DEVICE), torch.tensor(1, device=DEVICE)
    scale = torch.rand(rows, device=DEVICE) * 2**-9 if per_token else table
    weight_scale, bias = torch.rand(columns, device=DEVICE).bfloat16(), torch.randn(columns, device=DEVICE)
    affine: dict[str, Any] = {}
    if dtype == torch.uint8:
        affine = {"input_zero_point": table * 0 + 99, "weight_sums": weight.sum(1, dtype=torch.int32)}
    out = linear_8bit(x, weight, scale, weight_scale, slot, bias, activation, **affine, out_dtype=torch.float32)
    left = (x.cpu().to(torch.float64) - (99 if affine else 0)) * (scale.double().cpu()[:, None] if per_token else 2**-10)
    right = weight.cpu().to(torch.float64) * weight_scale.double().cpu()[:, None]
    expected = ACTIVATE[activation](left @ right.T + bias.double().cpu())
    # float32 arithmetic: a few roundings relative to the terms; float8 sums keep 14 bits between the terms of an instruction on Hopper
    size = (left.abs() @ right.abs().T + bias.double().cpu().abs()) * (2**-13 if dtype == FP8 and DEVICE == "cuda" else 2**-20)
    assert out.shape == expected.shape and not ((out.double().cpu() - expected).abs() > size + 1e-30).any()


def test_the_int8_product_is_exact_in_odd_sizes() -> None:
    x, weight = codes(5, 37).t()[:33].t(), codes(3, 33)
    assert torch.equal(product(x, weight).cpu().double(), x.cpu().double() @ weight.cpu().double().T)


def test_leading_dimensions_are_kept() -> None:
    out = linear_8bit(codes(2, 3, 8), codes(4, 8), torch.ones(1, 1, device=DEVICE), torch.ones(1, device=DEVICE))
    assert out.shape == (2, 3, 4) and out.dtype == torch.bfloat16


def test_refusals() -> None:
    x, weight, one = codes(2, 8), codes(3, 8), torch.ones(1, 1, device=DEVICE)
    for message, change in (
        ("torch.int8 meet a weight of torch.float8", {"weight": codes(3, 8, dtype=FP8)}),
        ("activation 'relu'", {"activation": "relu"}),
        ("affine", {"codes": x.view(torch.uint8)}),
        ("no slot", {"input_scale": torch.ones(2, 1, device=DEVICE)}),
    ):
        with pytest.raises(UnsupportedError, match=message):
            linear_8bit(**({"codes": x, "weight": weight, "input_scale": one, "weight_scale": one[0]} | change))


@pytest.mark.parametrize("weight", [("int8", "channel"), ("int8", "tensor")], ids="-".join)
@pytest.mark.parametrize("numbers", ["int8", "uint8", "int8 token"])
@pytest.mark.parametrize("rewrite", [{}, {"shift": True, "scale": True, "rotate": True}], ids=["", "rewritten"])
def test_layers_compute_what_the_reference_computes(weight: Any, numbers: str, rewrite: dict[str, bool]) -> None:
    slots = 1 if "token" in numbers else 3
    layer, x = make("Linear", weight, INPUTS[numbers], slots=slots, **rewrite)
    layer, x = layer.to(DEVICE), x.to(DEVICE)
    assert refusals.refuses_plain(layer.operands) is None
    built, oracle = layers.PlainLinear(layer.operands), Reference(layer.operands)
    for slot in range(slots):
        torch.testing.assert_close(built(x, slot), oracle(x, slot), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(built(x, torch.tensor(slot, device=DEVICE), "silu"), F.silu(oracle(x, slot)), rtol=1e-5, atol=1e-4)
    x[0, 0] = torch.nan
    assert bool(built(x).isnan().all())


def test_without_triton_layers_on_a_gpu_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "available", lambda: "triton is not installed; `pip install triton`")
    kernel, refused = select(make("Linear", ("int8", "channel"), INPUTS["int8"])[0].operands, "cuda")
    assert kernel.name == "torch int8" and kernel.low_bit and "triton is not installed" in refused["triton int8"]
