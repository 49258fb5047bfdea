"""Attention by device: tables like that of layers, with stock attention as what is left.

There are two. :data:`ATTENTION` is as exact as the dtype of the model and is used wherever it is faster. :data:`ROUNDED` rounds its
operands to few bits: results change, so it computes only what a recipe or the user asks for (:class:`AttentionQuant`), and
:func:`select` says what does so on a device, or why nothing does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant.kernels import attention_reference, current_backend
from reelquant.kernels.attention_quant import FLOAT, Asked, AttentionQuant, AttentionRule, over_keys, parse_asked, parse_attention

STOCK = F.scaled_dot_product_attention


@functools.cache
def _cpu() -> Any:
    from reelquant.kernels.cpu import attention

    return attention


ATTENTION = {"cpu": _cpu}
"""Device type -> a module with ``refuses`` and ``attention``; a function, so that a machine imports only what it can run."""


@dataclass(frozen=True)
class RoundedKernel:
    """A way to compute attention with rounded operands.

    Attributes:
        name: what reports print.
        missing: why it computes nothing on this machine, or None.
        refuses: why it does not compute a call of query, key and value, or None.
        attention: computes ``softmax(query key^T * scale) value``; a scale of None is ``head ** -0.5``. The last argument is None, or a
            mask for which :func:`over_keys` holds.
        low_bit: whether products of codes are products of codes; if not, they are only simulated.
        takes: whether it was written for these numbers; the reference computes those that no kernel was written for.
    """

    name: str
    missing: Callable[[AttentionQuant], str | None]
    refuses: Callable[[Tensor, Tensor, Tensor, AttentionQuant], str | None]
    attention: Callable[[Tensor, Tensor, Tensor, float | None, AttentionQuant, Tensor | None], Tensor]
    low_bit: bool = True
    takes: Callable[[AttentionQuant], bool] = lambda numbers: True


REFERENCE = RoundedKernel("reference", lambda numbers: None, attention_reference.refuses, attention_reference.attention, low_bit=False)


@functools.cache
def _triton() -> RoundedKernel:
    from reelquant.kernels.cuda import scores

    return RoundedKernel("triton int8 attention", scores.missing, scores.refuses, scores.attention, takes=scores.takes)


ROUNDED: dict[str, Callable[[], RoundedKernel]] = {"cpu": lambda: REFERENCE, "cuda": _triton}
"""Device type -> what computes attention with rounded operands there. On CPUs the reference simulates it, so that a recipe can be judged
without a GPU. On other devices the reference stands in for numbers that no kernel was written for, and for nothing else: devices that are
there to be fast compute in float what their kernel cannot."""


def select(numbers: AttentionQuant, device: str, wanted: str = "auto") -> tuple[RoundedKernel | None, str | None]:
    """What computes such attention on this type of device, or None and the reason; the reference if the model (``wanted``) or
    :func:`current_backend` asks for it."""
    if wanted != "auto" or current_backend() != "auto":
        return REFERENCE, None
    if device not in ROUNDED:
        return None, f"there is no kernel for {device}"
    kernel = ROUNDED[device]()
    if not kernel.takes(numbers):
        return REFERENCE, None
    reason = kernel.missing(numbers)
    return (kernel, None) if reason is None else (None, reason)


def trains(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a gradient is going to pass through."""
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)


def refuses(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why stock attention should compute this, or None."""
    if current_backend() != "auto":
        return "the reference was asked for"
    if trains(query, key, value):
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
    return declared(query, value).copy_(STOCK(query, key, value, scale=scale))


@_run.register_fake
def _shape(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    return declared(query, value)


def declared(query: Tensor, value: Tensor) -> Tensor:
    """An output in the memory order that graphs are told: that of ``[batch, queries, heads, head]``, which callers flatten next."""
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)


__all__ = [
    "ATTENTION",
    "FLOAT",
    "REFERENCE",
    "ROUNDED",
    "STOCK",
    "Asked",
    "AttentionQuant",
    "AttentionRule",
    "RoundedKernel",
    "attention",
    "over_keys",
    "parse_asked",
    "parse_attention",
    "refuses",
    "select",
    "trains",
]
