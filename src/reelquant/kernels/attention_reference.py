"""Attention with rounded operands in plain torch: the oracle of the kernels, and what stands in for them where there is none.

    keys     = k - mean over tokens of k                       # the same for all scores of a query: softmax does not see it
    scores   = (codes(q) . codes(keys)) * scale_q * scale_k    # int8, one scale per token
    output   = softmax(scores) . v                             # floats; or both e4m3, v with one scale per channel

Products of codes are computed in float32, exactly: their sums stay below 2^24 for heads of up to 1040 channels.

Paper:
    SageAttention (arXiv:2410.02367, sections 4.2 to 4.4), and for e4m3 values SageAttention2 (arXiv:2411.10958). Ours: a scale per token
    on both sides, as in :mod:`reelquant.kernels.cuda.attention`; the weights of float values are not rounded here at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.kernels.attention_quant import AttentionQuant, key_bias

SCORES_AT_ONCE = 1 << 22  # scores of all heads at once; a clip has billions
LARGEST = {"int8": 127.0, "e4m3": 448.0}
SMALLEST = 1e-30  # of a magnitude that a scale is made of: tokens may be zero
WIDEST = 1040  # channels of a head whose products are exact


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
    key = key.float()
    codes, key_scale = int8_codes(key - key.mean(2, keepdim=True))
    bias = key_bias(mask)
    second = Floats(value) if numbers.values == "float" else Codes(value)
    step = max(SCORES_AT_ONCE // (batch * heads * key.shape[2]), 1)
    for start in range(0, queries, step):
        part = slice(start, start + step)
        rows, row_scale = int8_codes(query[:, :, part].float())
        scores = (rows @ codes.mT) * (row_scale * (head**-0.5 if scale is None else scale)) * key_scale.mT
        scores = scores if bias is None else scores + bias[:, :, None]
        out[:, :, part] = second(scores)
    return out


def int8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of ``[..., tokens, head]`` as float32 integers, and the scale of every token ``[..., tokens, 1]``."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    return (x * (LARGEST["int8"] / largest)).round(), largest / LARGEST["int8"]


class Floats:
    """``softmax(scores) v`` in float32."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.float()

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1) @ self.value


class Codes:
    """The same of e4m3 codes; the weights, 0 .. 1 before they are divided by their sum, are scaled to fill the format."""

    def __init__(self, value: Tensor) -> None:
        value = value.float()
        self.scale = value.abs().amax(2, keepdim=True).clamp_min(SMALLEST) / LARGEST["e4m3"]
        self.value = _e4m3(value / self.scale)

    def __call__(self, scores: Tensor) -> Tensor:
        weights = (scores - scores.amax(-1, keepdim=True)).exp() * LARGEST["e4m3"]
        return _e4m3(weights) @ self.value / weights.sum(-1, keepdim=True) * self.scale


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST["e4m3"], LARGEST["e4m3"]).to(torch.float8_e4m3fn).float()
