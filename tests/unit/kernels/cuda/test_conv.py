"""Convolutions of codes against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from reelquant._errors import UnsupportedError
from reelquant.kernels.cuda.conv import convolution_8bit, out_shape, padding_codes, repack_convolution
from reelquant.kernels.cuda.gemm import weight_sums
from reelquant.kernels.cuda.launch import FP8
from reelquant.kernels.cuda.quantize import quantize_static
from tests.unit.kernels.cuda.exact import ACTIVATE, DEVICE, assert_close, codes

CONVOLVE: dict[int, Any] = {4: F.conv2d, 5: F.conv3d}


def exact(x: Tensor, weight: Tensor, pad_value: Tensor, stride: Any, padding: Any, dilation: Any) -> tuple[Tensor, Tensor]:
    """Sums of codes in float64 and of their magnitudes; ``pad_value`` ``[in]`` stands around the input."""
    x, weight = x.cpu().to(torch.float64), weight.cpu().to(torch.float64)
    offset = pad_value.cpu().to(torch.float64).view(1, -1, *[1] * (x.ndim - 2))
    around = [size for p in reversed(padding) for size in (p, p)]
    x = F.pad(x - offset, around) + offset
    run = lambda a, b: CONVOLVE[x.ndim](a, b, stride=stride, dilation=dilation)  # noqa: E731
    return run(x, weight), run(x.abs(), weight.abs())


AXIS = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2))


@given(
    axes=st.lists(AXIS, min_size=2, max_size=3),
    batch=st.integers(0, 2),
    channels=st.sampled_from([1, 3, 32, 40]),
    columns=st.sampled_from([1, 5, 20]),
    dtype=st.sampled_from([torch.int8, FP8]),
    shifted=st.booleans(),
    channels_last=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATE)),
)
def test_any_geometry(
    axes: list[Any], batch: int, channels: int, columns: int, dtype: torch.dtype, shifted: bool, channels_last: bool, activation: str
) -> None:
    sizes, kernel, stride, padding, dilation = zip(*axes, strict=True)
    assume(all(out_shape(sizes, kernel, stride, padding, dilation)))
    x, weight = codes(batch, channels, *sizes, dtype=dtype), codes(columns, channels, *kernel, dtype=dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    table, slot = torch.tensor([[9.0], [2**-12]], device=DEVICE), torch.tensor(1, device=DEVICE)
    zeros = codes(2, channels, dtype=dtype) if shifted else None
    scale, bias = (torch.rand(columns) + 0.1).bfloat16().to(DEVICE), torch.randn(columns, device=DEVICE)
    out = convolution_8bit(
        x, repack_convolution(weight), table, scale, stride, padding, dilation, slot, bias, zeros, activation, out_dtype=torch.float32
    )
    sums, size = exact(x, weight, torch.zeros(channels) if zeros is None else zeros[1], stride, padding, dilation)
    factor, along = scale.double().cpu() * 2**-12, (-1, *[1] * len(sizes))
    expected = ACTIVATE[activation](sums * factor.view(along) + bias.double().cpu().view(along))
    slack = 2**7 if dtype == FP8 and DEVICE == "cuda" else 1  # sums of float8 products keep 14 bits
    assert_close(out, expected, slack * (size * factor.view(along) + bias.double().cpu().abs().view(along)))
    assert out.movedim(1, -1).is_contiguous()


def test_the_border_of_an_affine_shifted_input_is_the_code_of_zero() -> None:
    """From floats: padding before the shift, as the layers do, and zero points per step."""
    x = torch.randn(1, 6, 5, 7, device=DEVICE)
    shift, pre = torch.randn(6, device=DEVICE).bfloat16(), (torch.rand(6, device=DEVICE) + 0.5).bfloat16()
    table, zero = torch.tensor([[1.0], [2**-5]], device=DEVICE), torch.tensor([[0.0], [117.0]], device=DEVICE)
    slot, weight = torch.tensor(1, device=DEVICE), codes(4, 6, 3, 3)
    quantize = lambda t: quantize_static(t.movedim(1, -1), table, slot, zero, pre_shift=shift, pre_scale=pre).movedim(-1, 1)  # noqa: E731
    zeros = padding_codes(table, 6, shift, pre, zero)
    rest = {"input_zero_point": zero, "weight_sums": weight_sums(weight), "slot": slot, "out_dtype": torch.float32}
    fused = convolution_8bit(quantize(x), repack_convolution(weight), table, table[0], [1, 1], [1, 2], [1, 1], pad_codes=zeros, **rest)
    padded = quantize(F.pad(x, (2, 2, 1, 1)))
    assert torch.equal(fused, convolution_8bit(padded, repack_convolution(weight), table, table[0], [1, 1], [0, 0], [1, 1], **rest))
    sums = F.conv2d(padded.cpu().double() + 128 - 117, weight.cpu().double())
    assert torch.equal(fused.cpu().double(), sums * 2**-5)


def test_refusals() -> None:
    x, weight, one = codes(1, 3, 4, 4), codes(2, 3, 3, 3), torch.ones(1, 1, device=DEVICE)
    packed, ones = repack_convolution(weight), [1, 1]
    cases: list[tuple[str, dict[str, Any]]] = [
        ("repack_convolution", {"weight": weight}),
        ("both int8", {"codes": x.view(torch.uint8)}),
        ("as many strides", {"stride": [1]}),
        ("kernel of 3 frames", {"weight": repack_convolution(weight[..., None])}),
        ("pad_codes are", {"pad_codes": codes(3), "padding": ones}),
        ("needs pad_codes", {"input_zero_point": one, "weight_sums": weight_sums(weight), "padding": ones}),
    ]
    for message, change in cases:
        arguments = {"codes": x, "weight": packed, "input_scale": one, "weight_scale": one[0]}
        with pytest.raises(UnsupportedError, match=message):
            convolution_8bit(**(arguments | {"stride": ones, "padding": [0, 0], "dilation": ones} | change))
