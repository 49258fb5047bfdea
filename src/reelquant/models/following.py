"""Follow a schedule of sizes in the sampling loop of any pipeline whose latents are pictures.

The loop belongs to the pipeline, and all that it knows of the size of its latents it reads off the tensor. So its scheduler is the place
where they change: at the last step of a stage the scheduler hands out latents of the next size. At a change

1. the clean clip is estimated from the denoiser's output, the latents and their level of noise (:mod:`reelquant.models.noise`),
2. resized along height and width; where the size comes back, mixed with the clip that was estimated at its end, if wanted,
3. noised to the level at which the next step begins, with noise that was in the clip before, if wanted, or new noise that follows from the
   clip's first latents (so a clip does not depend on those that are sampled beside it), and
4. the scheduler forgets the steps before: what multistep solvers remember has another size.

A stage of the same size changes nothing, bit for bit.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reelquant._errors import UnsupportedError
from reelquant.models.noise import Level, level_at, memory_of, prediction_of, recall
from reelquant.models.rescale import low_band, noise_like, resized
from reelquant.policies.resolution import ChangeResolution, SizeStage

WRAPPED = ("step", "set_timesteps")  # methods of a scheduler that are exchanged
MARK = "_reelquant_following"  # attribute of a scheduler that follows a schedule until it is told not to
LISTS = ("timesteps", "sigmas", "num_inference_steps")  # what a scheduler holds of a run as a whole


@dataclass(frozen=True)
class Place:
    """One step of the trajectory.

    Attributes:
        stage: number of its stage.
        memory: what the scheduler holds before the first step of the run that it belongs to. A restart begins a run.
        index: of the step in the timesteps of that run.
        guided: whether the estimate of the clean clip gets the low frequencies of the stage before.
    """

    stage: int
    memory: dict[str, Any]
    index: int
    guided: bool


@dataclass
class Following:
    """A scheduler on its way through a schedule.

    Attributes:
        scheduler: whose methods are exchanged.
        schedule: of sizes.
        grain: see :func:`reelquant.models.resolution.grain_of`.
        places: one per step of the trajectory that was begun last.
        shown: timesteps and levels of all runs, which the pipeline sees between steps.
        done: steps of it that were taken.
        size: height and width of its first latents.
        seeds: one per clip, from its first latents.
        left: what the stage before left, in the size of this stage.
        estimates: the clean clip as it was estimated last in each size that was left.
        noises: the noise in each size that was left, as it was estimated last.
    """

    scheduler: Any
    schedule: ChangeResolution
    grain: int
    places: list[Place] = field(default_factory=list)
    shown: dict[str, Any] = field(default_factory=dict)
    done: int = 0
    size: tuple[int, int] = (0, 0)
    seeds: list[int] = field(default_factory=list)
    left: Tensor | None = None
    estimates: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    noises: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether the step that is being computed has another size than the call."""
        return 0 < self.done < len(self.places) and self.schedule.sizes[self.places[self.done].stage].scale != 1

    def install(self) -> None:
        """Exchange the methods of the scheduler."""
        for name, call in zip(WRAPPED, (self.step, self.set_timesteps), strict=True):
            vars(self.scheduler)[name] = _Instead(getattr(self.scheduler, name), call)

    def remove(self) -> None:
        """Give the scheduler its own methods back."""
        for name in WRAPPED:
            vars(self.scheduler).pop(name, None)

    def _own(self, name: str) -> Callable[..., Any]:
        return getattr(type(self.scheduler), name).__get__(self.scheduler)

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """The scheduler's own method, for every run of the schedule; the pipeline then sees the timesteps of all runs."""
        own = self._own("set_timesteps")
        given = inspect.signature(own).bind(*args, **kwargs).arguments
        given = given | given.pop("kwargs", {})
        custom = next((name for name in ("sigmas", "timesteps") if given.get(name) is not None), None)
        steps = given.get("num_inference_steps") if custom is None else len(given[custom])
        sizes, counts = self.schedule.sizes, self.schedule.counts(int(steps or 0))
        if custom and any(stage.restart for stage in sizes):
            raise UnsupportedError(
                f"the pipeline brings its own {custom}, and 'resolution' restarts, which needs other ones; drop 'restart'"
            )
        self.places, parts = [], []
        for run in _runs(sizes):
            count = sum(counts[place] for place in run)
            total = round(count / (sizes[run[0]].restart or 1))
            own(**given | ({} if custom else {"num_inference_steps": total}))
            offset = self._check_steps(total) - count
            self._shift(offset, [(counts[place], sizes[place].shift) for place in run])
            self.places += self._placed(run, counts, offset)
            parts.append((self.places[-1].memory, offset))
        recall(self.scheduler, self.places[0].memory)
        self.shown = _joined(parts)
        recall(self.scheduler, self.shown)
        self.done, self.size, self.seeds, self.left, self.estimates, self.noises = 0, (0, 0), [], None, {}, {}

    def _check_steps(self, total: int) -> int:
        times = self.scheduler.timesteps
        if len(times) != total or bool((times[1:] >= times[:-1]).any()):
            raise UnsupportedError(
                f"{type(self.scheduler).__name__} takes {len(times)} calls for {total} steps, or repeats a timestep, and clips can change "
                "their size only where every step is one call; use a scheduler like UniPC, DPM++, Euler or DDIM"
            )
        return total

    def _placed(self, run: Sequence[int], counts: Sequence[int], offset: int) -> Iterator[Place]:
        memory, index = memory_of(self.scheduler, without=(*WRAPPED, MARK)), offset
        for stage in run:
            guided = round(self.schedule.sizes[stage].guide * counts[stage])
            for step in range(counts[stage]):
                yield Place(stage, memory, index, step < guided)
                index += 1

    def _shift(self, start: int, stages: Sequence[tuple[int, float]]) -> None:
        """Move the levels of noise of the steps of a run, stage after stage."""
        for count, shift in stages:
            if shift != 1:
                sigmas, times = self._levels()
                factor = float(times[0] / sigmas[0])
                first = sigmas[start].clone()
                part = sigmas[start:] / first
                sigmas[start:] = first * shift * part / (1 + (shift - 1) * part)
                times[start:] = (sigmas[start : len(times)] * factor).to(times)
                self.scheduler.sigmas, self.scheduler.timesteps = sigmas, times
            start += count

    def _levels(self) -> tuple[Tensor, Tensor]:
        """Copies of the levels of noise and of the timesteps, which are the same up to a factor.

        Raises:
            UnsupportedError: if they are not.
        """
        sigmas, times = (getattr(self.scheduler, name, None) for name in ("sigmas", "timesteps"))
        if isinstance(sigmas, Tensor) and isinstance(times, Tensor):
            ratio = sigmas[: len(times)] / times.to(sigmas)
            if torch.allclose(ratio, ratio[:1], rtol=1e-3):
                return sigmas.clone(), times.clone()
        raise UnsupportedError(
            f"{type(self.scheduler).__name__} has timesteps that are no levels of noise, so a stage of 'resolution' cannot shift them; "
            "drop 'shift', or use a scheduler of flow matching"
        )

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's own step; at the end of a stage the latents that it hands out have the next size."""
        if self.done >= len(self.places):
            return self._own("step")(model_output, timestep, sample, *args, **kwargs)
        local = self.places[self.done].memory
        recall(self.scheduler, {name: local[name] for name in LISTS if name in local})
        try:
            return self._step(model_output, timestep, sample, *args, **kwargs)
        finally:
            recall(self.scheduler, self.shown)

    def _step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        place, after = self.places[self.done], self.places[self.done + 1 :][:1]
        if not self.done:
            self._begin(model_output, sample)
        if place.guided and self.left is not None:
            model_output = self._guided(model_output, sample, place)
        result = self._own("step")(model_output, timestep, sample, *args, **kwargs)
        self.done += 1
        if not after or not self._changes(place, after[0]):
            return result
        noisy, level = sample.float(), self._level(place)
        clean = prediction_of(self.scheduler).clean(model_output.float(), noisy, level)
        self.noises[noisy.shape[-2], noisy.shape[-1]] = (noisy - level.alpha * clean) / level.sigma
        return _handed_out(result, self._entered(clean, after[0]).to(sample.dtype))

    def _begin(self, model_output: Tensor, sample: Tensor) -> None:
        if sample.ndim not in (4, 5) or model_output.shape != sample.shape:
            raise UnsupportedError(
                f"latents of shape {list(sample.shape)} and outputs of shape {list(model_output.shape)}: clips can change their size only "
                "where both are pictures of one shape, [clips, channels, (frames,) height, width], and not where tokens are packed or "
                "variances predicted; drop 'resolution' from the recipe"
            )
        self.size = (sample.shape[-2], sample.shape[-1])
        self.seeds = [zlib.crc32(clip.detach().float().cpu().numpy().tobytes()) for clip in sample]

    def _changes(self, place: Place, after: Place) -> bool:
        sizes = self.schedule.sizes
        return after.memory is not place.memory or self._target(sizes[after.stage]) != self._target(sizes[place.stage])

    def _target(self, stage: SizeStage) -> tuple[int, int]:
        if stage.scale == 1:
            return self.size
        high, wide = (max(round(side * stage.scale / self.grain), 1) * self.grain for side in self.size)
        return high, wide

    def _level(self, place: Place) -> Level:
        return level_at(self.scheduler, place.index, place.memory["timesteps"][place.index])

    def _guided(self, model_output: Tensor, sample: Tensor, place: Place) -> Tensor:
        """The output whose estimate of the clean clip has the low frequencies of :attr:`left`."""
        assert self.left is not None
        prediction, level = prediction_of(self.scheduler), self._level(place)
        clean = prediction.clean(model_output.float(), sample.float(), level)
        mixed = clean + low_band(self.left - clean)
        return prediction.output(mixed, sample.float(), level).to(model_output.dtype)

    def _entered(self, clean: Tensor, after: Place) -> Tensor:
        """Latents with which the next stage begins; the scheduler is ready for them."""
        kept = {name: value for name, value in vars(self.scheduler).items() if name == "_begin_index"}
        recall(self.scheduler, after.memory)
        if "_step_index" in vars(self.scheduler):
            recall(self.scheduler, {"_step_index": after.index, **kept})
        self.left = self._resized(clean, self.schedule.sizes[after.stage])
        level = self._level(after)
        return level.alpha * self.left + level.sigma * self._noise(self.left, after.stage, (clean.shape[-2], clean.shape[-1]))

    def _noise(self, like: Tensor, number: int, before: tuple[int, int]) -> Tensor:
        """Noise ``[clips, ...]`` of a stage: new, or what was in the clip, which had the size ``before``."""
        new, share = noise_like(like, self.seeds, number), self.schedule.sizes[number].noise
        size = (like.shape[-2], like.shape[-1])
        if size[0] <= before[0] and size[1] <= before[1]:  # it shrinks: neighbours are averaged, and what is left has the variance 1 again
            kept = resized(self.noises[before], size, "area")
            kept = kept / kept.flatten(1).std(1).view(-1, *(1,) * (kept.ndim - 1))
        else:
            kept = self.noises.get(size, new)
        return share**0.5 * kept + (1 - share) ** 0.5 * new if share else new

    def _resized(self, clean: Tensor, stage: SizeStage) -> Tensor:
        """The clean clip in the size of a stage, mixed with the one that was estimated last in that size."""
        size, enlarge = self._target(stage), self.schedule.enlarge
        small: tuple[int, int] = (clean.shape[-2], clean.shape[-1])
        self.estimates[small], before = clean, self.estimates.get(size)
        made = resized(clean, size, enlarge)
        if before is None or size == small:
            return made
        low = resized(resized(before, small, enlarge), size, enlarge)
        return made + stage.details * (before - low) + stage.hold * (low - made)


def _runs(sizes: Sequence[SizeStage]) -> list[list[int]]:
    """The numbers of the stages of every run: a stage with a restart begins one."""
    runs: list[list[int]] = []
    for place, stage in enumerate(sizes):
        if not runs or stage.restart:
            runs.append([])
        runs[-1].append(place)
    return runs


def _joined(parts: Sequence[tuple[dict[str, Any], int]]) -> dict[str, Any]:
    """The timesteps, and the levels if there are any, of runs that begin at these places in theirs."""
    if len(parts) == 1:
        return {}
    joined = {"timesteps": torch.cat([memory["timesteps"][offset:] for memory, offset in parts])}
    if all(isinstance(memory.get("sigmas"), Tensor) for memory, _ in parts):
        joined["sigmas"] = torch.cat([memory["sigmas"][offset : len(memory["timesteps"])] for memory, offset in parts])
        joined["sigmas"] = torch.cat([joined["sigmas"], parts[-1][0]["sigmas"][-1:]])
    return joined


def _handed_out(result: Any, latents: Tensor) -> Any:
    """What a scheduler gives, with other latents."""
    if isinstance(result, tuple):
        return (latents, *result[1:])
    result.prev_sample = latents
    return result


class _Instead:
    """A method in place of another, with the other's signature: pipelines look at it to know what a scheduler takes.

    An object and no closure, so that a deep copy of a pipeline has a scheduler of its own.
    """

    def __init__(self, method: Callable[..., Any], call: Callable[..., Any]) -> None:
        self.__signature__, self.call = inspect.signature(method), call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)
