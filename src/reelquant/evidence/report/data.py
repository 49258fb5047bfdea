"""The content of ``report.json``, typed. Only :meth:`ReportData.from_json` reads its keys; see ``docs/report.md``.

Every field may be absent or null. Text, flags and numbers are then None; lists and mappings are empty. NaN and
infinities count as null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from reelquant._errors import MeasurementError
from reelquant._numbers import figure, finite_only, is_number, significant
from reelquant.evidence.metrics import METRICS

KINDS = {
    "paired": "Clip against clip",
    "temporal": "Motion over time",
    "distribution": "Set of clips against set of clips",
    "text": "Clip against its text",
}
UNEXPLAINED = "no value was recorded and no reason given"

Number = Annotated[int | float | None, BeforeValidator(lambda raw: raw if is_number(raw) else None)]
Numbers = Annotated[tuple[Number, ...], BeforeValidator(lambda raw: () if raw is None else raw)]
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda raw: () if raw is None else raw)]


class Part(BaseModel):
    """An object of the file. Null and empty objects count as absent; unknown keys are left out."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    @model_validator(mode="before")
    @classmethod
    def _only_present(cls, raw: Any) -> Any:
        if raw is None:
            return {}
        return {key: value for key, value in raw.items() if value not in (None, {})} if isinstance(raw, Mapping) else raw


# -------------------------------------------------------------------------------------------------------------- metrics


class ValueRange(Part):
    """A value and its 95 % interval."""

    value: Number = None
    low: Number = None
    high: Number = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both ends of the interval; None unless both are known."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def range_text(self, digits: int | None = None) -> str:
        """``51.0 to 53.2``; empty without an interval."""
        return "" if self.bounds is None else " to ".join(figure(end, "", digits) for end in self.bounds)

    def text(self, unit: str = "", digits: int | None = None) -> str:
        """``52.1 dB (51.0 to 53.2)``; without an interval only the value."""
        value, interval = figure(self.value, unit, digits), self.range_text(digits)
        return f"{value} ({interval})" if interval else value


class MetricData(ValueRange):
    """One metric: what it is, its value, the reference's own, and the float floor (variant -> value)."""

    title: str | None = None
    kind: str | None = None
    unit: str = ""
    better: str | None = None
    about: str = ""
    reference: Number = None
    floor: dict[str, ValueRange] = {}
    within_floor: bool | None = None
    floor_limit: str | None = None
    missing: str | None = None

    @property
    def decimals(self) -> int | None:
        """Decimals for all figures of a row: two digits of the interval's width, or as many as the value needs."""
        low, high = self.bounds or (0.0, 0.0)
        if high > low:
            return min(6, max(0, 1 - math.floor(math.log10(high - low))))
        return None if self.value is None else min(6, significant(self.value))


class CurveData(Part):
    """Mean and interval, one number per step."""

    mean: Numbers = ()
    low: Numbers = ()
    high: Numbers = ()


class TrajectoryData(Part):
    """Error of the latents after every step; ``test`` and each variant of ``floor`` hold a value per step."""

    steps: Numbers = ()
    test: CurveData = CurveData()
    floor: dict[str, CurveData] = {}
    about: str = "Relative error of the latents after each step."


class GrainData(Part):
    """Grain of both sides against the number of steps."""

    steps: Numbers = ()
    reference: Numbers = ()
    test: Numbers = ()


class BiasData(Part):
    """A distance of distributions against the number of clips."""

    metric: str | None = None
    sizes: Numbers = ()
    values: Numbers = ()
    sd: Numbers = ()
    extrapolated: Number = None


# ------------------------------------------------------------------------------------------------------ clips, verdicts


class SideData(Part):
    """One side of the comparison."""

    name: str | None = None
    dtype: str | None = None
    recipe: str | None = None


class ClipData(Part):
    """Figures of one clip: one number per metric, and one per frame for ``curves``."""

    name: str | None = None
    prompt: str | None = None
    figures: dict[str, Number] = {}
    curves: dict[str, Numbers] = {}
    reference_curves: dict[str, Numbers] = {}


class NearLosslessData(Part):
    """Whether every figure is within the float floor; ``holds`` is None if that was not decided."""

    holds: bool | None = None
    failed: Texts = ()
    why: str | None = None


class FailureData(Part):
    """A figure outside of its limit."""

    metric: str | None = None
    value: Number = None
    limit: str | None = None
    sentence: str | None = None
    looks_like: str | None = None


class CheckData(Part):
    """A figure beside its limit: :class:`reelquant.evidence.gate.Check`. Reports of older versions have none."""

    metric: str | None = None
    value: Number = None
    limit: str | None = None
    margin: Number = None
    passed: bool | None = None


class GateData(Part):
    """The gate's result; ``passed`` is None if no gate was applied."""

    preset: str | None = None
    passed: bool | None = None
    failures: tuple[FailureData, ...] = ()
    checks: tuple[CheckData, ...] = ()


class DefectData(Part):
    """A defect that was recognised, and in which clips."""

    name: str = "defect"
    clips: Texts = ()
    sentence: str = ""


# --------------------------------------------------------------------------------------------------------- quantization


class LayerData(Part):
    """One quantized layer."""

    name: str | None = None
    role: str | None = None
    weight: str | None = None
    input: str | None = None
    solver: str | None = None
    bytes_after: Number = None
    error: Number = None
    coverage: Number = None
    tdscore: Number = None
    skewness: Number = None


class TrialData(Part):
    """One combination that the search tried."""

    family: str | None = None
    options: dict[str, Any] = {}
    psnr: Number = None


class AttentionData(Part):
    """What computes attention with few-bit operands; ``refused`` says why it is computed in float instead."""

    asked: str | None = None
    kernel: str | None = None
    refused: str | None = None
    simulated: bool = False


class QuantizationData(Part):
    """The report of quantizing. ``skipped`` is reason -> layers that stay float; version 0.1 called it ``kept``."""

    recipe: str | None = None
    digest: str | None = None
    denoiser: str | None = None
    component: str | None = None
    layers: tuple[LayerData, ...] = ()
    skipped: dict[str, Texts] = Field(default={}, validation_alias=AliasChoices("skipped", "kept"))
    bytes_float: Number = None
    bytes_quantized: Number = None
    bytes_tables: Number = None
    bytes_model_float: Number = None
    bytes_model: Number = None
    ratio: Number = None
    kernel: dict[str, int] = {}
    simulated: bool | None = None
    attention: AttentionData | None = None
    latent_psnr: Number = None
    prompts: Texts = ()
    timesteps: Numbers = ()
    seed: Number = None
    trials: tuple[TrialData, ...] = ()

    @property
    def skipped_count(self) -> int:
        """How many layers stay float."""
        return sum(len(names) for names in self.skipped.values())


class ClippedLayerData(Part):
    """A layer whose inputs were clipped: share of values, farthest value over the range, noise of clipping over noise of rounding."""

    name: str | None = None
    share: Number = None
    reach: Number = None
    excess: Number = None


class ClippedStepData(Part):
    """A denoising step, all layers together."""

    step: Number = None
    share: Number = None
    excess: Number = None


class SaturationData(Part):
    """What the quantized pipeline clipped while it made the clips: :meth:`reelquant.nn.Saturation.facts`."""

    share: Number = None
    reach: Number = None
    excess: Number = None
    steps: tuple[ClippedStepData, ...] = ()
    layers: tuple[ClippedLayerData, ...] = ()


class ReuseData(Part):
    """What was not computed at every step: :meth:`reelquant.evidence.reused.ReusedSteps.facts`; steps are number, computed, reused, and
    cells the same of single parts."""

    parts: Texts = ()
    share: Number = None
    steps: tuple[tuple[int, int, int], ...] = ()
    cells: dict[str, tuple[tuple[int, int, int], ...]] = {}
    unit: str = "calls"
    things: str = "blocks"


class SensitivityData(Part):
    """What rounding does to the layers of a denoiser: :func:`reelquant.evidence.sensitivity_map.read_map`. ``damage`` is layers x formats,
    ``step_damage`` layers x ranges of steps, ``chosen`` the format that each layer of the test got."""

    component: str = "denoiser"
    measure: str | None = None
    layers: Texts = ()
    formats: Texts = ()
    damage: tuple[Numbers, ...] = ()
    chosen: tuple[str | None, ...] = ()
    steps: tuple[tuple[int, int], ...] = ()
    step_format: str | None = None
    step_damage: tuple[Numbers, ...] = ()


class SpreadData(Part):
    """A median and the quartiles around it."""

    median: Number = None
    low: Number = None
    high: Number = None


class SpeedData(Part):
    """Times and memory of both pipelines in turns: :meth:`reelquant.evidence.speed.Benchmark.to_json`."""

    speedup: SpreadData = SpreadData()
    step_speedup: SpreadData = SpreadData()
    seconds: dict[str, SpreadData] = {}
    step_seconds: dict[str, SpreadData] = {}
    weight_bytes: dict[str, Number] = {}
    peak_bytes: dict[str, Number] = {}
    data: dict[str, Any] = {}


class BytesData(Part):
    """Bytes of all weights of a pipeline as they are stored."""

    reference: Number = None
    test: Number = None


# ----------------------------------------------------------------------------------------------------------- the report


class ReportData(Part):
    """All of ``report.json``. ``metrics`` are sorted by kind, then as in ``METRICS``, then by name."""

    kind: str | None = None
    tool_version: str | None = None
    created: str | None = None
    command: str | None = None
    reference: SideData = SideData()
    test: SideData = SideData()
    clips: Number = None
    fps: Number = None
    prompts: Texts = ()
    seeds: Numbers = ()
    call: dict[str, Any] = {}
    metrics: dict[str, MetricData] = {}
    per_clip: tuple[ClipData, ...] = ()
    trajectory: TrajectoryData | None = None
    grain_growth: GrainData | None = None
    bias: BiasData | None = None
    saturation: SaturationData | None = None
    reuse: ReuseData | None = None
    sensitivity: tuple[SensitivityData, ...] = ()
    speed: SpeedData | None = None
    bytes: BytesData = BytesData()
    floor_words: dict[str, str] = Field(default={}, validation_alias="floors")
    near_lossless: NearLosslessData | None = None
    gate: GateData | None = None
    defects: tuple[DefectData, ...] = ()
    warnings: Texts = ()
    quantization: QuantizationData | None = None
    machine: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    seconds: dict[str, Number] = {}
    expected_seconds: Number = None
    peak_memory_gb: Number = None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ReportData:
        """Read the content of a ``report.json``.

        Raises:
            MeasurementError: naming the fields whose shape is not the schema's.
        """
        try:
            return cls.model_validate(finite_only(raw))
        except ValidationError as error:
            found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}, got {one['input']!r:.60}" for one in error.errors()[:3])
            raise MeasurementError(f"these are not the data of a report: {found}; docs/report.md has the schema") from None

    @field_validator("metrics", mode="before")
    @classmethod
    def _sorted(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        known, kinds = ({name: i for i, name in enumerate(names)} for names in (METRICS, KINDS))
        found = {name: metric for name, metric in raw.items() if metric}

        def place(name: str) -> tuple[int, int, str]:
            return kinds.get(found[name].get("kind"), len(kinds)), known.get(name, len(known)), name

        return {name: found[name] for name in sorted(found, key=place)}

    @property
    def measured(self) -> dict[str, MetricData]:
        """The metrics that have a value."""
        return {name: metric for name, metric in self.metrics.items() if metric.value is not None}

    @property
    def missing(self) -> dict[str, list[str]]:
        """Reason -> titles of the metrics without a value."""
        found: dict[str, list[str]] = {}
        for name, metric in self.metrics.items():
            if metric.value is None:
                found.setdefault(metric.missing or UNEXPLAINED, []).append(self.title(name))
        return found

    @property
    def floors(self) -> list[str]:
        """Names of the float variants that every figure is compared with, in the order they first appear."""
        return list(dict.fromkeys(floor for metric in self.metrics.values() for floor in metric.floor))

    @property
    def clip_count(self) -> int:
        """How many clips were evaluated; 0 if that is not recorded."""
        return int(self.clips or 0)

    def title(self, name: str | None) -> str:
        """What tables call a metric: its title in the data, else the one of this version, else its name."""
        name = name or "unknown"
        own = self.metrics[name].title if name in self.metrics else None
        return own or (METRICS[name].title if name in METRICS else name)

    def unit(self, name: str) -> str:
        """The unit of a metric; empty if it has none."""
        return self.metrics[name].unit if name in self.metrics else ""
