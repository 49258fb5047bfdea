"""Which of several numbers suit attention best, place by place and step by step: by the error of its output in recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from reelquant.kernels import attention as fast
from reelquant.kernels.attention import REFERENCE, AttentionQuant
from reelquant.nn.around.attention import RoundedAttention, install_attention, round_attention, stop_attention
from reelquant.nn.around.attention_plan import AttentionPlan, Placed
from reelquant.nn.around.attention_running import Where

Errors = Mapping[str, Mapping[int, Sequence[float]]]
"""By site and slot: squared error of the output for each candidate, over the squares of the float output."""


class _Comparing(RoundedAttention):
    """Computes float attention, and notes what each of several numbers would have made of it."""

    def __init__(self, sites: Sequence[str], candidates: Sequence[AttentionQuant]) -> None:
        super().__init__(AttentionPlan(tuple(Placed(candidates[0], (site,)) for site in sites)))
        self.candidates, self.names = candidates, {self.plan.row_of(site): site for site in sites}
        self.errors: dict[str, dict[int, list[float]]] = {site: {} for site in sites}
        self.step = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, where: Where, mask: Tensor | None = None) -> Tensor:
        exact = fast.STOCK(query, key, value, mask, scale=scale)
        site = self.names.get(where.row)
        if site is not None and all(REFERENCE.refuses(query, key, value, one) is None for one in self.candidates):
            found = [REFERENCE.attention(query, key, value, scale, one, mask) for one in self.candidates]
            self._note(self.errors[site], exact.float(), found)
        return exact

    def _note(self, errors: dict[int, list[float]], exact: Tensor, found: Sequence[Tensor]) -> None:
        power = float(exact.square().sum()) or 1.0
        more = [float((one.float() - exact).square().sum()) / power for one in found]
        errors[self.step] = [a + b for a, b in zip(errors.get(self.step, [0.0] * len(more)), more, strict=True)]


@torch.no_grad()
def compare_attention(
    model: nn.Module, sites: Sequence[str], candidates: Sequence[AttentionQuant], calls: Iterable[tuple[int, Callable[[], object]]]
) -> Errors:
    """What each of these numbers does to the output of attention, with everything else in float.

    Args:
        model: a float denoiser; nothing of it is rounded afterwards.
        calls: slots, and functions that make a call of the denoiser there.
    """
    comparing = _Comparing(sites, candidates)
    install_attention(model, comparing)
    try:
        for slot, make in calls:
            comparing.step = slot
            make()
    finally:
        round_attention(model, None)
        stop_attention(model)
    return comparing.errors


def best(errors: Errors, slots: int) -> dict[str, list[int]]:
    """The candidate with the least error for every site and slot; slots without a call go with the nearest one that has some.

    Sites that no call was seen of get the first candidate.
    """
    return {site: [_least(known, slot) for slot in range(slots)] for site, known in errors.items()}


def _least(known: Mapping[int, Sequence[float]], slot: int) -> int:
    if not known:
        return 0
    values = known[min(known, key=lambda one: (abs(one - slot), one))]
    return values.index(min(values))
