"""Attention as plain matrix products in bfloat16: long sequences a block of queries at a time, many short ones all at once.

Stock attention on CPUs multiplies bfloat16 no faster than float32; plain matrix products are twice as fast. Scores are rounded to bfloat16
before the softmax, which sums in float32: the error is that of attention written out in bfloat16, about twice that of stock attention.
Looked at and left out: 8-bit scores (SageAttention, arXiv 2410.02367), no faster here and rounder; keys and values packed once for all
blocks of queries, slower; views of heads instead of copies, slower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant.kernels.cpu.softmax import softmax_

BLOCK = 1 << 19  # scores at a time: a second-level cache
ROWS = 64  # queries in a block are a multiple of it, which suits the products
LONG = 1 << 18  # scores of a head from which blocks win over stock attention
SHORT = 128  # keys up to which products of all heads at once win over it, if there are
MANY = 32  # heads, over all clips, places and frames
HEADS = (16, 256)  # widths of heads
WIDE = 32  # keys from which a softmax of our own wins over torch's
SCORES_AT_ONCE = 1 << 22  # scores of all heads at once; more are made in several pieces


def refuses(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why stock attention should compute this, or None."""
    if not query.dtype == key.dtype == value.dtype == torch.bfloat16:
        return "not bfloat16"
    if query.ndim != 4 or query.shape[:2] != key.shape[:2] or key.shape[:3] != value.shape[:3]:
        return "not [batch, heads, tokens, head], or heads share keys"
    if not HEADS[0] <= query.shape[3] <= HEADS[1]:
        return f"heads of {query.shape[3]} channels"
    if not _long(query, key) and not (0 < key.shape[2] <= SHORT and query.shape[0] * query.shape[1] >= MANY and query.shape[2]):
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
    if not _long(query, key):
        return _all_heads(query, key, value, query.shape[3] ** -0.5 if scale is None else scale)
    batch, heads, queries, head = query.shape
    rows = min(max(BLOCK // key.shape[2] // ROWS, 1) * ROWS, queries)
    scores = query.new_empty(rows, key.shape[2])
    scale = head**-0.5 if scale is None else scale
    out = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    for b in range(batch):
        for h in range(heads):
            _one_head(query[b, h].contiguous(), key[b, h].contiguous().t(), value[b, h].contiguous(), scores, scale, out[b, h])
    return out


def _long(query: Tensor, key: Tensor) -> bool:
    return query.shape[2] * key.shape[2] >= LONG


def _all_heads(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, queries, heads, value.shape[3])
    step = max(SCORES_AT_ONCE // (heads * queries * key.shape[2]), 1)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        q, k, v = (x[part].reshape(-1, x.shape[2], x.shape[3]) for x in (query, key, value))
        scores = torch.baddbmm(q.new_empty(1, 1, 1).expand(len(q), queries, key.shape[2]), q, k.mT, beta=0, alpha=scale)
        weights = softmax_(scores.flatten(0, 1), 1.0).view_as(scores) if key.shape[2] >= WIDE else torch.softmax(scores, -1)
        out[part] = torch.bmm(weights, v).view(-1, heads, queries, value.shape[3]).transpose(1, 2)
    return out.transpose(1, 2)


def _one_head(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, scale: float, out: Tensor) -> None:
    for start in range(0, len(query), len(scores)):
        block = query[start : start + len(scores)]
        part = scores[: len(block)]
        torch.mm(block, key, out=part)
        out[start : start + len(block)] = softmax_(part, scale) @ value
