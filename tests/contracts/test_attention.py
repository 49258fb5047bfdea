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
from reelquant.kernels.attention import (
    FLOAT,
    REFERENCE,
    ROUNDED,
    AttentionQuant,
    AttentionRule,
    over_keys,
    parse_asked,
    parse_attention,
    select,
)
from reelquant.kernels.cuda import scores
from tests.contracts.attention_oracle import attend, bound, make, prepared, rounded

NUMBERS = [AttentionQuant(), AttentionQuant(values="e4m3")]
MORE = [
    AttentionQuant("int4"),
    AttentionQuant("int4", "uint8"),
    AttentionQuant("float", "log2_8"),
    AttentionQuant("int8", "log2_4", first_key="float"),
    AttentionQuant("int8", "e4m3", "both", "float"),
]


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


@pytest.mark.parametrize("numbers", [*NUMBERS, *MORE], ids=str)
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


def test_subtracting_means_changes_nothing_before_rounding() -> None:
    """What softmax does not see, and what is added again: with outliers that all tokens share, in float32."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 32) for _ in range(3))
    q, k = q + 3 * torch.randn(32), k + 3 * torch.randn(32)
    keys = k - k.mean(2, keepdim=True)
    queries, mean = attention_reference.centered_queries(q)
    scores = (queries @ keys.mT + mean @ keys.mT) * 32**-0.5
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close((scores.softmax(-1) @ v).double(), expected, rtol=1e-5, atol=1e-5)
    for start, end in ((0, 128), (128, 256), (256, 300)):
        torch.testing.assert_close(queries[:, :, start:end].mean(2), torch.zeros(1, 2, 32), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scores", ["int4", "int8"])
def test_outliers_that_all_queries_share_cost_int4_scores_3_db_unless_they_are_smoothed(scores: Any) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 64) for _ in range(3))
    q = q + 6 * torch.randn(64)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    error = {
        smooth: float((REFERENCE.attention(q, k, v, None, AttentionQuant(scores, smooth=smooth), None) - exact).square().mean())
        for smooth in ("keys", "both")
    }
    assert error["both"] < 10**-0.3 * error["keys"]


def test_weights_become_powers_of_two_of_the_largest() -> None:
    weights = torch.tensor([1.0, 0.75, 0.7, 0.3, 2**-6, 2**-7, 0.0])  # 0.707 parts the first two exponents
    assert attention_reference.WEIGHTS["log2_3"][1](weights).tolist() == [1.0, 1.0, 0.5, 0.25, 2**-6, 0.0, 0.0]
    q = torch.zeros(1, 1, 1, 1)
    k, v = torch.zeros(1, 1, 3, 1), torch.tensor([3.0, 4.0, 5.0]).view(1, 1, 3, 1)
    found = REFERENCE.attention(q, k, v, None, AttentionQuant("float", "log2_4"), (torch.tensor([1.0, 0.3, 0.5]).log()).view(1, 1, 1, 3))
    assert float(found) == pytest.approx((3 + 0.25 * 4 + 0.5 * 5) / 1.8)


def test_the_weight_of_the_first_key_is_left_as_it_is() -> None:
    """It is a hundred times the others: as their unit it would leave them few codes, and rounded it would move the whole output."""
    q, k = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 3, 1)
    v, weights = torch.tensor([3.0, 4.0, 5.0]).view(1, 1, 3, 1), torch.tensor([150.0, 1.5, 0.5])
    bias = weights.log().view(1, 1, 1, 3)
    found = REFERENCE.attention(q, k, v, None, AttentionQuant("float", "log2_3", first_key="float"), bias)
    small = 1.5 * 2**-2  # 0.5 / 1.5 is 2**-1.58
    assert float(found) == pytest.approx((150 * 3 + 1.5 * 4 + small * 5) / 152)
    assert float(REFERENCE.attention(q, k[:, :, :1], v[:, :, :1], None, AttentionQuant("float", "log2_3", first_key="float"), None)) == 3


@pytest.mark.parametrize("numbers", MORE, ids=str)
def test_any_numbers_round_something_and_not_much(numbers: AttentionQuant, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, size, 16) for size in (300, 31, 31))
    exact = F.scaled_dot_product_attention(q, k, v)
    found = REFERENCE.attention(q, k, v, None, numbers, None)
    error = float((found - exact).norm() / exact.norm())
    assert 1e-3 < error < (0.35 if "log2" in numbers.values else 0.2)
    monkeypatch.setattr(attention_reference, "SCORES_AT_ONCE", 1)  # a block of queries at a time
    torch.testing.assert_close(REFERENCE.attention(q, k, v, None, numbers, None), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("numbers", MORE, ids=str)
def test_numbers_without_a_kernel_are_simulated(numbers: AttentionQuant) -> None:
    for device in ("cpu", "cuda"):
        assert select(numbers, device) == (REFERENCE, None)
    assert not ROUNDED["cuda"]().takes(numbers) and ROUNDED["cuda"]().takes(AttentionQuant(smooth="keys"))


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
        ({"values": "fp8"}, "one of float, e4m3, uint8, .*, got 'fp8'"),
        ("int4", "a mapping"),
        ({"first_key": "float"}, "first_key is 'float', and values: float rounds no weight"),
        ({"scores": "float", "smooth": "both", "values": "e4m3"}, "smooth is 'both', and scores: float rounds none"),
    ]
    for value, words in cases:
        with pytest.raises(RecipeError, match=words):
            parse_attention(value)


def test_rules_are_checked() -> None:
    rules = [{"on": "*attn1*", "scores": "int4", "steps": [0, 0.5]}, {"on": "role:cross", "scores": "float"}]
    assert parse_asked(rules) == (AttentionRule("*attn1*", AttentionQuant("int4"), (0.0, 0.5)), AttentionRule("role:cross", None))
    assert parse_asked({"values": "e4m3"}) == NUMBERS[1] and parse_asked([]) == ()
    cases = [
        ([{"scores": "int4"}], r"attention.0 is a rule like"),
        ([{"on": "*"}, {"on": "*", "score": "int4"}], r"attention.1: attention has no key 'score'"),
        ([{"on": "*", "steps": [0.5, 0.5]}], r"attention.0: steps are the start and end .*got \[0.5, 0.5\]"),
        ([{"on": "*", "steps": [0, 3]}], "like"),
    ]
    for value, words in cases:
        with pytest.raises(RecipeError, match=words):
            parse_asked(value)
