"""The gate: limits on figures in three strengths, and a sentence for every figure over its limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reelquant._errors import RecipeError, nearest
from reelquant.evidence.metrics import METRICS

ROUNDING = 1e-9  # by which a figure may miss its limit
DEFECTS = "defects"  # the check on the share of clips in which one and the same defect is recognised


@dataclass(frozen=True)
class Limit:
    """Where a figure may lie: at least ``low``, at most ``high``."""

    metric: str
    low: float | None = None
    high: float | None = None

    def words(self, digits: int | None = None) -> str:
        """The limit as text: ``at most 0.15``, with so many decimals, or as many as it needs."""
        low, high = (None if end is None else f"{end:g}" if digits is None else f"{end:.{digits}f}" for end in (self.low, self.high))
        if low is None:
            return f"at most {high}"
        return f"at least {low}" if high is None else f"from {low} to {high}"

    def excess(self, value: float) -> float:
        """By how much a value is outside of the limit; 0 if it is inside."""
        return max(0.0, -self.margin(value))

    def margin(self, value: float) -> float:
        """How far a value is from the nearer end of the limit, negative outside of it."""
        return min(math.inf if self.low is None else value - self.low, math.inf if self.high is None else self.high - value)

    def allows(self, value: float) -> bool:
        """Whether a value is inside, rounding of floats aside."""
        return self.excess(value) <= ROUNDING


def around(metric: str, center: float, width: float) -> Limit:
    """A limit on the distance from a value."""
    return Limit(metric, center - width, center + width)


@dataclass(frozen=True)
class Preset:
    """A strength of the gate.

    Attributes:
        limits: on means over clips.
        defects: share of clips in which any one defect may be recognised.
    """

    limits: tuple[Limit, ...]
    defects: float


_SCALED: dict[str, tuple[Callable[[float], Limit], tuple[float, float, float]]] = {  # strict, default, loose
    "psnr": (lambda x: Limit("psnr", low=x), (35, 25, 15)),
    "ssim": (lambda x: Limit("ssim", low=x), (0.97, 0.85, 0.5)),
    "lpips_alex": (lambda x: Limit("lpips_alex", high=x), (0.03, 0.15, 0.45)),
    "latent_error": (lambda x: Limit("latent_error", high=x), (0.1, 0.4, 1.0)),
    "color_shift": (lambda x: Limit("color_shift", high=x), (0.75, 1.5, 4.0)),
    "sharpness_deviation": (lambda x: around("sharpness_deviation", 0, x), (0.05, 0.2, 0.4)),
    "motion_deviation": (lambda x: around("motion_deviation", 0, x), (0.03, 0.1, 0.25)),
    "tempo": (lambda x: around("tempo", 1, x), (0.03, 0.1, 0.25)),
    "dropped": (lambda x: Limit("dropped", high=x), (0.0, 0.01, 0.05)),
    "flicker_deviation": (lambda x: around("flicker_deviation", 0, x), (1.0, 3.0, 8.0)),
    "grain_deviation": (lambda x: Limit("grain_deviation", high=x), (1.0, 3.0, 7.0)),
    "checkerboard_deviation": (lambda x: Limit("checkerboard_deviation", high=x), (0.25, 1.0, 3.0)),
}
_NEVER = (
    around("length_deviation", 0, 0.0),
    *(Limit(f"{kind}_frames", high=0.0) for kind in ("black", "constant", "saturated")),
)
_SHARES = (0.0, 0.02, 0.1)


def _preset(strength: int) -> Preset:
    scaled = (make(widths[strength]) for make, widths in _SCALED.values())
    return Preset((*scaled, *_NEVER), _SHARES[strength])


GATES: dict[str, Preset] = {name: _preset(i) for i, name in enumerate(("strict", "default", "loose"))}
"""The presets; docs/metrics.md says where their numbers come from."""


@dataclass(frozen=True)
class Failure:
    """Something over its limit.

    Attributes:
        metric: the figure, or the name of a defect.
        value: what was measured.
        limit: what would have passed, as text.
        sentence: for people.
        looks_like: names of defects that were recognised, if any.
    """

    metric: str
    value: float | None
    limit: str
    sentence: str
    looks_like: str | None = None


@dataclass(frozen=True)
class Check:
    """A figure beside its limit.

    Attributes:
        metric: the figure, or :data:`DEFECTS`.
        value: what was measured; None if it was not.
        limit: what passes, as text.
        margin: how far the value is inside of the limit, negative outside; None if it was not measured.
        passed: None for a limit of a preset whose figure was not measured.
    """

    metric: str
    value: float | None
    limit: str
    margin: float | None = None
    passed: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """The decision of the gate."""

    preset: str
    passed: bool
    failures: tuple[Failure, ...]
    skipped: tuple[str, ...] = ()  # metrics with a limit that were not measured
    checks: tuple[Check, ...] = ()  # every limit, in the order of the preset, then those on top

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def check_preset(name: str) -> str:
    """The name, if it is one of a preset.

    Raises:
        RecipeError: naming those that are.
    """
    if name not in GATES:
        raise RecipeError(f"unknown gate '{name}'; {nearest(name, GATES)}")
    return name


def parse_limits(pairs: Sequence[str] | Mapping[str, float]) -> list[Limit]:
    """``["psnr=30", "fvd=50"]`` as limits: a figure must not be worse than its value, in the direction of the metric.

    Raises:
        RecipeError: for an unknown metric, a value that is not a number, or a metric without a better direction.
    """
    items = list(pairs.items()) if isinstance(pairs, Mapping) else [tuple(pair.partition("=")[::2]) for pair in pairs]
    return [_limit(str(name).strip().lower().replace("-", "_"), value) for name, value in items]


def _limit(name: str, value: Any) -> Limit:
    if name not in METRICS:
        raise RecipeError(f"--fail-under: unknown metric '{name}'; {nearest(name, METRICS)}")
    try:
        number = float(value)
    except ValueError:
        raise RecipeError(f"--fail-under {name}: '{value}' is not a number; for example --fail-under {name}=1") from None
    if not math.isfinite(number):
        raise RecipeError(f"--fail-under {name}: a limit is finite, got {number}; for example --fail-under {name}=1")
    shapes = {
        "higher": Limit(name, low=number),
        "lower": Limit(name, high=number),
        "zero": around(name, 0, abs(number)),
        "one": around(name, 1, abs(number)),
    }
    better = METRICS[name].better
    if better not in shapes:
        wanted = [other for other in METRICS if METRICS[other].better in shapes]
        raise RecipeError(f"--fail-under {name}: neither high nor low is better there; choose one of {', '.join(wanted)}")
    return shapes[better]


def decide(
    values: Mapping[str, float],
    missing: Mapping[str, str],
    defects: Sequence[Mapping[str, Any]],
    clips: int,
    preset: str | None,
    extra: Sequence[Limit] = (),
) -> Verdict:
    """Hold figures against limits.

    Args:
        values: means over clips by metric.
        missing: why other metrics have no value. A limit that was asked for by name fails then; one of a preset is
            skipped.
        defects: ``{"name", "clips", "sentence"}`` of each defect recognised.
        clips: how many were measured.
        preset: key of :data:`GATES`, or None for the extra limits alone.
        extra: limits on top.
    """
    chosen = GATES[check_preset(preset)] if preset is not None else Preset((), 1.0)
    failures = [_defect(found, clips, chosen.defects) for found in defects if len(found["clips"]) > chosen.defects * clips]
    named = ", ".join(dict.fromkeys(failure.metric for failure in failures)) or None
    for limit in (*chosen.limits, *extra):
        if limit.metric in values and not limit.allows(values[limit.metric]):
            failures.append(_over(limit, values[limit.metric], named))
    for limit in extra:
        if limit.metric not in values:
            reason = missing.get(limit.metric, "it is not among the metrics asked for")
            failures.append(Failure(limit.metric, None, limit.words(), f"{METRICS[limit.metric].title} was not measured: {reason}"))
    skipped = tuple(limit.metric for limit in chosen.limits if limit.metric not in values)
    checks = [_check(limit, values.get(limit.metric), None) for limit in chosen.limits]
    checks += [_check(limit, values.get(limit.metric), False) for limit in extra]
    checks += [_defects_check(defects, clips, chosen.defects)] if preset is not None else []
    return Verdict(preset or "limits", not failures, tuple(failures), skipped, tuple(checks))


def _check(limit: Limit, value: float | None, unmeasured: bool | None) -> Check:
    if value is None:
        return Check(limit.metric, None, limit.words(), passed=unmeasured)
    return Check(limit.metric, value, limit.words(), limit.margin(value), limit.allows(value))


def _defects_check(defects: Sequence[Mapping[str, Any]], clips: int, share: float) -> Check:
    """The most frequent defect beside the share of clips that may have it."""
    most = max((len(found["clips"]) for found in defects), default=0) / max(clips, 1)
    return Check(DEFECTS, most, _at_most(share), share - most, most <= share + ROUNDING)


def _at_most(share: float) -> str:
    return f"at most {share:.0%} of the clips"


def _over(limit: Limit, value: float, named: str | None) -> Failure:
    metric = METRICS[limit.metric]
    unit = f" {metric.unit}" if metric.unit else ""
    shown, missed = f"{value:.{metric.digits}f}", f"{limit.excess(value):.{metric.digits}f}"
    sentence = f"{metric.title} is {shown}{unit} and misses the limit ({limit.words()}) by {missed}"
    return Failure(limit.metric, value, limit.words(), sentence, named)


def _defect(found: Mapping[str, Any], clips: int, share: float) -> Failure:
    count = len(found["clips"])
    shown = ", ".join(found["clips"][:3]) + (" ..." if count > 3 else "")
    sentence = f"{found['name']} in {count} of {clips} clips ({shown}): {found['sentence']}"
    return Failure(found["name"], count / max(clips, 1), _at_most(share), sentence, found["name"])
