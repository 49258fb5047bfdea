"""Fused quantization against float64: all values within the arithmetic's own error of the exact unit, most of them the exact code."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from reelquant._errors import UnsupportedError
from reelquant.kernels.cuda.launch import FP8
from reelquant.kernels.cuda.quantize import NORMS, quantize_per_token, quantize_static
from tests.unit.kernels.cuda.exact import ACTIVATE


def units(x: Tensor, **stages: Any) -> Tensor:
    """The stages in float64, before the division by the input scale."""
    get = {name: value.double().cpu() for name, value in stages.items() if isinstance(value, Tensor)}
    x, activate = x.double().cpu(), ACTIVATE[stages.get("activation", "none")]
    gate = stages.get("gate", "none")
    if gate == "none":
        x = activate(x)
    else:
        first, second = x.chunk(2, -1)
        x = activate(first) * second if gate == "first" else first * activate(second)
    eps, norm = stages.get("eps", 1e-6), stages.get("norm", "none")
    if norm == "layer":
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    if norm == "rms":
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    x = x * get.get("norm_weight", 1.0) + get.get("norm_bias", 0.0)
    shape, flat = x.shape, x.reshape(-1, x.shape[-1])
    for name, apply in (("modulation_scale", lambda v, m: v * (1 + m)), ("modulation_shift", lambda v, m: v + m)):
        if name in get:
            flat = apply(flat, get[name].repeat_interleave(len(flat) // len(get[name]), 0))
    return (flat.reshape(shape) - get.get("pre_shift", 0.0)) / get.get("pre_scale", 1.0)


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


STAGES: list[tuple[str, dict[str, Any]]] = [
    ("plain", {}),
    ("layer norm", {"norm": "layer"}),
    ("affine layer norm, modulated", {"norm": "layer", "affine": True, "groups": 2}),
    ("rms norm per-token modulation", {"norm": "rms", "norm_weight": True, "groups": -1}),
    ("shift and scale", {"pre": True}),
    ("everything", {"norm": "layer", "groups": 2, "pre": True, "activation": "silu"}),
    ("gelu", {"activation": "gelu"}),
    ("gelu tanh", {"activation": "gelu_tanh"}),
    ("gated, gate last", {"activation": "gelu", "gate": "last"}),
    ("gated, gate first", {"activation": "silu", "gate": "first", "pre": True}),
]


def make(rows: int, width: int, spec: dict[str, Any], device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Any]]:
    """An input and the tensors that a row of ``STAGES`` asks for."""
    spec = dict(spec)
    random = lambda *shape: torch.randn(*shape).to(device, dtype)  # noqa: E731
    x = random(rows, width * (2 if "gate" in spec else 1)) * 3
    if spec.pop("affine", False):
        spec |= {"norm_weight": random(width), "norm_bias": random(width)}
    elif spec.pop("norm_weight", False):
        spec |= {"norm_weight": random(width)}
    if groups := spec.pop("groups", 0):
        both = random(rows if groups < 0 else groups, 2 * width)  # two slices of one tensor, as adaptive norms make them
        spec |= {"modulation_scale": both[:, :width], "modulation_shift": both[:, width:]}
    if spec.pop("pre", False):
        spec |= {"pre_shift": random(width).bfloat16(), "pre_scale": (random(width).abs() + 0.5).bfloat16()}
    return x, spec


@pytest.mark.parametrize(("name", "spec"), STAGES, ids=[name for name, _ in STAGES])
@pytest.mark.parametrize("shape", [(6, 40), (2, 257)])
def test_static_codes_are_the_nearest(name: str, spec: dict[str, Any], shape: tuple[int, int], device: str) -> None:
    x, stages = make(*shape, spec, device)
    table = torch.tensor([[9.0], [0.031], [7.0]], device=device)
    slot = torch.tensor(1, device=device)
    unit = units(x, **stages) / table[1, 0].double().cpu()
    assert_codes(quantize_static(x, table, slot, **stages), unit)
    assert_fp8(quantize_static(x, table, slot, **stages, dtype=FP8), unit)


@pytest.mark.parametrize(("name", "spec"), STAGES, ids=[name for name, _ in STAGES])
@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_per_token_scales_are_tight_and_codes_nearest(name: str, spec: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    x, stages = make(6, 70, spec, device)
    codes, scales = quantize_per_token(x, **stages, dtype=dtype)
    unit = units(x, **stages)
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
        ("did you mean 'gelu_tanh'|known", {"input_scale": one, "activation": "gelu-tanh"}),
        ("known", {"input_scale": one, "norm": "batch"}),
        ("contiguous values", {"input_scale": one, "pre_shift": x[0, :4]}),
        ("dividing the 6 rows", {"input_scale": one, "modulation_scale": x[:4]}),
        ("codes of dtype torch.int16", {"input_scale": one, "dtype": torch.int16}),
        ("float32 table", {"input_scale": one.double()}),
        ("belongs to 8-bit integers", {"input_scale": one, "zero_point": one, "dtype": FP8}),
        ("one int64", {"input_scale": table, "slot": torch.tensor(1.0, device=device)}),
    ]
    for message, arguments in cases:
        with pytest.raises(UnsupportedError, match=message):
            quantize_static(x, **arguments)
    with pytest.raises(UnsupportedError, match="even number"):
        quantize_static(x[:, :7], one, gate="first")
    with pytest.raises(UnsupportedError, match="reads"):
        quantize_static(x.double(), one)


def test_every_norm_and_activation_is_covered() -> None:
    used = {spec.get(key, "none") for (_, spec), key in itertools.product(STAGES, ("norm", "activation"))}
    assert used == set(NORMS) | set(ACTIVATE)
