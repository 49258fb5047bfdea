"""Self-attention over more or fewer tokens than a model was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

from torch import Tensor, nn

from reelquant.nn.around.attention import around_attention, put_around_attention, remove_around_attention
from reelquant.nn.around.attention_around import AroundAttention, AttentionCall
from reelquant.nn.around.attention_running import Where


class _CountedTokens(AroundAttention):
    """Notes how many keys the first call of every site has."""

    order: ClassVar[int] = 0

    def __init__(self, sites: Iterable[str]) -> None:
        super().__init__(sites)
        self.counted: dict[str, int] = {}

    def attend(self, call: AttentionCall, where: Where) -> Tensor:
        if (site := self.names[where.row]) in self.sites:
            self.counted.setdefault(site, call.key.shape[2])
        return self.compute(call, where)


class ScaledLogits(AroundAttention):
    """Multiplies the scores of queries and keys by ``sqrt(log n / log n0)`` where ``n`` tokens take the place of ``n0``.

    Paper: "Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis" (arXiv 2306.08645): the entropy of
    attention's weights grows with the number of tokens, and this keeps it where it was. Where the number is the usual one, nothing changes,
    bit for bit.

    Attributes:
        tokens: ``n0`` by site.
    """

    order: ClassVar[int] = 0

    def __init__(self, tokens: Mapping[str, int]) -> None:
        super().__init__(tokens)
        self.tokens = dict(tokens)

    def attend(self, call: AttentionCall, where: Where) -> Tensor:
        usual, now = self.tokens.get(self.names[where.row], 0), call.key.shape[2]
        if now != usual and min(now, usual) > 1:
            scale = call.query.shape[3] ** -0.5 if call.scale is None else call.scale
            call = call._replace(scale=scale * math.sqrt(math.log(now) / math.log(usual)))
        return self.compute(call, where)


def count_tokens(model: nn.Module, sites: Iterable[str], run: Callable[[], object]) -> dict[str, int]:
    """How many keys the sites of a denoiser attend to while ``run`` calls it."""
    counting = _CountedTokens(sites)
    put_around_attention(model, counting)
    try:
        run()
    finally:
        remove_around_attention(model, counting)
    return counting.counted


def scale_logits(model: nn.Module, tokens: Mapping[str, int] | None) -> None:
    """Let a denoiser's self-attention follow the number of tokens from its next call on, or not any more (None, or no site)."""
    for one in around_attention(model):
        if isinstance(one, ScaledLogits):
            remove_around_attention(model, one)
    if tokens:
        put_around_attention(model, ScaledLogits(tokens))


def scaled_logits(model: nn.Module) -> dict[str, int]:
    """What :func:`scale_logits` was told; empty if nothing."""
    return next((dict(one.tokens) for one in around_attention(model) if isinstance(one, ScaledLogits)), {})
