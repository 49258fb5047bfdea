"""Attention by device: a table like that of layers, with stock attention as what is left."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant.kernels import current_backend

STOCK = F.scaled_dot_product_attention


@functools.cache
def _cpu() -> Any:
    from reelquant.kernels.cpu import attention

    return attention


ATTENTION = {"cpu": _cpu}
"""Device type -> a module with ``refuses`` and ``attention``; a function, so that a machine imports only what it can run."""


def refuses(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why stock attention should compute this, or None."""
    if current_backend() != "auto":
        return "the reference was asked for"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients are wanted"
    device = query.device.type
    return ATTENTION[device]().refuses(query, key, value) if device in ATTENTION else f"there is none for {device}"


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """``softmax(query key^T * scale) value`` for inputs that :func:`refuses` lets pass."""
    return ATTENTION[query.device.type]().attention(query, key, value, scale)


@torch.library.custom_op("reelquant::attention", mutates_args=())
def _run(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """The same as a node of a compiled graph; whether stock attention should compute it is found when it runs."""
    if refuses(query, key, value) is None:
        return attention(query, key, value, scale)
    out = _shape(query, key, value, scale)
    return out.copy_(STOCK(query, key, value, scale=scale))


@_run.register_fake
def _shape(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
