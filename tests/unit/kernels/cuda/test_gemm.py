"""8-bit linear layers against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reelquant._errors import UnsupportedError
from reelquant.kernels.cuda import gemm
from reelquant.kernels.cuda.gemm import linear_8bit, weight_sums
from reelquant.kernels.cuda.launch import FP8
from tests.unit.kernels.cuda.exact import ACTIVATE, DEVICE, ROUNDING, assert_close, codes, exact


@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 70),
    depth=st.integers(0, 150),
    dtype=st.sampled_from([torch.int8, torch.uint8, FP8]),
    out_dtype=st.sampled_from(sorted(ROUNDING, key=str)),
    per_token=st.booleans(),
    per_channel=st.booleans(),
    bias=st.booleans(),
    rank=st.sampled_from([0, 0, 1, 5, 32]),
    activation=st.sampled_from(sorted(ACTIVATE)),
)
def test_any_combination(
    rows: int, columns: int, depth: int, dtype: torch.dtype, out_dtype: torch.dtype, per_token: bool, per_channel: bool, bias: bool,
    rank: int, activation: str,
) -> None:  # fmt: skip
    x, weight = codes(rows, depth, dtype=dtype), codes(columns, depth, dtype=FP8 if dtype == FP8 else torch.int8)
    table, slot = torch.tensor([[99.0], [2**-11], [99.0]], device=DEVICE), torch.tensor(1, device=DEVICE)
    scale = torch.rand(rows, device=DEVICE) * 2**-10 if per_token else 2**-11
    weight_scale = (torch.rand(columns if per_channel else 1) * 2**-5 + 2**-9).bfloat16().to(DEVICE)
    extra: dict[str, Any] = {"activation": activation}
    if bias:
        extra["bias"] = torch.randn(columns).bfloat16().to(DEVICE)
    if rank:
        extra |= {"down": torch.randn(rows, rank).bfloat16().to(DEVICE), "up": torch.randn(columns, rank).bfloat16().to(DEVICE)}
    affine: dict[str, Any] = {}
    if dtype == torch.uint8:
        affine = {"input_zero_point": torch.tensor([[0.0], [77.0], [255.0]], device=DEVICE), "weight_sums": weight_sums(weight)}
    out = linear_8bit(x, weight, scale if per_token else table, weight_scale, slot, **extra, **affine, out_dtype=out_dtype)
    expected, size = exact(x, weight, scale, weight_scale, **extra, zero=77.0 if affine else 0.0)
    slack = 2**-13 * size if dtype == FP8 and DEVICE == "cuda" else 0 * size
    assert_close(out, expected, size + slack * 2**20)


def test_values_worked_by_hand() -> None:
    x, weight = torch.tensor([[1, -2, 3]], dtype=torch.int8), torch.tensor([[10, 20, 30], [-1, 0, 1]], dtype=torch.int8)
    out = linear_8bit(
        x.to(DEVICE), weight.to(DEVICE), torch.tensor([[0.5]], device=DEVICE), torch.tensor([0.25, 2.0], device=DEVICE),
        bias=torch.tensor([1.0, -1.0], device=DEVICE), out_dtype=torch.float32,
    )  # fmt: skip
    assert out.tolist() == [[60 * 0.125 + 1, 2 * 1.0 - 1]]


def test_shifted_and_unsigned_codes_agree() -> None:
    q, weight, one = codes(9, 33, dtype=torch.uint8), codes(11, 33), torch.ones(1, 1, device=DEVICE)
    shifted = (q ^ 128).view(torch.int8)
    rest = {"input_zero_point": one * 200, "weight_sums": weight_sums(weight), "out_dtype": torch.float32}
    both = [linear_8bit(x, weight, one, one[0], **rest) for x in (q, shifted)]
    assert torch.equal(*both) and torch.equal(both[0].double().cpu(), exact(q, weight, 1.0, one[0], zero=200.0)[0])


def test_a_table_of_one_row_holds_for_every_slot() -> None:
    x, weight, one = codes(3, 8), codes(4, 8), torch.ones(1, 1, device=DEVICE)
    table = torch.tensor([[9.0], [9.0], [0.25]], device=DEVICE)
    many = linear_8bit(x, weight, table, one[0], torch.tensor(2, device=DEVICE))
    assert torch.equal(many, linear_8bit(x, weight, table[2:], one[0]))
    assert torch.equal(many, linear_8bit(x, weight, table[2:], one[0], torch.tensor(2, device=DEVICE)))
    assert (many != linear_8bit(x, weight, table[:1], one[0])).any()


def test_strided_and_batched_inputs() -> None:
    base, weight, one = codes(40, 24), codes(48, 13), torch.ones(1, 1, device=DEVICE)
    for x, w in ((base.t()[:, :13], weight), (base[::3, ::2][:, :12], weight[::2, :12]), (base.reshape(4, 10, 24)[:, ::2, :13], weight)):
        out = linear_8bit(x, w, one, one[0], out_dtype=torch.float32)
        expected, _ = exact(x.reshape(-1, x.shape[-1]), w, 1.0, one[0])
        assert out.shape == (*x.shape[:-1], len(w)) and torch.equal(out.double().cpu().reshape(expected.shape), expected)


def test_every_place_of_a_given_output_is_written_and_no_other() -> None:
    memory = torch.full((20, 50), torch.nan, device=DEVICE)
    gemm.run(codes(18, 40), codes(35, 40), memory[1:19, 5:40], torch.ones(1, 1, device=DEVICE), torch.ones(1, device=DEVICE))
    written = torch.zeros(20, 50, dtype=torch.bool)
    written[1:19, 5:40] = True
    assert torch.equal(~memory.isnan().cpu(), written)


def test_refusals() -> None:
    x, weight, one = codes(4, 8), codes(6, 8), torch.ones(1, 1, device=DEVICE)
    half = torch.ones(6, 3, device=DEVICE).half()
    cases: list[tuple[str, dict[str, Any]]] = [
        ("8 channels meet a weight with 7", {"weight": weight[:, :7]}),
        ("torch.int8 meet a weight of torch.uint8", {"weight": weight.view(torch.uint8)}),
        ("need their input_zero_point", {"codes": x.view(torch.uint8)}),
        ("need weight_sums", {"input_zero_point": one}),
        ("an output of torch.int8", {"out_dtype": torch.int8}),
        ("torch.float64", {"out_dtype": torch.float64}),
        ("both factors", {"up": half}),
        ("low-rank term is", {"up": half, "down": half}),
        ("an input_scale that was found at run time needs 4", {"input_scale": one.expand(5, 1)[:, 0].contiguous()}),
        ("weight_scale needs 6", {"weight_scale": torch.ones(5, device=DEVICE)}),
        ("bias needs 6", {"bias": torch.ones(12, device=DEVICE)[::2]}),
        ("no slot", {"input_scale": torch.ones(2, 1, device=DEVICE)}),
        ("activation 'relu'", {"activation": "relu"}),
        ("overflow", {"codes": x[:, :1].expand(4, 70000), "weight": weight[:, :1].expand(6, 70000)}),
    ]
    for message, change in cases:
        with pytest.raises(UnsupportedError, match=message):
            linear_8bit(**({"codes": x, "weight": weight, "input_scale": one, "weight_scale": one[0]} | change))
