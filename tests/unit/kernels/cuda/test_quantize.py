"""Fused quantization against float64: all values within the arithmetic's own error of the exact unit, most of them the exact code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reelquant._errors import UnsupportedError
from reelquant.kernels.cuda.launch import FP8
from reelquant.kernels.cuda.quantize import quantize_per_sample, quantize_per_token, quantize_static


def units(x: Tensor, **rewrite: Tensor) -> Tensor:
    """The rewritten input in float64, before the division by the input scale."""
    get = {name: value.double().cpu() for name, value in rewrite.items()}
    return (x.double().cpu() - get.get("pre_shift", 0.0)) / get.get("pre_scale", 1.0)


def assert_codes(codes: Tensor, unit: Tensor, low: float = -128, high: float = 127) -> None:
    """Each code is a nearest one; ``slack``: float32 stages err by some 2^-24 of the largest unit, which decides only near-ties."""
    slack = 2**-20 * max(float(unit.abs().max()), 1.0) if unit.numel() else 0.0
    error = (codes.double().cpu() - unit.clamp(low, high)).abs()
    assert codes.shape == unit.shape
    assert not (error > 0.5 + slack).any(), f"worst {float(error.max())}"


def assert_fp8(codes: Tensor, unit: Tensor) -> None:
    """Half a unit in the last of three mantissa bits (2^-4 relative), or half of the smallest step 2^-9; plus float32 slack."""
    assert codes.dtype == FP8 and codes.shape == unit.shape
    exact = unit.clamp(-448, 448)
    error = (codes.cpu().to(torch.float64) - exact).abs()
    assert not (error > exact.abs() * (2**-4 + 2**-19) + 2**-10).any()


REWRITES = [(), ("pre_shift",), ("pre_scale",), ("pre_shift", "pre_scale")]


def make(rows: int, width: int, names: tuple[str, ...], device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """An input and the vectors of its rewrite."""
    x = torch.randn(rows, width).to(device) * 3
    vectors = {"pre_shift": torch.randn(width).bfloat16(), "pre_scale": (torch.randn(width).abs() + 0.5).bfloat16()}
    return x, {name: vectors[name].to(device) for name in names}


@pytest.mark.parametrize("names", REWRITES, ids=" ".join)
@pytest.mark.parametrize("shape", [(6, 40), (2, 257)])
def test_static_codes_are_the_nearest(names: tuple[str, ...], shape: tuple[int, int], device: str) -> None:
    x, rewrite = make(*shape, names, device)
    table = torch.tensor([[9.0], [0.031], [7.0]], device=device)
    slot = torch.tensor(1, device=device)
    unit = units(x, **rewrite) / table[1, 0].double().cpu()
    assert_codes(quantize_static(x, table, slot, **rewrite), unit)
    assert_fp8(quantize_static(x, table, slot, **rewrite, dtype=FP8), unit)


@pytest.mark.parametrize("names", REWRITES, ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_per_token_scales_are_tight_and_codes_nearest(names: tuple[str, ...], dtype: torch.dtype, device: str) -> None:
    x, rewrite = make(6, 70, names, device)
    codes, scales = quantize_per_token(x, **rewrite, dtype=dtype)
    unit = units(x, **rewrite)
    expected = torch.maximum(unit.amax(-1) / 127, unit.amin(-1) / -128) if dtype == torch.int8 else unit.abs().amax(-1) / 448
    torch.testing.assert_close(scales.double().cpu(), expected, rtol=2**-18, atol=0)
    (assert_codes if dtype == torch.int8 else assert_fp8)(codes, unit / scales.double().cpu()[:, None])


def test_codes_worked_by_hand(device: str) -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 200.0, -128.5, -300.0, 126.5]], device=device)
    one = torch.ones(1, 1, device=device)
    assert quantize_static(x, one).tolist() == [[0, 2, 2, 0, -2, 127, 127, -128, -128, 126]]
    half = torch.tensor([[0.5]], device=device)  # affine: q = round(x / 0.5 + 3), stored as q - 128
    zero = torch.tensor([[3.0]], device=device)
    assert quantize_static(x, half, zero_point=zero).tolist() == [[-124, -122, -120, -126, -128, 127, 127, -128, -128, 127]]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (2, 3, 1), (2, 0, 8), (5, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_odd_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    assert_codes(quantize_static(x, torch.tensor([[0.02]], device=device)), x.double().cpu() / torch.tensor(0.02).double())
    codes, scales = quantize_per_token(x)
    assert scales.shape == (x.shape[:-1].numel(),) and not scales.isnan().any()
    assert_codes(codes, x.double().cpu() / scales.reshape(*shape[:-1], 1).double().cpu())


def test_a_row_of_zeros_keeps_its_zeros(device: str) -> None:
    codes, scales = quantize_per_token(torch.zeros(2, 7, device=device))
    assert scales.tolist() == [1.0, 1.0] and not codes.any()


def test_strided_inputs(device: str) -> None:
    base, table = torch.randn(24, 10, device=device), torch.tensor([[0.03]], device=device)
    for view in (base.t(), base[::2, 1:], base.reshape(4, 6, 10).transpose(0, 1)[:, :, ::3]):
        assert torch.equal(quantize_static(view, table), quantize_static(view.contiguous(), table))


def test_refusals(device: str) -> None:
    x, table = torch.randn(6, 8, device=device), torch.ones(3, 1, device=device)
    one = table[:1]
    cases: list[tuple[str, dict[str, Any]]] = [
        ("no slot", {"input_scale": table}),
        ("contiguous values", {"input_scale": one, "pre_shift": x[0, :4]}),
        ("codes of dtype torch.int16", {"input_scale": one, "dtype": torch.int16}),
        ("float32 table", {"input_scale": one.double()}),
        ("belongs to 8-bit integers", {"input_scale": one, "zero_point": one, "dtype": FP8}),
        ("one int64", {"input_scale": table, "slot": torch.tensor(1.0, device=device)}),
    ]
    for message, arguments in cases:
        with pytest.raises(UnsupportedError, match=message):
            quantize_static(x, **arguments)
    with pytest.raises(UnsupportedError, match="reads"):
        quantize_static(x.double(), one)


@pytest.mark.parametrize("names", REWRITES, ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_per_sample_scales_are_tight_and_codes_nearest(names: tuple[str, ...], dtype: torch.dtype, device: str) -> None:
    rows, rewrite = make(3 * 10, 40, names, device)
    x = rows.view(3, 2, 5, 40) * torch.tensor([1.0, 30.0, 0.1], device=device).view(3, 1, 1, 1)
    codes, scales = quantize_per_sample(x, **rewrite, dtype=dtype)
    unit = units(x, **rewrite)
    low, high = (-128.0, 127.0) if dtype == torch.int8 else (-448.0, 448.0)
    expected = torch.maximum(unit.amax((1, 2, 3)) / high, unit.amin((1, 2, 3)) / low)
    torch.testing.assert_close(scales.double().cpu(), expected, rtol=1e-5, atol=0)
    scaled = unit / scales.double().cpu().view(3, 1, 1, 1)
    (assert_codes if dtype == torch.int8 else assert_fp8)(codes, scaled)


def test_samples_of_zeros_nan_and_nothing(device: str) -> None:
    x = torch.randn(3, 4, 5, 8, device=device)
    x[0], x[2, 1, 1, 1] = 0, torch.nan
    codes, scales = quantize_per_sample(x)
    assert scales[0] == 1 and not codes[0].any() and scales[1].isfinite() and scales[2].isnan()
    for shape in ((0, 4, 8), (2, 0, 8), (2, 4, 0)):
        codes, scales = quantize_per_sample(torch.zeros(shape, device=device))
        assert codes.shape == shape and scales.shape == shape[:1] and scales.isfinite().all()
