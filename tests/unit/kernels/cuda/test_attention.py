"""8-bit attention against float64, and against the same rounding done in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from reelquant._errors import UnsupportedError
from reelquant.kernels.cuda.attention import attention_8bit
from tests.contracts.attention_oracle import DEVICE, attend, bound, make, prepared, rounded


@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    key_heads=st.integers(1, 2),
    queries=st.integers(0, 70),
    tokens=st.integers(1, 70),
    width=st.sampled_from([1, 16, 24, 32, 64, 128]),
    float8=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_any_shape(
    batch: int, groups: int, key_heads: int, queries: int, tokens: int, width: int, float8: bool, dtype: torch.dtype
) -> None:
    q, k, v = make(batch, groups * key_heads, queries, tokens, width, key_heads, dtype)
    out = attention_8bit(q, k, v, float8_values=float8)
    assert out.dtype == dtype and out.shape == q.shape and not out.isnan().any()
    q64, k64, v64 = prepared(q, k, v)
    if queries:
        error = (out.double().cpu() - attend(q64, k64, v64, width**-0.5)[0]).abs()
        assert not (error > bound(q64, k64, v64, width**-0.5, float8)).any()


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize(("width", "tokens"), [(64, 96), (128, 75)])
def test_nothing_is_lost_beyond_the_codes(width: int, tokens: int, float8: bool) -> None:
    """The same codes in float64 leave the rounding of P (uniform: 2^-9 / sqrt 3 for bfloat16, 2^-5 / sqrt 3 for e4m3 with V alike)."""
    q, k, v = make(1, 2, 45, tokens, width)
    q64, k64, v64 = prepared(q, k, v)
    expected, _ = attend(rounded(q64)[0], rounded(k64)[0], v64, 0.3)
    found = attention_8bit(q, k, v, 0.3, float8_values=float8).double().cpu()
    assert (found - expected).square().mean().sqrt() < expected.square().mean().sqrt() * (2**-4 if float8 else 2**-8)
    # Rounding has no preferred side: over thousands of outputs the slope is 1 within 2^-5 / sqrt(3 * 5760) = 2^-12, and 16 times that here
    assert abs(float((found * expected).sum() / expected.square().sum()) - 1) < 2**-8


def test_a_common_offset_of_the_keys_changes_nothing() -> None:
    """With powers of two the offset is exact, and so is the mean of these keys."""
    q = torch.randn(1, 1, 20, 32, device=DEVICE).bfloat16()
    half = torch.randint(-8, 8, (1, 1, 16, 32), device=DEVICE).bfloat16()
    k, v = torch.cat([half, -half], 2), torch.randn(1, 1, 32, 32, device=DEVICE).bfloat16()
    assert torch.equal(attention_8bit(q, k, v), attention_8bit(q, k + 64, v))


def test_strided_inputs_and_free_flattening() -> None:
    packed = torch.randn(2, 37, 3, 4, 32, device=DEVICE).bfloat16()  # one projection makes q, k and v
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    out = attention_8bit(q, k, v)
    assert torch.equal(out, attention_8bit(q.contiguous(), k.contiguous(), v.contiguous()))
    assert out.transpose(1, 2).is_contiguous()
    columns = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(attention_8bit(columns, k, v), out)


def test_no_keys_and_no_queries() -> None:
    q, k, v = make(1, 2, 3, 0, 16)
    assert torch.equal(attention_8bit(q, k, v), torch.zeros_like(q))
    assert attention_8bit(q[:0], k[:0], v[:0]).shape == (0, 2, 3, 16)


def test_protected_steps_are_exact() -> None:
    q, k, v = make(1, 4, 9, 11, 16, key_heads=2)
    assert torch.equal(attention_8bit(q, k, v, 0.5, exact=True), F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True))


def test_refusals() -> None:
    q, k, v = make(1, 4, 5, 6, 16)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("takes masks over keys", {"mask": torch.ones(5, 6, dtype=torch.bool, device=DEVICE)}),
        ("bfloat16 or float16", {"q": q.float()}),
        ("alike", {"v": v.half()}),
        ("heads divide", {"k": k[:, :3], "v": v[:, :3]}),
        ("of one shape", {"k": k[:, :, :5]}),
    ]
    for message, change in cases:
        with pytest.raises(UnsupportedError, match=message):
            attention_8bit(**({"q": q, "k": k, "v": v} | change))
    with pytest.raises(UnsupportedError, match="width 257"):
        attention_8bit(*(torch.zeros(1, 1, 2, 257, device=DEVICE).bfloat16() for _ in range(3)))
