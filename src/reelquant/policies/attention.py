"""Attention whose two products have operands of few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from reelquant.kernels.attention import AttentionQuant, parse_attention
from reelquant.nn import AttentionFacts, attention_facts, expected_attention, round_attention, stop_attention
from reelquant.stages import ModelWork, Stage


@dataclass(frozen=True)
class RoundAttention(Stage):
    """Round queries, keys and, if wanted, weights and values in the forward. Nothing is calibrated; protected steps round none.

    Attributes:
        scores: numbers of queries, and of keys less their mean, with one scale per token.
        values: ``float``, or ``e4m3`` for the weights and, with one scale per channel, the values.
    """

    scores: str = "int8"
    values: str = "float"
    samples: ClassVar[bool] = False
    key: ClassVar[str | None] = "attention"
    default_on: ClassVar[str] = "*"
    takes_on: ClassVar[bool] = False

    def __post_init__(self) -> None:
        parse_attention({"scores": self.scores, "values": self.values})

    @classmethod
    def parse_key(cls, value: Any) -> Mapping[str, Any] | None:
        numbers = None if value is None else parse_attention(value)
        return None if numbers is None else numbers.to_json()

    @property
    def numbers(self) -> AttentionQuant:
        """As kernels take them."""
        numbers = parse_attention({"scores": self.scores, "values": self.values})
        assert numbers is not None
        return numbers

    def outlook(self, device: str) -> str | None:
        found = expected_attention(self.numbers, device)
        return found.by if found.refused else f"by {found.by}"

    def before_choosing(self, work: ModelWork) -> None:
        round_attention(work.denoiser, self.numbers)
        work.undo(lambda: _leave_float(work))

    def before_check(self, work: ModelWork) -> None:
        round_attention(work.denoiser, self.numbers)  # sets the counts of its calls back to zero

    def after_check(self, work: ModelWork) -> None:
        facts = attention_facts(work.denoiser, work.device)
        work.report.attention = facts
        if facts is not None:
            work.warnings += attention_warnings(facts, sampled=bool(work.timesteps))


def _leave_float(work: ModelWork) -> None:
    round_attention(work.denoiser, None)
    stop_attention(work.denoiser)


def attention_warnings(facts: AttentionFacts, sampled: bool) -> list[str]:
    """What of the attention that a recipe asks for did not happen, in the clips of the check or on this machine."""
    if facts.refused is not None:
        return [f"attention with {facts.asked} is {facts.by}"]
    why = ", ".join(f"{reason} ({count} calls)" for reason, count in facts.calls.items() if reason != facts.kernel)
    if sampled and not facts.calls.get(facts.kernel, 0):
        return [f"attention with {facts.asked} computed no call: {why or 'none came through scaled_dot_product_attention'}"]
    return []
