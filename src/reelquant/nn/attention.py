"""Faster attention inside quantized denoisers, whatever their attention code looks like.

diffusers reaches attention in dozens of processors, and all of them end in ``F.scaled_dot_product_attention``. That function is wrapped,
once, when the first denoiser asks for it; the wrapper acts only while such a denoiser runs in the same thread, and hands everything else
on untouched.

torch runs the hook that ends a call after errors too, but not after an interrupt: a denoiser that was interrupted counts as running until
somebody calls it again in that thread. Attention elsewhere is then the fast one as well, right to the accuracy of bfloat16.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant.kernels import attention as fast
from reelquant.nn.graph import outlined

HOOKS = "_reelquant_attention_hooks"
_thread = threading.local()
_inside = False  # the same for compiled graphs, which cannot look at threads


def start_attention(model: nn.Module) -> None:
    """Let a denoiser's attention be computed by :mod:`reelquant.kernels` where that is faster; once or more often."""
    _wrap()
    if HOOKS not in vars(model):
        handles = model.register_forward_pre_hook(_enter), model.register_forward_hook(_leave, always_call=True)
        object.__setattr__(model, HOOKS, handles)


def stop_attention(model: nn.Module) -> None:
    """Undo :func:`start_attention`."""
    for handle in vars(model).pop(HOOKS, ()):
        handle.remove()
    _end(model)


def running() -> bool:
    """Whether a started denoiser is being called in this thread."""
    return bool(_stack())


def _stack() -> list[int]:
    """The denoisers that are being called in this thread, by identity, outermost first."""
    if not hasattr(_thread, "stack"):
        _thread.stack = []
    return _thread.stack


def _end(module: nn.Module) -> None:
    """Take a denoiser, and those called inside of it, from the stack; nothing happens if it is not there."""
    stack = _stack()
    if id(module) in stack:
        del stack[stack.index(id(module)) :]


def _enter(module: nn.Module, args: Any) -> None:
    global _inside
    _inside = True
    if not torch.compiler.is_compiling():
        _end(module)  # what an interrupt left behind
        _stack().append(id(module))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    global _inside
    _inside = False
    if not torch.compiler.is_compiling():
        _end(module)


def _wrap() -> None:
    stock = F.scaled_dot_product_attention
    if getattr(stock, "reelquant", False):
        return

    @functools.wraps(stock)
    def scaled_dot_product_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        if attn_mask is None and not dropout_p and not is_causal and not options.get("enable_gqa"):
            if torch.compiler.is_compiling():
                if _inside and query.ndim == 4 and key.shape[:2] == query.shape[:2]:
                    return torch.ops.reelquant.attention(query, key, value, options.get("scale"))
            elif running() and not outlined() and fast.refuses(query, key, value) is None:
                return fast.attention(query, key, value, options.get("scale"))
        return stock(query, key, value, attn_mask, dropout_p, is_causal, **options)

    scaled_dot_product_attention.reelquant = True  # type: ignore[attr-defined]
    F.scaled_dot_product_attention = scaled_dot_product_attention
