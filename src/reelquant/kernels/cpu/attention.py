"""Attention on CPUs: what the processor is good at, bfloat16 or integers, where it beats torch's."""

from __future__ import annotations

from torch import Tensor

from reelquant.kernels.cpu import attention_bfloat16, attention_fixed

WAYS = (attention_bfloat16, attention_fixed)
"""Best first; each has ``refuses`` and ``attention``."""


def refuses(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why stock attention should compute this, or None."""
    reasons = [way.refuses(query, key, value) for way in WAYS]
    return None if None in reasons else reasons[-1]


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """``softmax(query key^T * scale) value`` per head, by the first way that takes it."""
    way = next(way for way in WAYS if way.refuses(query, key, value) is None)
    return way.attention(query, key, value, scale)
