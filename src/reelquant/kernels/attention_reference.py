"""Attention with rounded operands in plain torch: the oracle of the kernels, and what stands in for them where there is none.

    keys     = k - mean over tokens of k                       # the same for all scores of a query: softmax does not see it
    queries  = q - mean over its block of 128 queries          # only where wanted; mean . keys is added to the scores in float
    scores   = (codes(queries) . codes(keys)) * scale_q * scale_k  # int8 or int4, one scale per token
    output   = softmax(scores) . v                             # floats; or weights and values rounded, see WEIGHTS and VALUES

Products of codes are computed in float32, exactly: their sums stay below 2^24 for heads of up to 1040 channels.

Paper:
    SageAttention (arXiv:2410.02367, sections 4.2 to 4.4), and for int4 scores, smoothed queries and e4m3 values SageAttention2
    (arXiv:2411.10958). Ours: a scale per token on both sides (theirs, for int4: per thread of a tensor core), as in
    :mod:`reelquant.kernels.cuda.attention`; the weights of float values are not rounded here at all.

    Weights that are powers of two, and a first key whose weight stays float: DGQ (arXiv:2501.04304). Ours: the largest other weight of
    every query is the unit (theirs: one of the whole tensor), and the last code is zero, so that thousands of small weights add up to
    nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reelquant.kernels.attention_quant import FLOAT, AttentionQuant, key_bias

SCORES_AT_ONCE = 1 << 22  # scores of all heads at once; a clip has billions
LARGEST = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0}
SMALLEST = 1e-30  # of a magnitude that a scale is made of: tokens may be zero
WIDEST = 1040  # channels of a head whose products are exact
QUERY_BLOCK = 128  # queries that share the mean that they lose
LEAST = -1e30  # of a largest score: all keys but the first may be masked, and infinity minus infinity is NaN


def refuses(query: Tensor, key: Tensor, value: Tensor, numbers: AttentionQuant) -> str | None:
    """Why this cannot be computed, or None."""
    if query.ndim != 4 or query.shape[:2] != key.shape[:2] or key.shape[:3] != value.shape[:3]:
        return "not [batch, heads, tokens, head], or heads share keys"
    return None if query.shape[3] <= WIDEST else f"heads of {query.shape[3]} channels"


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, numbers: AttentionQuant, mask: Tensor | None = None
) -> Tensor:
    """``softmax(query key^T * scale + bias) value`` per head, a block of queries at a time.

    Args:
        query: ``[batch, heads, queries, head]``.
        key, value: ``[batch, heads, keys, head]``.
        scale: unitless; ``head ** -0.5`` by default.
        numbers: what is rounded.
        mask: one :func:`~reelquant.kernels.attention_quant.over_keys`, or None.

    Returns:
        ``[batch, heads, queries, head]`` in the dtype of the query, in the memory order of ``[batch, queries, heads, head]``.
    """
    batch, heads, queries, head = query.shape
    out = query.new_zeros(batch, queries, heads, value.shape[3]).transpose(1, 2)
    if not key.shape[2] or not out.numel():
        return out
    first = Scores(key.float(), head**-0.5 if scale is None else scale, numbers)
    second = Floats(value) if numbers.values == FLOAT else Rounded(value, numbers)
    bias = key_bias(mask)
    step = max(SCORES_AT_ONCE // (batch * heads * key.shape[2]), 1)
    step = max(step // QUERY_BLOCK, 1) * QUERY_BLOCK if numbers.smooths_queries else step
    for start in range(0, queries, step):
        part = slice(start, start + step)
        scores = first(query[:, :, part].float())
        scores = scores if bias is None else scores + bias[:, :, None]
        out[:, :, part] = second(scores)
    return out


class Scores:
    """``query key^T * scale`` of rounded operands, or of floats."""

    def __init__(self, key: Tensor, scale: float, numbers: AttentionQuant) -> None:
        self.numbers, self.scale = numbers, scale
        self.key = key - key.mean(2, keepdim=True)
        if numbers.scores == FLOAT:
            self.key = key
            return
        self.largest = LARGEST[numbers.scores]
        self.codes, self.key_scale = codes_of(self.key, self.largest)

    def __call__(self, query: Tensor) -> Tensor:
        if self.numbers.scores == FLOAT:
            return query @ self.key.mT * self.scale
        added = None
        if self.numbers.smooths_queries:
            query, mean = centered_queries(query)
            added = mean @ self.key.mT * self.scale
        rows, row_scale = codes_of(query, self.largest)
        scores = (rows @ self.codes.mT) * (row_scale * self.scale) * self.key_scale.mT
        return scores if added is None else scores + added


def centered_queries(query: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ``[..., queries, head]`` less the mean of their block of 128, and that mean for every query: their sum is the query."""
    mean = torch.cat([part.mean(-2, keepdim=True).expand_as(part) for part in query.split(QUERY_BLOCK, -2)], -2)
    return query - mean, mean


def codes_of(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """Codes ``-most .. most`` of ``[..., tokens, head]`` as float32 integers, and the scale of every token ``[..., tokens, 1]``."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    return (x * (most / largest)).round(), largest / most


class Floats:
    """``softmax(scores) v`` in float32."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.float()

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1) @ self.value


class Rounded:
    """The same of rounded weights; before they are divided by their sum they lie in 0 .. 1, and are scaled to fill the format.

    The sum is that of the weights before they are rounded.
    """

    def __init__(self, value: Tensor, numbers: AttentionQuant) -> None:
        self.top, self.round = WEIGHTS[numbers.values]
        self.value, self.scale = VALUES.get(numbers.values, _as_floats)(value.float())
        self.exact = int(numbers.first_key == FLOAT)  # how many keys' weights are not rounded

    def __call__(self, scores: Tensor) -> Tensor:
        if self.exact:
            return self._beside_first(scores)
        weights = (scores - scores.amax(-1, keepdim=True)).exp() * self.top
        return self.round(weights) @ self.value / weights.sum(-1, keepdim=True) * self.scale

    def _beside_first(self, scores: Tensor) -> Tensor:
        high = scores.amax(-1, keepdim=True)
        first, others = (scores[..., :1] - high).exp(), scores[..., 1:]
        if not others.shape[-1]:
            return first / first * self.value * self.scale
        own = others.amax(-1, keepdim=True).clamp_min(LEAST)  # the unit of their weights: they may all be small beside the first
        unit = (own - high).exp() / self.top
        weights = (others - own).exp() * self.top
        total = weights.sum(-1, keepdim=True) * unit + first
        return (self.round(weights) @ self.value[..., 1:, :] * unit + first * self.value[..., :1, :]) / total * self.scale


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST["e4m3"], LARGEST["e4m3"]).to(torch.float8_e4m3fn).float()


def _powers(bits: int) -> Callable[[Tensor], Tensor]:
    """Rounds to ``2**-n``, ``n`` from 0 to ``2**bits - 2``, by the nearest exponent; what is smaller becomes zero."""

    def rounded(weights: Tensor) -> Tensor:
        exponent = -weights.log2().round()
        return torch.where(exponent < (1 << bits) - 1, (-exponent).exp2(), 0.0)

    return rounded


def _as_floats(value: Tensor) -> tuple[Tensor, float]:
    return value, 1.0


def _as_e4m3(value: Tensor) -> tuple[Tensor, Tensor]:
    scale = value.abs().amax(2, keepdim=True).clamp_min(SMALLEST) / LARGEST["e4m3"]
    return _e4m3(value / scale), scale


def _as_int8(value: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = codes_of(value.mT, LARGEST["int8"])
    return codes.mT, scale.mT


WEIGHTS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "e4m3": (LARGEST["e4m3"], _e4m3),
    "uint8": (255.0, torch.round),
    "uint4": (15.0, torch.round),
    **{f"log2_{bits}": (1.0, _powers(bits)) for bits in range(3, 9)},
}
"""Word -> what a weight of one becomes before it is rounded, and how weights are rounded."""

VALUES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor | float]]] = {"e4m3": _as_e4m3, "uint8": _as_int8, "uint4": _as_int8}
"""Word -> codes of the values ``[batch, heads, keys, head]`` and the scale of every channel; floats for words that are not here."""
