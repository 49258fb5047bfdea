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
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant.clock import NAME
from reelquant.kernels import attention as fast
from reelquant.kernels.attention import AttentionQuant, RoundedKernel
from reelquant.nn.around.attention_around import PAIRS, AroundAttention, AttentionCall
from reelquant.nn.around.attention_facts import STOCK, AttentionFacts, expected_attention
from reelquant.nn.around.attention_plan import AttentionPlan
from reelquant.nn.around.attention_running import Running, Where, end, enter_model, mark, row_in_graph, running, stack, unmark
from reelquant.nn.around.graph import by_handle, handle_of, is_tracing

logger = logging.getLogger(__name__)
HOOKS = "_reelquant_attention_hooks"
ROUNDED = "_reelquant_rounded_attention"
ASKED = "_reelquant_asked_attention"
STARTED = "_reelquant_started_attention"
AROUND = "_reelquant_around_attention"
PROTECTED = f"{STOCK}: protected step"
UNROUNDED = f"{STOCK}: left in float here"
WANTED = (PROTECTED, UNROUNDED)  # reasons for stock attention that a recipe has
_inside: tuple[int, int, list[Tensor]] | None = None
"""For compiled graphs, which cannot look at threads: handles of what is around attention and of what rounds it (-1: none); step, and if it
is protected."""


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
        self.outside = plan.row_of("")  # of calls that the denoiser makes itself, and of modules without a name in the plan
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


def start_attention(model: nn.Module) -> None:
    """Let a denoiser's attention be computed by :mod:`reelquant.kernels`; once or more often."""
    object.__setattr__(model, STARTED, True)
    _settle(model)


def stop_attention(model: nn.Module) -> None:
    """Undo :func:`start_attention`; what :func:`round_attention` asked for holds again after the next start."""
    vars(model).pop(STARTED, None)
    _settle(model)
    end(model)


def put_around_attention(model: nn.Module, around: AroundAttention) -> None:
    """Let an object decide what becomes of a denoiser's attention, whatever computes it then; another one of its order goes."""
    others = [one for one in around_attention(model) if one.order != around.order]
    object.__setattr__(model, AROUND, tuple(sorted([*others, around], key=lambda one: one.order)))
    _settle(model)


def remove_around_attention(model: nn.Module, around: AroundAttention) -> None:
    """Undo :func:`put_around_attention`; nothing happens if it is not there."""
    if around in around_attention(model):
        rest = tuple(one for one in vars(model).pop(AROUND) if one is not around)
        if rest:
            object.__setattr__(model, AROUND, rest)
        _settle(model)


def around_attention(model: nn.Module) -> tuple[AroundAttention, ...]:
    """What :func:`put_around_attention` put there, the outermost first."""
    return getattr(model, AROUND, ())


def _settle(model: nn.Module) -> None:
    """Hang hooks on a denoiser, and on the modules that ask for attention, where something wants them, and nowhere else."""
    around, rounded, started = around_attention(model), vars(model).get(ROUNDED), bool(vars(model).get(STARTED))
    hooks = vars(model).get(HOOKS)
    if hooks is None and (started or around):
        _wrap()
        handles = model.register_forward_pre_hook(_enter), model.register_forward_hook(_leave, always_call=True)
        object.__setattr__(model, HOOKS, handles)
    elif hooks is not None and not started and not around:
        for handle in vars(model).pop(HOOKS):
            handle.remove()
    unmark(model)
    plans = [] if rounded is None or rounded.plan.uniform else [rounded.plan.sites]
    if around:
        named = dict.fromkeys(name for sites in (*plans, *(one.sites for one in around)) for name in sites if name)
        rows = {name: row for row, name in enumerate(("", *named))}
        for one, inner in itertools.zip_longest(around, around[1:]):
            one.names, one.inner, one.rounded, one.faster = tuple(rows), inner, rounded, started
        mark(model, named, lambda name: rows.get(name, 0))
    elif rounded is not None and plans:
        mark(model, rounded.plan.sites, rounded.plan.row_of)


@contextmanager
def stock_attention(model: nn.Module) -> Iterator[None]:
    """Inside, nothing of ours computes a denoiser's attention; afterwards everything is as before."""
    started, rounded = vars(model).get(STARTED), vars(model).pop(ROUNDED, None)
    stop_attention(model)
    try:
        yield
    finally:
        if rounded is not None:
            object.__setattr__(model, ROUNDED, rounded)
        if started:
            start_attention(model)


def round_attention(model: nn.Module, asked: AttentionPlan | AttentionQuant | None, kernels: str = "auto") -> None:
    """Let a denoiser's attention be rounded from its next call on, or not any more (None)."""
    vars(model).pop(ROUNDED, None)
    if asked is None:
        _settle(model)
    else:
        plan = AttentionPlan.everywhere(asked) if isinstance(asked, AttentionQuant) else asked
        install_attention(model, RoundedAttention(plan, kernels))


def install_attention(model: nn.Module, rounded: RoundedAttention) -> None:
    """Let an object of one's own compute a denoiser's attention, in the place of what :func:`round_attention` would make."""
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


def rounded_attention(model: nn.Module) -> RoundedAttention | None:
    """What :func:`round_attention` asked for."""
    return vars(model).get(ROUNDED)


def _enter(module: nn.Module, args: Any) -> None:
    global _inside
    outermost, rounded, clock = getattr(module, AROUND, (None,))[0], getattr(module, ROUNDED, None), getattr(module, NAME, None)
    watched = rounded is not None and clock is not None and (clock.protected_slots or rounded.plan.follows_steps)
    step = [clock.slot, clock.protected] if watched and clock is not None else []
    _inside = -1 if outermost is None else outermost.handle, -1 if rounded is None else rounded.handle, step
    row = 0 if outermost is not None or rounded is None else rounded.outside
    enter_model(row)
    if not torch.compiler.is_compiling():
        end(module)  # what an interrupt left behind
        stack().append(Running(id(module), outermost or rounded, clock, row))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    global _inside
    _inside = None
    if not torch.compiler.is_compiling():
        end(module)


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
        usual = more is None and query.ndim == 4 and key.shape[:2] == query.shape[:2]
        if torch.compiler.is_compiling():
            if _inside is not None and usual:
                around, handle, step = _inside
                if around >= 0 and _fits(attn_mask, query, key):
                    return torch.ops.reelquant.around_attention(query, key, value, scale, step, around, row_in_graph(), attn_mask)
                if around < 0 and handle < 0 and attn_mask is None:
                    return torch.ops.reelquant.attention(query, key, value, scale)
                if around < 0 <= handle and not masked:
                    return torch.ops.reelquant.rounded_attention(query, key, value, scale, step, handle, row_in_graph(), attn_mask)
        elif running() and not is_tracing():
            inner = stack()[-1]
            acting, where, faster = inner.acting, inner.where, True
            if isinstance(acting, AroundAttention):
                if usual and _fits(attn_mask, query, key):
                    return acting.attend(AttentionCall(query, key, value, scale, attn_mask), where)
                acting, where, faster = acting.rounded, acting.within(where), acting.faster
            if acting is not None and (masked or more is not None):
                acting.fall_back(f"{STOCK}: {more}" if more else PAIRS)
            elif acting is not None:
                return acting.attend(query, key, value, scale, where, attn_mask)
            elif faster and attn_mask is None and more is None and fast.refuses(query, key, value) is None:
                return fast.attention(query, key, value, scale)
        return stock(query, key, value, attn_mask, dropout_p, is_causal, **options)

    scaled_dot_product_attention.reelquant = True  # type: ignore[attr-defined]
    F.scaled_dot_product_attention = scaled_dot_product_attention


def _fits(mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    """Whether a mask has the four axes of :class:`AttentionCall`."""
    if mask is None:
        return True
    whole = *query.shape[:3], key.shape[2]
    return mask.ndim == 4 and mask.shape[3] == whole[3] and all(size in (1, full) for size, full in zip(mask.shape, whole, strict=True))


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


@torch.library.custom_op("reelquant::around_attention", mutates_args=())
def _run_around(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, step: Sequence[Tensor], handle: int, row: int, mask: Tensor | None
) -> Tensor:
    """:meth:`AroundAttention.attend` in the same way."""
    around: AroundAttention = by_handle(handle)
    where = Where(row, int(step[0]), bool(step[1])) if step else Where(row)
    return fast.declared(query, value).copy_(around.attend(AttentionCall(query, key, value, scale, mask), where))


_run_around.register_fake(_shape)
