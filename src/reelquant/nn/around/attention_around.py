"""The base class of what decides, call by call, whether a denoiser's attention is computed. Those that decide live in other folders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from reelquant.kernels import attention as fast
from reelquant.nn.around.attention_facts import STOCK
from reelquant.nn.around.attention_plan import AttentionPlan
from reelquant.nn.around.attention_running import Where
from reelquant.nn.around.graph import handle_of

PAIRS = f"{STOCK}: a mask over pairs of tokens"


class AttentionCall(NamedTuple):
    """A call of ``scaled_dot_product_attention``.

    Attributes:
        query: ``[batch, heads, queries, head]``.
        key, value: ``[batch, heads, keys, head]`` each.
        scale: of the products of queries and keys; None is ``head ** -0.5``.
        mask: None, or ``[1 or batch, 1 or heads, 1 or queries, keys]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None = None
    mask: Tensor | None = None

    @property
    def over_pairs(self) -> bool:
        """Whether the mask says different things to different queries."""
        return self.mask is not None and not fast.over_keys(self.mask, self.query, self.key)

    @property
    def multiplications(self) -> int:
        """Of both products."""
        batch, heads, queries, width = self.query.shape
        return batch * heads * queries * self.key.shape[2] * (width + self.value.shape[3])


class Rounding(Protocol):
    """What is asked of :class:`reelquant.nn.around.attention.RoundedAttention`."""

    plan: AttentionPlan

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, where: Where, mask: Tensor | None = None) -> Tensor:
        """Rounded attention, or stock attention where nothing is to be rounded."""
        ...

    def fall_back(self, reason: str) -> None:
        """Count a call of stock attention."""
        ...


class AroundAttention(ABC):
    """Takes every call of a denoiser's attention, and computes it or does not; causal calls and those with dropout it does not get.

    There may be several around a denoiser, one inside of the other.

    Attributes:
        order: those with a smaller one are outside of those with a larger one.
        sites: module paths of calls that are to be told apart.
        names: module paths by :attr:`Where.row`, of all sites that anything around this denoiser names; row 0 is elsewhere.
        inner: what is around attention inside of this, or None.
        rounded: what rounds this denoiser's attention, or None.
        faster: whether kernels of ours may compute it, which are right to the accuracy of bfloat16.
        handle: by which graphs find this.
    """

    order: ClassVar[int]

    def __init__(self, sites: Iterable[str]) -> None:
        self.sites = tuple(sites)
        self.names: tuple[str, ...] = ("",)
        self.inner: AroundAttention | None = None
        self.rounded: Rounding | None = None
        self.faster = False
        self.handle = handle_of(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.handle = handle_of(self)  # that of the original finds the original

    @abstractmethod
    def attend(self, call: AttentionCall, where: Where) -> Tensor:
        """The output of attention, computed by :meth:`compute` or not."""

    def within(self, where: Where) -> Where:
        """The same place with the row that :attr:`rounded` knows it by."""
        return where if self.rounded is None else replace(where, row=self.rounded.plan.row_of(self.names[where.row]))

    def compute(self, call: AttentionCall, where: Where) -> Tensor:
        """What the denoiser would have got without this object, bit for bit."""
        query, key, value, scale, mask = call
        if self.inner is not None:
            return self.inner.attend(call, where)
        if self.rounded is not None and call.over_pairs:
            self.rounded.fall_back(PAIRS)
        elif self.rounded is not None:
            return self.rounded.attend(query, key, value, scale, self.within(where), mask)
        elif self.faster and mask is None and fast.refuses(query, key, value) is None:
            return fast.attention(query, key, value, scale)
        return fast.STOCK(query, key, value, mask, scale=scale)
