"""What reports say of attention with few-bit operands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from reelquant.kernels import attention as fast
from reelquant.nn.around.attention_plan import AttentionPlan

STOCK = "stock"  # how reports call attention that nothing of ours computes


@dataclass(frozen=True)
class AttentionFacts:
    """Attention of models of which rounded attention is asked for.

    Attributes:
        asked: in words: ``int8 scores, float values``.
        kernel: what computes it where the model lies; ``stock`` if nothing does.
        refused: why nothing does, or None.
        simulated: whether float arithmetic stands in for low-bit arithmetic.
        calls: calls so far, by what computed them. Those that graphs leave to the compiler (masks over pairs, dropout) are not seen.
        rounded: calls so far whose operands were rounded, by their numbers.
    """

    asked: str
    kernel: str
    refused: str | None
    simulated: bool
    calls: dict[str, int]
    rounded: dict[str, int] = field(default_factory=dict)

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
        asked, kernel, refused = (_joined(getattr(one, name) for one in known) for name in ("asked", "kernel", "refused"))
        calls = sum((Counter(one.calls) for one in known), Counter[str]())
        rounded = sum((Counter(one.rounded) for one in known), Counter[str]())
        return cls(asked, kernel, refused or None, any(one.simulated for one in known), dict(calls), dict(rounded))


def _joined(words: Iterable[str | None]) -> str:
    return ", ".join(dict.fromkeys(word for word in words if word))


def expected_attention(
    plan: AttentionPlan,
    device: str,
    kernels: str = "auto",
    calls: Mapping[str, int] | None = None,
    rounded: Mapping[str, int] | None = None,
) -> AttentionFacts:
    """What would compute such attention on a type of device."""
    chosen = [fast.select(numbers, device, kernels) for numbers in plan.numbers]
    names = _joined(STOCK if kernel is None else kernel.name for kernel, _ in chosen)
    refused = _joined(reason for _, reason in chosen) or None
    simulated = any(kernel is not None and not kernel.low_bit for kernel, _ in chosen)
    return AttentionFacts(str(plan), names, refused, simulated, dict(calls or {}), dict(rounded or {}))
