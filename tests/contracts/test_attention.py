"""Attention with rounded operands: the reference within the bound of its rounding, and which kernel a device gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from reelquant._errors import RecipeError
from reelquant.kernels import attention_reference, backend
from reelquant.kernels.attention import FLOAT, REFERENCE, ROUNDED, AttentionQuant, over_keys, parse_attention, select
from reelquant.kernels.cuda import scores
from tests.contracts.attention_oracle import attend, bound, make, prepared, rounded

NUMBERS = [AttentionQuant(), AttentionQuant(values="e4m3")]


@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    queries=st.integers(1, 70),
    tokens=st.integers(1, 70),
    width=st.sampled_from([1, 24, 64, 128]),
    numbers=st.sampled_from(NUMBERS),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_any_shape_is_within_the_bound_of_its_rounding(
    batch: int, heads: int, queries: int, tokens: int, width: int, numbers: AttentionQuant, dtype: torch.dtype
) -> None:
    q, k, v = (x.cpu() for x in make(batch, heads, queries, tokens, width, dtype=dtype))
    out = REFERENCE.attention(q, k, v, None, numbers, None)
    assert out.dtype == dtype and out.shape == q.shape and out.transpose(1, 2).is_contiguous()
    q64, k64, v64 = prepared(q, k, v)
    error = (out.double() - attend(q64, k64, v64, width**-0.5)[0]).abs()
    assert not (error > bound(q64, k64, v64, width**-0.5, numbers.values == "e4m3")).any()


@pytest.mark.parametrize(("width", "tokens"), [(64, 96), (128, 75)])
def test_nothing_is_lost_beyond_the_codes(width: int, tokens: int) -> None:
    """The same codes in float64: what is left is float32 arithmetic, on scores below 128 (2^-24 * 2^7, and some sums)."""
    q, k, v = (x.cpu() for x in make(1, 2, 45, tokens, width, dtype=torch.float32))
    q64, k64, v64 = prepared(q, k, v)
    expected, _ = attend(rounded(q64)[0], rounded(k64)[0], v64, 0.3)
    found = REFERENCE.attention(q, k, v, 0.3, NUMBERS[0], None).double()
    # keys are centered in float32 here: one value between two codes may go the other way, and moves its token's score by a code
    assert float((found - expected).norm() / expected.norm()) < 2**-10
    assert float((found - attend(q64, k64, v64, 0.3)[0]).norm() / expected.norm()) > 2**-9  # or nothing would have been rounded


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.cpu() for x in make(2, 2, 45, 31, 64))
    whole = REFERENCE.attention(q, k, v, None, NUMBERS[1], None)
    monkeypatch.setattr(attention_reference, "SCORES_AT_ONCE", 7 * 2 * 2 * 31)
    torch.testing.assert_close(REFERENCE.attention(q, k, v, None, NUMBERS[1], None), whole, rtol=2**-8, atol=1e-6)


def test_outliers_that_all_keys_share_cost_nothing() -> None:
    """Rounding keys as they are would leave little of those whose mean is a hundred times their spread."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 40, 64), torch.randn(1, 1, 50, 64), torch.randn(1, 1, 50, 64)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    plain, moved = (REFERENCE.attention(q, keys, v, None, NUMBERS[0], None) for keys in (k, k + 100 * torch.randn(64)))
    error, with_offset = (float((x - exact).norm() / exact.norm()) for x in (plain, moved))
    assert error < 0.02 and with_offset < 1.2 * error


def test_tokens_of_zeros_and_no_tokens() -> None:
    zeros = torch.zeros(1, 2, 3, 8)
    assert torch.equal(REFERENCE.attention(zeros, zeros, zeros, None, NUMBERS[1], None), zeros)
    assert torch.equal(REFERENCE.attention(zeros + 1, zeros[:, :, :0], zeros[:, :, :0], None, NUMBERS[0], None), zeros)


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_masks_over_keys_leave_what_the_others_give(numbers: AttentionQuant) -> None:
    """Masked keys move the mean that is subtracted from all keys, so codes differ; the bound of their rounding holds."""
    q, k, v = (x.cpu() for x in make(2, 2, 9, 31, 64, dtype=torch.float32))
    seen = torch.zeros(2, 1, 1, 31, dtype=torch.bool)
    seen[:, :, :, 7:20] = True
    found = REFERENCE.attention(q, k, v, None, numbers, seen)
    few = REFERENCE.attention(q, k[:, :, 7:20], v[:, :, 7:20], None, numbers, None)
    exact = F.scaled_dot_product_attention(q.double(), k[:, :, 7:20].double(), v[:, :, 7:20].double())
    assert float((found - exact).norm()) < 2 * float((few - exact).norm()) + 1e-6
    bias = torch.zeros(1, 2, 1, 31).masked_fill(~seen[:1], -torch.inf)
    assert torch.equal(REFERENCE.attention(q, k, v, None, numbers, bias), found)
    assert over_keys(seen, q, k) and over_keys(bias, q, k)
    for other in (seen[0, 0], seen.expand(2, 1, 9, 31), torch.zeros(2, 3, 1, 31), seen[..., :30]):
        assert not over_keys(other, q, k)


def test_every_device_has_one_answer() -> None:
    assert select(NUMBERS[0], "cpu") == (REFERENCE, None) and not REFERENCE.low_bit
    assert select(NUMBERS[0], "mps") == (None, "there is no kernel for mps")
    kernel, reason = select(NUMBERS[0], "cuda")
    assert (kernel is None) == (scores.missing(NUMBERS[0]) is not None) and reason == scores.missing(NUMBERS[0])
    assert ROUNDED["cuda"]().low_bit
    assert select(NUMBERS[0], "cuda", "reference")[0] is REFERENCE
    with backend("reference"):
        assert select(NUMBERS[0], "mps")[0] is REFERENCE


def test_what_a_gpu_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores.cuda, "available", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert select(NUMBERS[0], "cuda") == (ROUNDED["cuda"](), None)
    assert select(NUMBERS[1], "cuda") == (None, "e4m3 needs compute capability 8.9, the GPU has 8.6")
    x = torch.zeros(1, 2, 5, 64)
    half, wide = x.half(), torch.zeros(1, 2, 5, 300).half()
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((x, x, x), "float32, neither"), ((half, half[:, :1], half[:, :1]), "share keys"), ((half, half, half[..., :8]), "share keys"),
        ((wide, wide, wide), "heads of 300"),
    ]  # fmt: skip
    assert scores.refuses(half, half[:, :, :3], half[:, :, :3], NUMBERS[1]) is None
    for given_, words in cases:
        assert words in str(scores.refuses(*given_, NUMBERS[0]))


def test_words_are_checked() -> None:
    assert parse_attention({"scores": "int8"}) == NUMBERS[0] and parse_attention(NUMBERS[1].to_json()) == NUMBERS[1]
    assert parse_attention(FLOAT) is None and str(NUMBERS[1]) == "int8 scores, e4m3 values"
    cases = [
        ({"score": "int8"}, "no key 'score'; did you mean 'scores'"),
        ({"values": "fp8"}, "one of float, e4m3, got 'fp8'"),
        ("int4", "a mapping"),
    ]
    for value, words in cases:
        with pytest.raises(RecipeError, match=words):
            parse_attention(value)
