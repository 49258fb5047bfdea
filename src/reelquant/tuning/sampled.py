"""A few schedules sampled on texts that are not those of the trials: they show which expectation of damages is right."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from reelquant._progress import Progress, Silent
from reelquant.evidence.fidelity import psnr
from reelquant.models.sampling import sample
from reelquant.reuse import BlockReuse
from reelquant.reuse.plans import Errors, Steps, expected
from reelquant.tuning.kept import KeptFigures
from reelquant.tuning.recording import Clips, Site, reusing
from reelquant.tuning.shared import Together
from reelquant.tuning.trials import name_of

FLOOR = 1e-12  # of an expected damage, so that its logarithm is finite
DRAWS, SURE = 1_000, 0.9


@dataclass(frozen=True)
class Sample:
    """A schedule that was sampled.

    Attributes:
        steps: numbers of the computed steps.
        order: of the forecasts.
        psnr: of every clip to the same pipeline without reuse, dB.
    """

    steps: Steps
    order: int
    psnr: tuple[float, ...]


@dataclass
class Sampler:
    """Samples schedules, all on the same clips.

    Attributes:
        pipe: the pipeline.
        site: its denoiser.
        clips: what is sampled.
        kept: figures of earlier runs, lists of dB by the name of a schedule.
        shared: processes that sample some of the schedules each.
        progress: receives the progress.
    """

    pipe: Any
    site: Site
    clips: Clips
    kept: KeptFigures
    shared: Together = field(default_factory=Together)
    progress: Progress = field(default_factory=Silent)

    def psnr(self, stages: Sequence[BlockReuse]) -> list[list[float]]:
        """PSNR of every clip to the same pipeline without reuse, dB, for every schedule."""
        names = [name_of(stage) for stage in stages]
        self.progress.phase("schedules", len(stages))
        known = {name: self.kept.of(name) for name in names}

        def measured(number: int) -> list[float]:
            found = known[names[number]]
            if found is None:
                found = self._measured(stages[number])
                if self.shared.first:
                    self.kept.keep(names[number], found)
            self.progress.advance()
            return found

        together = hashlib.sha256(" ".join(names).encode()).hexdigest()[:12]
        found = self.shared.each(f"sampled-{together}", len(stages), measured)
        for name, one in zip(names, found, strict=True):
            if self.shared.first and self.kept.of(name) is None:
                self.kept.keep(name, one)
        return found

    def _measured(self, stage: BlockReuse) -> list[float]:
        reference = self.reference  # made outside of the reuse
        with reusing(self.site, stage):
            return [round(float(one), 4) for one in psnr(reference, self._frames())]

    @cached_property
    def reference(self) -> Tensor:
        """The clips without reuse."""
        with reusing(self.site, None):
            return self._frames()

    def _frames(self) -> Tensor:
        return sample(self.pipe, self.clips.prompts, seeds=self.clips.seeds, **self.clips.call).float().clamp(0, 1)


def misfits(kinds: Mapping[str, Errors], samples: Sequence[Sample]) -> dict[str, float]:
    """How far differences between sampled schedules are from what each kind of errors lets expect, dB: standard deviations over schedules.

    Only differences count: clips themselves are easier or harder.
    """
    means = np.array([one.psnr for one in samples]).mean(1)
    return {name: float(np.std(means - _told(errors, samples))) for name, errors in kinds.items()}


def _told(errors: Errors, samples: Sequence[Sample]) -> np.ndarray:
    """What errors let expect of schedules, dB up to a constant."""
    return np.array([-10 * np.log10(max(expected(errors, one.steps, one.order), FLOOR)) for one in samples])


def by_fit(kinds: Mapping[str, Errors], samples: Sequence[Sample]) -> list[str]:
    """Names of the errors, those that expect best what was sampled first. The first of ``kinds`` stays first unless clips drawn at random
    from those that were sampled prefer another one :data:`SURE` of the time."""
    if len(samples) < 2:
        return list(kinds)
    first, found = next(iter(kinds)), misfits(kinds, samples)
    ordered = sorted(kinds, key=lambda name: found[name])
    if ordered[0] == first or _preferred(kinds, ordered[0], first, samples) >= SURE:
        return ordered
    return [first, *(name for name in ordered if name != first)]


def _preferred(kinds: Mapping[str, Errors], name: str, other: str, samples: Sequence[Sample]) -> float:
    """How often one kind of errors expects better than the other what clips drawn at random show."""
    two = {one: _told(kinds[one], samples) for one in (name, other)}
    psnr, dice = np.array([one.psnr for one in samples]), np.random.default_rng(0)
    drawn = psnr[:, dice.integers(psnr.shape[1], size=(DRAWS, psnr.shape[1]))].mean(2)  # [schedules, draws]
    apart = {one: np.std(drawn - told[:, None], axis=0) for one, told in two.items()}
    return float(np.mean(apart[name] < apart[other]))
