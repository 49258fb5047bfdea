"""Attention whose two products have operands of few bits, everywhere or by rules of places and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from reelquant._errors import RecipeError
from reelquant.kernels.attention import Asked, AttentionRule, parse_asked
from reelquant.nn import (
    AttentionFacts,
    AttentionPlan,
    ask_attention,
    attention_facts,
    expected_attention,
    placed,
    round_attention,
    stop_attention,
)
from reelquant.nn.around.attention_plan import Placed
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
            a part of the trajectory like ``[0.0, 0.2]``. The last rule that fits holds, and where none fits attention stays float.
    """

    scores: str = "int8"
    values: str = "float"
    smooth: str = "auto"
    first_key: str = "rounded"
    rules: tuple[Mapping[str, Any], ...] = ()
    samples: ClassVar[bool] = False
    key: ClassVar[str | None] = "attention"
    default_on: ClassVar[str] = "*"
    takes_on: ClassVar[bool] = False

    def __post_init__(self) -> None:
        plain = {field.name: field.default for field in fields(self)}
        if self.rules and (changed := [name for name in self._everywhere if getattr(self, name) != plain[name]]):
            raise RecipeError(f"attention has rules, and {changed[0]}: {getattr(self, changed[0])} beside them; write it into a rule")
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

    def plan(self, map_: DenoiserMap, work: ModelWork | None = None) -> AttentionPlan | None:
        """The same for one denoiser; without ``work``, of one that nothing was sampled with."""
        times = ([], []) if work is None else (work.timesteps, work.sampled)
        return placed(self.asked, map_.attention, *times)

    def outlook(self, device: str) -> str | None:
        asked = self.asked
        rules = asked if isinstance(asked, tuple) else (AttentionRule("", asked),)
        found = expected_attention(AttentionPlan(tuple(Placed(rule.numbers) for rule in rules)), device)
        return found.by if found.refused else f"by {found.by}"

    def before_choosing(self, work: ModelWork) -> None:
        plan = self.plan(work.map, work)
        round_attention(work.denoiser, plan)
        ask_attention(work.denoiser, plan)
        work.undo(lambda: _leave_float(work))

    def before_check(self, work: ModelWork) -> None:
        round_attention(work.denoiser, self.plan(work.map, work))  # sets the counts of its calls back to zero

    def after_check(self, work: ModelWork) -> None:
        facts = attention_facts(work.denoiser, work.device)
        work.report.attention = facts
        if facts is not None:
            work.warnings += attention_warnings(facts, sampled=bool(work.timesteps))


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
