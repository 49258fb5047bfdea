"""Attention for long sequences: a block of queries at a time, scores in cache, both products in bfloat16.

Stock attention on CPUs multiplies bfloat16 no faster than float32; plain matrix products are twice as fast. Scaled queries and scores
are rounded to bfloat16 before the softmax, which sums in float32: the error is that of attention written out in bfloat16, about three
times that of stock attention. Looked at and left out: 8-bit scores (SageAttention, arXiv 2410.02367), no faster here and rounder; a
softmax of our own in numba, slower than torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 18  # scores at a time: half a second-level cache
LEAST = 1 << 18  # scores of a head from which it wins over stock attention
HEADS = (32, 256)  # widths of heads


def refuses(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why stock attention should compute this, or None."""
    if not query.dtype == key.dtype == value.dtype == torch.bfloat16:
        return "not bfloat16"
    if query.ndim != 4 or query.shape[:2] != key.shape[:2] or key.shape[:3] != value.shape[:3]:
        return "not [batch, heads, tokens, head], or heads share keys"
    if query.shape[2] * key.shape[2] < LEAST or not HEADS[0] <= query.shape[3] <= HEADS[1]:
        return "too short to gain"
    return None if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "the processor multiplies no bfloat16"


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """``softmax(query key^T * scale) value`` per head.

    Args:
        query: ``[batch, heads, queries, head]`` bfloat16.
        key, value: ``[batch, heads, keys, head]`` bfloat16.
        scale: unitless; ``head ** -0.5`` by default.

    Returns:
        ``[batch, heads, queries, head]`` in the memory order of ``[batch, queries, heads, head]``, which callers flatten next.
    """
    batch, heads, queries, head = query.shape
    rows = max(min(BLOCK // key.shape[2], queries), 16)
    scores, weights = query.new_empty(2, rows, key.shape[2])
    query = query * (head**-0.5 if scale is None else scale)
    out = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    for b in range(batch):
        for h in range(heads):
            _one_head(query[b, h].contiguous(), key[b, h].contiguous().t(), value[b, h].contiguous(), scores, weights, out[b, h])
    return out


def _one_head(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, weights: Tensor, out: Tensor) -> None:
    for start in range(0, len(query), len(scores)):
        block = query[start : start + len(scores)]
        part, share = scores[: len(block)], weights[: len(block)]
        torch.mm(block, key, out=part)
        torch.softmax(part, -1, out=share)
        out[start : start + len(block)] = share @ value
