"""Attention inside quantized denoisers, for every way in which a model writes it: faster, or rounded where a recipe asks for it.

diffusers reaches attention in dozens of processors, and all of them end in ``F.scaled_dot_product_attention``. That function is wrapped,
once, when the first denoiser asks for it; the wrapper acts only while such a denoiser runs in the same thread, and hands everything else
on untouched.

torch runs the hook that ends a call after errors too, but not after an interrupt: a denoiser that was interrupted counts as running until
somebody calls it again in that thread. Attention elsewhere is then the fast one as well, right to the accuracy of bfloat16; or, where the
denoiser has a :class:`RoundedAttention`, the rounded one.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant.clock import NAME, Clock
from reelquant.kernels import attention as fast
from reelquant.kernels.attention import AttentionQuant, RoundedKernel
from reelquant.nn.around.graph import by_handle, handle_of, is_tracing

logger = logging.getLogger(__name__)
HOOKS = "_reelquant_attention_hooks"
ROUNDED = "_reelquant_rounded_attention"
STOCK = "stock"  # how reports call attention that nothing of ours computes
PROTECTED = f"{STOCK}: protected step"
_thread = threading.local()


class RoundedAttention:
    """A denoiser's attention with few-bit operands: what is asked for, what computes it, and what has computed it so far.

    Attributes:
        numbers: what is rounded.
        kernels: ``auto``, or ``reference`` for the oracle.
        calls: calls by what computed them: the name of a kernel, or ``stock`` and the reason.
        handle: by which graphs find this.
    """

    def __init__(self, numbers: AttentionQuant, kernels: str = "auto") -> None:
        self.numbers, self.kernels = numbers, kernels
        self.calls: Counter[str] = Counter()
        self.handle = handle_of(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> RoundedAttention:
        return RoundedAttention(self.numbers, self.kernels)

    def selected(self, device: str) -> tuple[RoundedKernel | None, str | None]:
        """What computes attention on this type of device, or why nothing does."""
        return fast.select(self.numbers, device, self.kernels)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, protected: bool, mask: Tensor | None = None) -> Tensor:
        """Rounded, or stock attention at protected steps and where no kernel takes the call, which is then said."""
        kernel, reason = (None, PROTECTED) if protected else self._chosen(query, key, value)
        if kernel is not None:
            self.calls[kernel.name] += 1
            return kernel.attention(query, key, value, scale, self.numbers, mask)
        self.fall_back(reason or "")
        return fast.STOCK(query, key, value, mask, scale=scale)

    def _chosen(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[RoundedKernel | None, str | None]:
        kernel, reason = self.selected(query.device.type)
        if kernel is not None:
            reason = "gradients are wanted" if fast.trains(query, key, value) else kernel.refuses(query, key, value, self.numbers)
        return (kernel, None) if reason is None else (None, f"{STOCK}: {reason}")

    def fall_back(self, reason: str) -> None:
        """Count a call of stock attention; say the reason once, unless the recipe wants it so."""
        if reason != PROTECTED and reason not in self.calls:
            logger.warning("attention with %s was asked for, and calls are computed without: %s", self.numbers, reason)
        self.calls[reason] += 1


class Running(NamedTuple):
    """A denoiser that is being called."""

    model: int  # its identity
    rounded: RoundedAttention | None
    clock: Clock | None


_inside: tuple[int, list[Tensor]] | None = None
"""The same for compiled graphs, which cannot look at threads: handle of the rounded attention (-1: none), and whether it is protected."""


def start_attention(model: nn.Module) -> None:
    """Let a denoiser's attention be computed by :mod:`reelquant.kernels`; once or more often."""
    _wrap()
    if HOOKS not in vars(model):
        handles = model.register_forward_pre_hook(_enter), model.register_forward_hook(_leave, always_call=True)
        object.__setattr__(model, HOOKS, handles)


def stop_attention(model: nn.Module) -> None:
    """Undo :func:`start_attention`; what :func:`round_attention` asked for holds again after the next start."""
    for handle in vars(model).pop(HOOKS, ()):
        handle.remove()
    _end(model)


def round_attention(model: nn.Module, numbers: AttentionQuant | None, kernels: str = "auto") -> None:
    """Let a denoiser's attention be rounded from its next call on, or not any more (None)."""
    vars(model).pop(ROUNDED, None)
    if numbers is not None:
        object.__setattr__(model, ROUNDED, RoundedAttention(numbers, kernels))
        start_attention(model)


def rounded_attention(model: nn.Module) -> RoundedAttention | None:
    """What :func:`round_attention` asked for."""
    return vars(model).get(ROUNDED)


def running() -> bool:
    """Whether a started denoiser is being called in this thread."""
    return bool(_stack())


def _stack() -> list[Running]:
    """The denoisers that are being called in this thread, outermost first."""
    if not hasattr(_thread, "stack"):
        _thread.stack = []
    return _thread.stack


def _end(module: nn.Module) -> None:
    """Take a denoiser, and those called inside of it, from the stack; nothing happens if it is not there."""
    stack = _stack()
    places = [place for place, one in enumerate(stack) if one.model == id(module)]
    if places:
        del stack[places[0] :]


def _enter(module: nn.Module, args: Any) -> None:
    global _inside
    rounded, clock = getattr(module, ROUNDED, None), getattr(module, NAME, None)
    protected = [clock.protected] if rounded is not None and clock is not None and clock.protected_slots else []
    _inside = -1 if rounded is None else rounded.handle, protected
    if not torch.compiler.is_compiling():
        _end(module)  # what an interrupt left behind
        _stack().append(Running(id(module), rounded, clock))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    global _inside
    _inside = None
    if not torch.compiler.is_compiling():
        _end(module)


def _wrap() -> None:
    stock = F.scaled_dot_product_attention
    if getattr(stock, "reelquant", False):
        return

    @functools.wraps(stock)
    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        more, scale = _more(dropout_p, is_causal, options), options.get("scale")
        masked = attn_mask is not None and not fast.over_keys(attn_mask, query, key)
        if torch.compiler.is_compiling():
            if _inside is not None and more is None and query.ndim == 4 and key.shape[:2] == query.shape[:2]:
                handle, protected = _inside
                if handle < 0 and attn_mask is None:
                    return torch.ops.reelquant.attention(query, key, value, scale)
                if handle >= 0 and not masked:
                    return torch.ops.reelquant.rounded_attention(query, key, value, scale, protected, handle, attn_mask)
        elif running() and not is_tracing():
            inner = _stack()[-1]
            if inner.rounded is not None and (masked or more is not None):
                inner.rounded.fall_back(f"{STOCK}: {more or 'a mask over pairs of tokens'}")
            elif inner.rounded is not None:
                protected = inner.clock is not None and inner.clock.now().protected
                return inner.rounded.attend(query, key, value, scale, protected, attn_mask)
            elif attn_mask is None and more is None and fast.refuses(query, key, value) is None:
                return fast.attention(query, key, value, scale)
        return stock(query, key, value, attn_mask, dropout_p, is_causal, **options)

    scaled_dot_product_attention.reelquant = True  # type: ignore[attr-defined]
    F.scaled_dot_product_attention = scaled_dot_product_attention


def _more(dropout: float, causal: bool, options: Mapping[str, Any]) -> str | None:
    """What a call wants beside a product, a softmax and a product; None if nothing."""
    if dropout:
        return "dropout"
    if causal:
        return "causal"
    return "heads share keys" if options.get("enable_gqa") else None


# --- what reports say ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionFacts:
    """Attention of models of which rounded attention is asked for.

    Attributes:
        asked: in words: ``int8 scores, float values``.
        kernel: what computes it where the model lies; ``stock`` if nothing does.
        refused: why nothing does, or None.
        simulated: whether float arithmetic stands in for low-bit arithmetic.
        calls: calls so far, by what computed them. Those that graphs leave to the compiler (masks over pairs, dropout) are not seen.
    """

    asked: str
    kernel: str
    refused: str | None
    simulated: bool
    calls: dict[str, int]

    @property
    def by(self) -> str:
        """What computes it, and how honestly."""
        if self.refused is not None:
            return f"not used: {self.refused}; {self.kernel} attention in float instead"
        return f"{self.kernel}, simulated: codes are multiplied in float" if self.simulated else self.kernel

    @classmethod
    def of(cls, facts: Iterable[AttentionFacts | None]) -> AttentionFacts | None:
        """What holds for several models; None if none of them rounds."""
        known = [one for one in facts if one is not None]
        if not known:
            return None
        asked, kernel, refused = (
            ", ".join(dict.fromkeys(word for one in known if (word := getattr(one, name)))) for name in ("asked", "kernel", "refused")
        )
        calls = sum((Counter(one.calls) for one in known), Counter[str]())
        return cls(asked, kernel, refused or None, any(one.simulated for one in known), dict(calls))


def attention_facts(model: nn.Module, device: str | None = None) -> AttentionFacts | None:
    """What computes a model's attention on the device it lies on, or on another type of device; None if nothing is to be rounded."""
    rounded = rounded_attention(model)
    if rounded is None:
        return None
    lies = next((p.device.type for p in model.parameters() if p.device.type != "meta"), "cpu")  # meta: offloaded
    return expected_attention(rounded.numbers, device or lies, rounded.kernels, dict(rounded.calls))


def expected_attention(
    numbers: AttentionQuant, device: str, kernels: str = "auto", calls: Mapping[str, int] | None = None
) -> AttentionFacts:
    """What would compute such attention on a type of device."""
    kernel, reason = fast.select(numbers, device, kernels)
    name = STOCK if kernel is None else kernel.name
    return AttentionFacts(str(numbers), name, reason, kernel is not None and not kernel.low_bit, dict(calls or {}))


@torch.library.custom_op("reelquant::rounded_attention", mutates_args=())
def _run(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, protected: Sequence[Tensor], handle: int, mask: Tensor | None
) -> Tensor:
    """:meth:`RoundedAttention.attend` as a node of a compiled graph; the step is read when it runs."""
    rounded: RoundedAttention = by_handle(handle)
    now = bool(protected[0]) if protected else False
    return fast.declared(query, value).copy_(rounded.attend(query, key, value, scale, now, mask))


@_run.register_fake
def _shape(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, protected: Sequence[Tensor], handle: int, mask: Tensor | None
) -> Tensor:
    return fast.declared(query, value)
