"""Products with weights smaller than their inputs, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reelquant._errors import UnsupportedError
from reelquant.formats import Granularity, Int, Quantizer, pack, unpack
from reelquant.kernels.cuda.gemm_grouped import linear_w4a8, linear_w4a16, linear_w8a16, repack_4bit
from tests.unit.kernels.cuda.exact import ACTIVATE, DEVICE, assert_close, codes, exact


def packed_weight(columns: int, depth: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random packed codes, their bfloat16 group scales as stored, and the dequantized weight as the library itself computes it."""
    packed = pack(torch.randint(0, 16, (columns, depth), dtype=torch.uint8), 4)
    scale = (torch.rand(columns * -(-depth // group)) + 0.1).bfloat16()
    quantizer = Quantizer(Int(4), Granularity("group", group), scale.float())
    dense = quantizer.dequantize(unpack(packed, 4, depth), torch.float64) if packed.numel() else torch.zeros(columns, depth).double()
    return packed.to(DEVICE), scale.to(DEVICE), dense


SIZES: dict[str, Any] = {
    "rows": st.integers(0, 40),
    "columns": st.integers(0, 70),
    "depth": st.sampled_from([1, 31, 64, 65, 128, 200]),
    "group": st.sampled_from([64, 128]),
    "rank": st.sampled_from([0, 7]),
    "activation": st.sampled_from(sorted(ACTIVATE)),
}


def extras(rows: int, columns: int, rank: int, activation: str, dtype: torch.dtype) -> dict[str, Any]:
    """Bias, activation and perhaps a low-rank term."""
    found: dict[str, Any] = {"bias": torch.randn(columns).to(DEVICE, dtype), "activation": activation}
    if rank:
        found |= {"down": torch.randn(rows, rank).to(DEVICE, dtype), "up": torch.randn(columns, rank).to(DEVICE, dtype)}
    return found


@given(**SIZES, per_token=st.booleans(), affine=st.booleans())
def test_w4a8(rows: int, columns: int, depth: int, group: int, rank: int, activation: str, per_token: bool, affine: bool) -> None:
    packed, scale, dense = packed_weight(columns, depth, group)
    weight, group_scale, sums = repack_4bit(packed, scale, depth, group)
    x, table, slot = codes(rows, depth), torch.tensor([[9.0], [2**-9]], device=DEVICE), torch.tensor(1, device=DEVICE)
    input_scale = torch.rand(rows, device=DEVICE) * 2**-8 if per_token else 2**-9
    rest = extras(rows, columns, rank, activation, torch.bfloat16)
    zero = {"input_zero_point": torch.tensor([[0.0], [40.0]], device=DEVICE), "weight_sums": sums} if affine else {}
    out = linear_w4a8(
        x, weight, group_scale, input_scale if per_token else table, slot, group=group, out_dtype=torch.float32, **rest, **zero
    )
    expected, size = exact(x, dense, input_scale, torch.ones(1), zero=40.0 - 128.0 if affine else 0.0, **rest)
    if affine:  # the sum and its correction are larger than their difference
        size = size + 256 * (input_scale.cpu().double()[:, None] if per_token else input_scale) * dense.abs().sum(1)
    assert_close(out, expected, size)


@given(**SIZES, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_w4a16(rows: int, columns: int, depth: int, group: int, rank: int, activation: str, dtype: torch.dtype) -> None:
    packed, scale, dense = packed_weight(columns, depth, group)
    weight, group_scale, _ = repack_4bit(packed, scale, depth, group)
    x, rest = torch.randn(rows, depth).to(DEVICE, dtype), extras(rows, columns, rank, activation, dtype)
    rounded = dense.to(torch.float32).to(dtype)  # documented: the dequantized weight is rounded before the product
    assert_close(linear_w4a16(x, weight, group_scale, group=group, **rest), *exact(x, rounded, 1.0, torch.ones(1), **rest))


@given(**SIZES, dtype=st.sampled_from([torch.bfloat16, torch.float16]), per_channel=st.booleans())
def test_w8a16(rows: int, columns: int, depth: int, group: int, rank: int, activation: str, dtype: torch.dtype, per_channel: bool) -> None:
    del group
    x, weight = torch.randn(rows, depth).to(DEVICE, dtype), codes(columns, depth)
    scale = (torch.rand(columns if per_channel else 1) * 2**-5).bfloat16().to(DEVICE)
    rest = extras(rows, columns, rank, activation, dtype)
    assert_close(linear_w8a16(x, weight, scale, **rest), *exact(x, weight, 1.0, scale, **rest))


def test_repacked_codes_worked_by_hand() -> None:
    values = torch.zeros(1, 64, dtype=torch.uint8) + 8  # the code of 0
    values[0, 0], values[0, 1], values[0, 32] = 15, 0, 7  # 7, -8, -1
    weight, scale, sums = repack_4bit(pack(values, 4), torch.tensor([0.5]), 64)
    assert weight[0, :3].tolist() == [-9, 8, 0]  # 0xF7: -1 above 7; 0x08: 0 above -8
    assert scale.tolist() == [[0.5]] and sums.tolist() == [-1.0]


def test_strided_input() -> None:
    packed, scale, _ = packed_weight(8, 70, 64)
    weight, group_scale, _ = repack_4bit(packed, scale, 70)
    x = torch.randn(70, 12).bfloat16().to(DEVICE).t()
    assert torch.equal(linear_w4a16(x[::2], weight, group_scale), linear_w4a16(x.contiguous(), weight, group_scale)[::2])
    assert linear_w4a16(x.reshape(3, 4, 70), weight, group_scale).shape == (3, 4, 8)


def test_refusals() -> None:
    packed, scale, _ = packed_weight(8, 128, 64)
    weight, group_scale, _ = repack_4bit(packed, scale, 128)
    x, q, one = torch.randn(4, 128, device=DEVICE).bfloat16(), codes(4, 128), torch.ones(1, 1, device=DEVICE)
    with pytest.raises(UnsupportedError, match="groups of 32"):
        repack_4bit(packed, scale, 128, 32)
    with pytest.raises(UnsupportedError, match="repack_4bit makes"):
        linear_w4a16(x, weight[:, :50], group_scale)
    with pytest.raises(UnsupportedError, match="group scales are"):
        linear_w4a16(x, weight, group_scale.t())
    with pytest.raises(UnsupportedError, match="16-bit floats"):
        linear_w8a16(x.float(), q, one[0])
    with pytest.raises(UnsupportedError, match="input codes are int8"):
        linear_w4a8(q.view(torch.uint8), weight, group_scale, one)
    with pytest.raises(UnsupportedError, match="repack_4bit makes them"):
        linear_w4a8(q, weight, group_scale, one, input_zero_point=one)
