"""Attention whose two products have operands of few bits, everywhere or by rules of places and steps."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn

from reelquant._errors import RecipeError
from reelquant.kernels.attention import Asked, AttentionQuant, AttentionRule, parse_asked
from reelquant.nn import (
    AttentionFacts,
    AttentionPlan,
    ask_attention,
    asked_attention,
    attention_facts,
    best,
    compare_attention,
    expected_attention,
    placed,
    round_attention,
    stop_attention,
)
from reelquant.nn.around.attention_plan import Placed
from reelquant.observe import RecordedCall
from reelquant.sites import DenoiserMap
from reelquant.stages import ModelWork, Stage


@dataclass(frozen=True)
class RoundAttention(Stage):
    """Round queries, keys and, if wanted, weights and values in the forward. Nothing is calibrated; protected steps round none.

    Papers: SageAttention and SageAttention2 (scores, e4m3), DGQ (log2, first key); what is ours stands in
    :mod:`reelquant.kernels.attention_reference`. Places and steps have numbers of their own in TCAQ-DM and DGQ, too: there a statistic of
    the weights chooses them, here a recipe names them.

    Attributes:
        scores, values, smooth, first_key: numbers of all attention, see :class:`~reelquant.kernels.attention.AttentionQuant`.
        rules: instead of these, mappings of the same keys with ``on``, a pattern over the modules that ask for attention, and ``steps``,
            a part of the trajectory like ``[0.0, 0.2]``. The last rule that fits holds, and where none fits attention stays float. A list
            of ``values`` is a choice: each place and step gets those with the least error of attention's output, all else in float.
        calls: denoiser calls to record for such choices, evenly over calibration.
    """

    scores: str = "int8"
    values: str = "float"
    smooth: str = "auto"
    first_key: str = "rounded"
    rules: tuple[Mapping[str, Any], ...] = ()
    calls: int = 64
    samples: ClassVar[bool] = False
    key: ClassVar[str | None] = "attention"
    default_on: ClassVar[str] = "*"
    takes_on: ClassVar[bool] = False

    def __post_init__(self) -> None:
        plain = {field.name: field.default for field in fields(self)}
        if self.rules and (changed := [name for name in self._everywhere if getattr(self, name) != plain[name]]):
            raise RecipeError(f"attention has rules, and {changed[0]}: {getattr(self, changed[0])} beside them; write it into a rule")
        if self.calls < 1:
            raise RecipeError(f"calls of attention is at least 1, got {self.calls}")
        _ = self.asked

    @classmethod
    def parse_key(cls, value: Any) -> Mapping[str, Any] | None:
        asked = None if value is None else parse_asked(value)
        if isinstance(asked, tuple):
            return {"rules": list(value)} if asked else None
        return None if asked is None else asked.to_json()

    @property
    def _everywhere(self) -> dict[str, str]:
        return {"scores": self.scores, "values": self.values, "smooth": self.smooth, "first_key": self.first_key}

    @property
    def asked(self) -> Asked:
        """What kernels and places are asked for."""
        return parse_asked(self.rules or self._everywhere)

    @property
    def _chooses(self) -> bool:
        return isinstance(self.asked, tuple) and any(rule.others for rule in self.asked)

    @property
    def records(self) -> int:
        return self.calls if self._chooses else 0

    @property
    def in_memory(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "a choice of attention's numbers calls the denoiser as a whole; give one word for values" if self._chooses else None

    def own_calls(self, layers: int) -> int:
        del layers
        return 2 * self.records  # at most; fewer are recorded where calibration makes fewer

    def plan(self, map_: DenoiserMap, work: ModelWork | None = None) -> AttentionPlan | None:
        """The same for one denoiser; without ``work``, of one that nothing was sampled with."""
        if work is None:
            return placed(self.asked, map_.attention)
        return placed(self.asked, map_.attention, work.timesteps, work.sampled, functools.partial(_chosen, work))

    def outlook(self, device: str) -> str | None:
        asked = self.asked
        rules = asked if isinstance(asked, tuple) else (AttentionRule("", asked),)
        found = expected_attention(AttentionPlan(tuple(Placed(one) for rule in rules for one in rule.candidates or (None,))), device)
        return found.by if found.refused else f"by {found.by}"

    def loaded(self, name: str, model: nn.Module, map_: DenoiserMap) -> None:
        ask_attention(model, self.plan(map_))

    def before_choosing(self, work: ModelWork) -> None:
        plan = self.plan(work.map, work)
        round_attention(work.denoiser, plan)
        ask_attention(work.denoiser, plan)
        work.undo(lambda: _leave_float(work))

    def before_check(self, work: ModelWork) -> None:
        round_attention(work.denoiser, asked_attention(work.denoiser))  # sets the counts of its calls back to zero

    def after_check(self, work: ModelWork) -> None:
        facts = attention_facts(work.denoiser, work.device)
        work.report.attention = facts
        if facts is not None:
            work.warnings += attention_warnings(facts, sampled=bool(work.timesteps))


def _chosen(work: ModelWork, sites: Sequence[str], candidates: Sequence[AttentionQuant]) -> Mapping[str, Sequence[int]]:
    """The candidate for every site and slot."""

    def make(call: RecordedCall) -> None:
        work.output(call)
        work.advance()

    with work.timed("choose numbers of attention", len(work.calls)):
        calls = ((call.step, functools.partial(make, call)) for call in work.calls)
        return best(compare_attention(work.denoiser, sites, candidates, calls), len(work.timesteps))


def _leave_float(work: ModelWork) -> None:
    round_attention(work.denoiser, None)
    ask_attention(work.denoiser, None)
    stop_attention(work.denoiser)


def attention_warnings(facts: AttentionFacts, sampled: bool) -> list[str]:
    """What of the attention that a recipe asks for did not happen, in the clips of the check or on this machine."""
    if facts.refused is not None:
        return [f"attention with {facts.asked} is {facts.by}"]
    if sampled and not facts.rounded:
        why = ", ".join(f"{reason} ({count} calls)" for reason, count in facts.calls.items())
        return [f"attention with {facts.asked} computed no call: {why or 'none came through scaled_dot_product_attention'}"]
    return []
