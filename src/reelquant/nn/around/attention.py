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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reelquant.clock import NAME, Clock
from reelquant.kernels import attention as fast
from reelquant.kernels.attention import AttentionQuant, RoundedKernel
from reelquant.nn.around.attention_facts import STOCK, AttentionFacts, expected_attention
from reelquant.nn.around.attention_plan import AttentionPlan
from reelquant.nn.around.graph import by_handle, handle_of, is_tracing
from reelquant.nn.swap import get_module

logger = logging.getLogger(__name__)
HOOKS = "_reelquant_attention_hooks"
ROUNDED = "_reelquant_rounded_attention"
ASKED = "_reelquant_asked_attention"
SITE = "_reelquant_attention_row"  # of a module that asks for attention, while it matters which one does
SITE_HOOKS = "_reelquant_attention_site_hooks"
PROTECTED = f"{STOCK}: protected step"
UNROUNDED = f"{STOCK}: left in float here"
WANTED = (PROTECTED, UNROUNDED)  # reasons for stock attention that a recipe has
_thread = threading.local()


class RoundedAttention:
    """A denoiser's attention with few-bit operands: what is asked for, what computes it, and what has computed it so far.

    Attributes:
        plan: what is rounded where.
        kernels: ``auto``, or ``reference`` for the oracle.
        calls: calls by what computed them: the name of a kernel, or ``stock`` and the reason.
        rounded: calls whose operands were rounded, by their numbers.
        handle: by which graphs find this.
    """

    def __init__(self, plan: AttentionPlan, kernels: str = "auto") -> None:
        self.plan, self.kernels = plan, kernels
        self.outside = plan.row_of("")  # of calls that the denoiser makes itself, and of modules that nobody names
        self.calls: Counter[str] = Counter()
        self.rounded: Counter[str] = Counter()
        self.handle = handle_of(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> RoundedAttention:
        return RoundedAttention(self.plan, self.kernels)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, where: Where, mask: Tensor | None = None) -> Tensor:
        """Rounded, or stock attention where it is to stay float and where no kernel takes the call, which is then said."""
        numbers = self.plan.at(where.row, where.slot)
        kernel, reason = None, PROTECTED if where.protected else UNROUNDED
        if numbers is not None and not where.protected:
            kernel, reason = self._chosen(query, key, value, numbers)
        if kernel is None or numbers is None:
            self.fall_back(reason or "")
            return fast.STOCK(query, key, value, mask, scale=scale)
        self.calls[kernel.name] += 1
        self.rounded[str(numbers)] += 1
        return kernel.attention(query, key, value, scale, numbers, mask)

    def _chosen(self, query: Tensor, key: Tensor, value: Tensor, numbers: AttentionQuant) -> tuple[RoundedKernel | None, str | None]:
        kernel, reason = fast.select(numbers, query.device.type, self.kernels)
        if kernel is not None:
            reason = "gradients are wanted" if fast.trains(query, key, value) else kernel.refuses(query, key, value, numbers)
        return (kernel, None) if reason is None else (None, f"{STOCK}: {reason}")

    def fall_back(self, reason: str) -> None:
        """Count a call of stock attention; say the reason once, unless the recipe wants it so."""
        if reason not in WANTED and reason not in self.calls:
            logger.warning("attention with %s was asked for, and calls are computed without: %s", self.plan, reason)
        self.calls[reason] += 1


@dataclass(frozen=True)
class Where:
    """Where a call of attention stands.

    Attributes:
        row: of the plan, by the module that asks.
        slot: index of the denoising step.
        protected: whether the step is protected.
    """

    row: int = 0
    slot: int = 0
    protected: bool = False


@dataclass
class Running:
    """A denoiser that is being called."""

    model: int  # its identity
    rounded: RoundedAttention | None
    clock: Clock | None
    row: int = 0  # of the plan, by the module that is running

    @property
    def where(self) -> Where:
        """Where a call of attention stands now."""
        now = None if self.clock is None else self.clock.now()
        return Where(self.row) if now is None else Where(self.row, int(now.slot), now.protected)


_inside: tuple[int, list[Tensor]] | None = None
"""The same for compiled graphs, which cannot look at threads: handle of the rounded attention (-1: none); step, and if it is protected."""
_row = 0
"""For compiled graphs, too: row of the plan, by the module that is running."""


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


@contextmanager
def stock_attention(model: nn.Module) -> Iterator[None]:
    """Inside, nothing of ours computes a denoiser's attention; afterwards everything is as before."""
    hooks, rounded = vars(model).get(HOOKS), vars(model).pop(ROUNDED, None)
    stop_attention(model)
    try:
        yield
    finally:
        if rounded is not None:
            object.__setattr__(model, ROUNDED, rounded)
        if hooks is not None:
            start_attention(model)


def round_attention(model: nn.Module, asked: AttentionPlan | AttentionQuant | None, kernels: str = "auto") -> None:
    """Let a denoiser's attention be rounded from its next call on, or not any more (None)."""
    vars(model).pop(ROUNDED, None)
    _unmark(model)
    if asked is not None:
        plan = AttentionPlan.everywhere(asked) if isinstance(asked, AttentionQuant) else asked
        install_attention(model, RoundedAttention(plan, kernels))


def install_attention(model: nn.Module, rounded: RoundedAttention) -> None:
    """Let an object of one's own compute a denoiser's attention, in the place of what :func:`round_attention` would make."""
    _unmark(model)
    _mark(model, rounded.plan)
    object.__setattr__(model, ROUNDED, rounded)
    start_attention(model)


def ask_attention(model: nn.Module, plan: AttentionPlan | None) -> None:
    """Remember what checkpoints of a model are to say of its attention, whatever it rounds now."""
    vars(model).pop(ASKED, None)
    if plan is not None:
        object.__setattr__(model, ASKED, plan)


def asked_attention(model: nn.Module) -> AttentionPlan | None:
    """What :func:`ask_attention` was told."""
    return vars(model).get(ASKED)


def _mark(model: nn.Module, plan: AttentionPlan) -> None:
    """Let calls of attention tell which module they come from, where that matters.

    All modules of the classes that a plan names are marked: compiled code of one block serves the next one unless it has looked at
    something in which they differ, and hooks are not looked at.
    """
    if plan.uniform:
        return
    kinds = tuple({type(get_module(model, name)) for name in plan.sites if name})
    rows = {name: plan.row_of(name) for name, module in model.named_modules() if not name or isinstance(module, kinds)}
    handles: list[RemovableHandle] = []
    for name, row in rows.items():
        if name:
            module, outer = get_module(model, name), max((one for one in rows if _holds(one, name)), key=len)
            object.__setattr__(module, SITE, (row, rows[outer]))
            handles += [module.register_forward_pre_hook(_enter_site), module.register_forward_hook(_leave_site)]
    object.__setattr__(model, SITE_HOOKS, handles)


def _holds(outer: str, name: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _unmark(model: nn.Module) -> None:
    for handle in vars(model).pop(SITE_HOOKS, ()):
        handle.remove()
    for module in model.modules():
        vars(module).pop(SITE, None)


def _enter_site(module: nn.Module, args: Any) -> None:
    _go(getattr(module, SITE)[0])


def _leave_site(module: nn.Module, args: Any, output: Any) -> None:
    _go(getattr(module, SITE)[1])


def _go(row: int) -> None:
    global _row
    if torch.compiler.is_compiling():
        _row = row
    elif stack := _stack():
        stack[-1].row = row


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
    global _inside, _row
    rounded, clock = getattr(module, ROUNDED, None), getattr(module, NAME, None)
    watched = rounded is not None and clock is not None and (clock.protected_slots or rounded.plan.follows_steps)
    _inside = -1 if rounded is None else rounded.handle, [clock.slot, clock.protected] if watched and clock is not None else []
    _row = 0 if rounded is None else rounded.outside
    if not torch.compiler.is_compiling():
        _end(module)  # what an interrupt left behind
        _stack().append(Running(id(module), rounded, clock, _row))


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
                handle, step = _inside
                if handle < 0 and attn_mask is None:
                    return torch.ops.reelquant.attention(query, key, value, scale)
                if handle >= 0 and not masked:
                    return torch.ops.reelquant.rounded_attention(query, key, value, scale, step, handle, _row, attn_mask)
        elif running() and not is_tracing():
            inner = _stack()[-1]
            if inner.rounded is not None and (masked or more is not None):
                inner.rounded.fall_back(f"{STOCK}: {more or 'a mask over pairs of tokens'}")
            elif inner.rounded is not None:
                return inner.rounded.attend(query, key, value, scale, inner.where, attn_mask)
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


def attention_facts(model: nn.Module, device: str | None = None) -> AttentionFacts | None:
    """What computes a model's attention on the device it lies on, or on another type of device; None if nothing is to be rounded."""
    rounded = rounded_attention(model)
    if rounded is None:
        return None
    lies = next((p.device.type for p in model.parameters() if p.device.type != "meta"), "cpu")  # meta: offloaded
    return expected_attention(rounded.plan, device or lies, rounded.kernels, rounded.calls, rounded.rounded)


@torch.library.custom_op("reelquant::rounded_attention", mutates_args=())
def _run(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, step: Sequence[Tensor], handle: int, row: int, mask: Tensor | None
) -> Tensor:
    """:meth:`RoundedAttention.attend` as a node of a compiled graph; the step is read when it runs."""
    rounded: RoundedAttention = by_handle(handle)
    where = Where(row, int(step[0]), bool(step[1])) if step else Where(row)
    return fast.declared(query, value).copy_(rounded.attend(query, key, value, scale, where, mask))


@_run.register_fake
def _shape(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, step: Sequence[Tensor], handle: int, row: int, mask: Tensor | None
) -> Tensor:
    return fast.declared(query, value)
