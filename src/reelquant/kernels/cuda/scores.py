"""Which attention calls the Triton kernel takes. Imports no triton, so that the question can be asked anywhere."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from reelquant.kernels import cuda
from reelquant.kernels.attention_quant import AttentionQuant

FLOATS = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256


TAKES = frozenset({AttentionQuant(), AttentionQuant(values="e4m3")})


def takes(numbers: AttentionQuant) -> bool:
    """Whether the kernel was written for these numbers: int8 scores with smoothed keys, beside floats or e4m3."""
    return replace(numbers, smooth="auto" if numbers.smooth == "keys" else numbers.smooth) in TAKES


def missing(numbers: AttentionQuant) -> str | None:
    """Why no call can be computed on this machine, or None."""
    return cuda.available() or (cuda.float8() if numbers.values == "e4m3" else None)


def refuses(query: Tensor, key: Tensor, value: Tensor, numbers: AttentionQuant) -> str | None:
    """Why a call cannot be computed, or None."""
    if not query.dtype == key.dtype == value.dtype or query.dtype not in FLOATS:
        return f"{str(query.dtype).removeprefix('torch.')}, neither bfloat16 nor float16"
    if query.ndim != 4 or query.shape[:2] != key.shape[:2] or key.shape != value.shape:
        return "not [batch, heads, tokens, head], or heads share keys"
    return None if query.shape[3] <= WIDEST_HEAD else f"heads of {query.shape[3]} channels"


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, numbers: AttentionQuant, mask: Tensor | None = None
) -> Tensor:
    """:func:`reelquant.kernels.cuda.attention.attention_8bit`."""
    return cuda.attention_8bit(query, key, value, scale, mask, float8_values=numbers.values == "e4m3")
