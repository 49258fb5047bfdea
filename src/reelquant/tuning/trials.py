"""Schedules tried out: clips with the reuse beside those of the same pipeline without it, or of the float one, on texts that nothing was
recorded on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reelquant._progress import Progress, Silent
from reelquant._version import __version__
from reelquant.evidence.clips import Clip
from reelquant.evidence.evaluation import Evaluation
from reelquant.evidence.judging import Options, Subject, Times, judge
from reelquant.evidence.sampling import ClipSource, SamplingJob, Variant
from reelquant.evidence.store import Store, write_json
from reelquant.models.condition import texts_of
from reelquant.models.described import described
from reelquant.reuse import BlockReuse
from reelquant.tuning.recording import Site, reusing
from reelquant.tuning.shared import Together

FIGURES = ("quick", "lpips_alex")
"""What is measured of every trial."""
SHOWN = ("psnr", "lpips_alex", "motion_deviation", "flicker_deviation")


@dataclass(frozen=True)
class Trial:
    """A schedule that was tried, and how its clips were.

    Attributes:
        computed: numbers of the steps at which the stretch was computed.
        steps: how many steps there are.
        order: of the forecasts.
        figures: means over clips, by metric.
        worst: the lowest PSNR of a clip, dB.
        failures: sentences of the gate and of limits; none if all were kept.
        speedup: expected of a whole clip.
    """

    computed: tuple[int, ...]
    steps: int
    order: int
    figures: Mapping[str, float]
    worst: float
    failures: tuple[str, ...]
    speedup: float

    @property
    def passed(self) -> bool:
        """Whether every limit was kept."""
        return not self.failures


@dataclass(frozen=True)
class Source(ClipSource):
    """A pipeline in memory that stays as it is while its clips are made; its identity is that of what was opened."""

    known_as: str = ""

    @property
    def identity(self) -> str:
        return self.known_as

    def open(self) -> Any:
        return self.model


@dataclass
class Trials:
    """All trials of a run, kept in a folder: a trial that is there is not made again.

    Attributes:
        pipe: the pipeline.
        site: its denoiser.
        folder: ``base`` holds the clips that trials are held against, one folder a trial the others.
        model: name and identity of what was opened.
        prompts, seeds: of the clips.
        call: arguments of the pipeline call.
        gate, limits: what a trial has to keep.
        weights: folder with the networks of metrics.
        progress: receives the progress.
        batch: clips per call.
        shared: processes that make some of the clips each; the first one measures.
        reference: the float pipeline, if trials are held against that; else the same pipeline without reuse.
    """

    pipe: Any
    site: Site
    folder: Path
    model: tuple[str, str]
    prompts: Sequence[Any]
    seeds: Sequence[int]
    call: Mapping[str, Any]
    gate: str | None = "default"
    limits: Mapping[str, float] = field(default_factory=dict)
    weights: Path | None = None
    progress: Progress = field(default_factory=Silent)
    batch: int = 4
    shared: Together = field(default_factory=Together)
    reference: ClipSource | None = None

    @property
    def _against(self) -> tuple[str, str]:
        """Name and identity of what trials are held against."""
        return self.model if self.reference is None else (self.reference.name, self.reference.identity)

    def base(self) -> None:
        """Make the clips that trials are held against."""
        self._store("base", None, self._settings("nothing"))

    def run(self, stage: BlockReuse, computed: Sequence[int], steps: int, speedup: float) -> Trial:
        """Make the clips with a schedule, and measure them against those without."""
        name = f"{len(computed):02d}-of-{steps}-order-{stage.order}-{name_of(stage)}"
        store, job = self._store(name, stage, self._settings(repr(stage)), self.folder / "base")
        found = self.shared.once(f"trial-{name}", lambda: asdict(self._judged(store, job, stage, computed, steps, speedup)))
        return Trial(**found | {"computed": tuple(found["computed"]), "failures": tuple(found["failures"])})

    def _judged(self, store: Store, job: SamplingJob, stage: BlockReuse, computed: Sequence[int], steps: int, speedup: float) -> Trial:
        """Measure the clips of a trial."""
        subject = Subject(self._clips(job), self._origin(), *self._named(job))
        made = judge(self._options(), store, subject, Times())
        trial = Trial(tuple(computed), steps, stage.order, _figures(made), _worst(made), _failures(made), round(speedup, 3))
        write_json(store.root / "trial.json", asdict(trial))
        return trial

    def _store(self, name: str, stage: BlockReuse | None, settings: Mapping[str, Any], base: Path | None = None) -> Any:
        """A folder with the clips of one variant in it."""
        store = Store(self.folder / name, "run again, it goes on")
        if self.shared.first:
            store.begin(settings, resume=True, force=False)
            if base is not None:
                store.borrow(base, settings)
        shared = self.shared.clips(store, name)
        job = SamplingJob(store, self.prompts, self.seeds, self.call, self.batch, self.progress, shared)
        words = "without reuse" if stage is None else name.partition("-order")[0].replace("-", " ") + f" steps, order {stage.order}"
        source = Source(self.pipe, known_as=settings["test"])
        if stage is None and self.reference is not None:
            source, words = self.reference, "in float"
        side, variant = "reference" if stage is None else "test", Variant(source, words=words)
        with reusing(self.site, stage):
            job.make(side, variant)
        if shared is not None:
            job.take_over({side: variant})
        return store, job

    def _clips(self, job: SamplingJob) -> dict[str, dict[str, Clip]]:
        return {variant: job.clips(variant) for variant in ("reference", "test")}

    def _named(self, job: SamplingJob) -> list[dict[str, Any]]:
        both = (texts_of(self.prompts), self.seeds)
        return [dict(zip(job.names, values, strict=True)) if any(values) else {} for values in both]

    def _settings(self, test: str) -> dict[str, Any]:
        """What a run that goes on must have in common with this one."""
        sampling = {"prompts": texts_of(self.prompts), "seeds": list(self.seeds), "call": described(dict(self.call)), "batch": self.batch}
        return {"kind": "tune", "version": __version__, "reference": self._against[1], "test": test} | sampling

    def _origin(self) -> dict[str, Any]:
        return {
            "kind": "evaluate",
            "reference": {"name": self._against[0]},
            "test": {"name": f"{self.model[0]} with reuse"},
            "prompts": texts_of(self.prompts),
            "seeds": list(self.seeds),
            "call": described(dict(self.call)),
            "quantization": None,
            "grain_growth": None,
        }

    def _options(self) -> Options:
        return Options(FIGURES, weights=self.weights, gate=self.gate, fail_under=self.limits, progress=self.progress)


def name_of(stage: BlockReuse) -> str:
    """A short name for a schedule."""
    return hashlib.sha256(repr(stage).encode()).hexdigest()[:12]


def _figures(made: Evaluation) -> dict[str, float]:
    return {name: result.interval.mean for name, result in made.metrics.items() if result.interval is not None}


def _worst(made: Evaluation) -> float:
    return min((row["figures"]["psnr"] for row in made.data["per_clip"] if "psnr" in row["figures"]), default=float("nan"))


def _failures(made: Evaluation) -> tuple[str, ...]:
    return () if made.verdict is None else tuple(failure.sentence for failure in made.verdict.failures)
