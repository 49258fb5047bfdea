"""Attention in float64, and how far attention with rounded operands may be from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(batch: int, heads: int, queries: int, tokens: int, width: int, key_heads: int = 0, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Random queries, keys and values; the keys have an offset per channel, as real ones do."""
    shape = (batch, key_heads or heads, tokens, width)
    q, k, v = torch.randn(batch, heads, queries, width), torch.randn(shape) + 5 * torch.randn(width), torch.randn(shape)
    return tuple(x.to(DEVICE, dtype) for x in (q, k, v))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and probabilities in float64."""
    weights = (q @ k.transpose(2, 3) * scale).softmax(-1)
    return weights @ v, weights


def prepared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float64, keys centered, as many key heads as query heads."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // max(x.shape[1], 1), 1) for x in (k, v))
    return q, k - k.mean(2, keepdim=True), v


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the codes, and the scale of each token."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (x / scale).round() * scale, scale


def bound(q: Tensor, k: Tensor, v: Tensor, scale: float, float8: bool) -> Tensor:
    """Largest error of the output that rounding can cause.

    A score errs by at most ``e = scale * sum_d (s_q |k_d| / 2 + s_k |q_d| / 2 + s_q s_k / 4)``, a probability by a factor of at most
    exp(2 e). Probabilities are rounded to 8 bits (bfloat16) or to 4 (e4m3), values to 4 in the latter case, the output to 8.
    """
    _, s_q = rounded(q)
    _, s_k = rounded(k)
    s_k = s_k.transpose(2, 3)
    scores = scale * (s_q / 2 * k.abs().sum(-1)[:, :, None, :] + s_k / 2 * q.abs().sum(-1)[..., None] + s_q * s_k * q.shape[-1] / 4)
    exact, weights = attend(q, k, v, scale)
    worst = ((2 * scores.amax(-1, keepdim=True)).exp() - 1) * (weights @ v.abs())
    relative = 2**-3 if float8 else 2**-8
    floor = v.abs().amax(2, keepdim=True) * (2**-9 + 2**-9) if float8 else 0.0  # subnormal codes of P (448 * 2^-9) and of V
    return worst + relative * (weights @ v.abs()) + floor + exact.abs() * 2**-8 + 1e-6
