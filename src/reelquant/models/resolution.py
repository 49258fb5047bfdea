"""Follow a schedule of sizes in the sampling loop of any pipeline whose latents are pictures.

The loop belongs to the pipeline, and all that it knows of the size of its latents it reads off the tensor. So its scheduler is the place
where they change: at the last step of a stage the scheduler hands out latents of the next size. At a change

1. the clean clip is estimated from the denoiser's output, the latents and their level of noise (:mod:`reelquant.models.noise`),
2. resized along height and width,
3. noised to the level at which the next step begins, with noise that follows from the clip's first latents (so a clip does not depend on
   those that are sampled beside it), and
4. the scheduler forgets the steps before: what multistep solvers remember has another size.

A stage of the same size changes nothing, bit for bit.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.discover.components import denoisers_of, plain
from reelquant.models.conditions import CONDITIONS, FRAMES, PICTURE, named_arguments
from reelquant.models.noise import Level, check_scheduler, level_at, memory_of, prediction_of, recall
from reelquant.policies.resolution import ChangeResolution, SizeStage, resolution_of

WRAPPED = ("step", "set_timesteps")  # methods of a scheduler that are exchanged
MARK = "_reelquant_following"  # attribute of a scheduler that follows a schedule until it is told not to
LISTS = ("timesteps", "sigmas", "num_inference_steps")  # what a scheduler holds of a run as a whole
SIZELESS = ("ip_adapter_image",)  # pictures that are read as a whole: latents may have any size beside them


# --- what a pipeline says ---------------------------------------------------------------------------------------------------------------


def schedule_of(pipe: Any) -> ChangeResolution | None:
    """The schedule of sizes of a pipeline: that of its first denoiser that has one."""
    parts = getattr(pipe, "components", {}).values()
    found = (resolution_of(plain(part)) for part in parts if isinstance(part, nn.Module))
    return next((one for one in found if one is not None), None)


def check_pipeline(pipe: Any) -> None:
    """Refuse pipelines whose latents cannot change their size.

    Raises:
        UnsupportedError: if pictures are a part of the condition, or the scheduler is missing or of a kind that does not fit.
    """
    name, kinds = type(pipe).__name__, (PICTURE, FRAMES)
    pictures = [one for one in named_arguments(type(pipe)) if CONDITIONS.get(one) in kinds and one not in SIZELESS]
    if pictures:
        raise UnsupportedError(
            f"{name} takes '{pictures[0]}', which is encoded once in the size of the call, so its latents keep that size; "
            "drop 'resolution' from the recipe, or take a pipeline that makes clips from text"
        )
    if getattr(pipe, "scheduler", None) is None:
        raise UnsupportedError(f"{name} has no scheduler in which clips could change their size; drop 'resolution' from the recipe")
    check_scheduler(pipe.scheduler)


def grain_of(pipe: Any) -> int:
    """What height and width of latents are multiples of: the patch of a transformer, the halvings of a UNet, or 2 if no config says."""
    for part in denoisers_of(pipe).values():
        config = getattr(plain(part), "config", {})
        if (patch := config.get("patch_size")) is not None:
            return int(patch if isinstance(patch, int) else patch[-1])
        if blocks := config.get("down_block_types"):
            return 2 ** (len(blocks) - 1)
    return 2


# --- one trajectory ---------------------------------------------------------------------------------------------------------------------


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
        grain: see :func:`grain_of`.
        places: one per step of the trajectory that was begun last.
        shown: timesteps and levels of all runs, which the pipeline sees between steps.
        done: steps of it that were taken.
        size: height and width of its first latents.
        seeds: one per clip, from its first latents.
        left: what the stage before left, in the size of this stage.
        tokens: height times width of the latents of every step, for whoever counts.
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
    tokens: list[int] = field(default_factory=list)

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
        self.done, self.size, self.seeds, self.left, self.tokens = 0, (0, 0), [], None, []

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
                sigmas, times = (getattr(self.scheduler, name, None) for name in ("sigmas", "timesteps"))
                factor = None if sigmas is None or times is None else times[0] / sigmas[0]
                if factor is None or not torch.allclose(sigmas[: len(times)] * factor.cpu(), times.cpu().to(sigmas), rtol=1e-3):
                    raise UnsupportedError(
                        f"{type(self.scheduler).__name__} has timesteps that are no levels of noise, so a stage of 'resolution' cannot "
                        "shift them; drop 'shift', or use a scheduler of flow matching"
                    )
                first = sigmas[start].clone()
                part = sigmas[start:] / first
                self.scheduler.sigmas, self.scheduler.timesteps = sigmas.clone(), times.clone()
                self.scheduler.sigmas[start:] = first * shift * part / (1 + (shift - 1) * part)
                self.scheduler.timesteps[start:] = (self.scheduler.sigmas[start : len(times)] * factor.cpu()).to(times)
            start += count

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
        self.tokens.append(sample.shape[-2] * sample.shape[-1])
        if place.guided and self.left is not None:
            model_output = self._guided(model_output, sample, place)
        result = self._own("step")(model_output, timestep, sample, *args, **kwargs)
        self.done += 1
        if not after or not self._changes(place, after[0]):
            return result
        clean = prediction_of(self.scheduler).clean(model_output.float(), sample.float(), self._level(place))
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
        self.left = resized(clean, self._target(self.schedule.sizes[after.stage]), self.schedule.enlarge)
        level = self._level(after)
        return level.alpha * self.left + level.sigma * _noise(self.left, self.seeds, after.stage)


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


def resized(clip: Tensor, size: tuple[int, int], enlarge: str) -> Tensor:
    """A clip ``[clips, ..., height, width]`` in another size: by areas if it shrinks."""
    if tuple(clip.shape[-2:]) == size:
        return clip
    mode = "area" if size[0] <= clip.shape[-2] and size[1] <= clip.shape[-1] else enlarge
    pictures = clip.reshape(-1, 1, *clip.shape[-2:])
    made = F.interpolate(pictures, size, mode=mode, **({} if mode == "area" else {"align_corners": False}))
    return made.reshape(*clip.shape[:-2], *size)


def low_band(clip: Tensor) -> Tensor:
    """The low frequencies of a clip: what one level of the Haar transform along height and width leaves, in the clip's size.

    A last row or column of an odd size is a pair of itself.
    """
    high, wide = clip.shape[-2:]
    pictures = F.pad(clip.reshape(-1, 1, high, wide), (0, wide % 2, 0, high % 2), mode="replicate")
    low = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2, mode="nearest")
    return low[..., :high, :wide].reshape(clip.shape)


def _noise(like: Tensor, seeds: Sequence[int], stage: int) -> Tensor:
    """White noise in the shape of latents, from the seeds of the clips and the number of the stage."""
    drawn = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed + (stage << 32))) for seed in seeds]
    return torch.stack(drawn).to(like.device)


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


# --- whole pipelines --------------------------------------------------------------------------------------------------------------------


@contextmanager
def following(pipe: Any, schedule: ChangeResolution | None) -> Iterator[Following | None]:
    """Inside, the pipeline follows the schedule; None leaves it alone. A scheduler that follows one already goes on with this one.

    Raises:
        UnsupportedError: if the pipeline's latents cannot change their size, or it fails while they have another.
    """
    if schedule is None:
        yield None
        return
    check_pipeline(pipe)
    kept = {name: vars(pipe.scheduler)[name] for name in WRAPPED if name in vars(pipe.scheduler)}
    for name in kept:
        del vars(pipe.scheduler)[name]
    one = Following(pipe.scheduler, schedule, grain_of(pipe))
    one.install()
    try:
        yield one
    except RuntimeError as error:
        if type(error) is not RuntimeError or not one.changed:
            raise
        scale = schedule.sizes[one.places[one.done].stage].scale
        raise UnsupportedError(
            f"{type(pipe).__name__} fails with latents of {scale:g} times the size of its call: {str(error).splitlines()[0]:.200}; it "
            "keeps something of that size, or its denoiser wants sizes of other multiples: give another size, or drop 'resolution'"
        ) from error
    finally:
        one.remove()
        vars(pipe.scheduler).update(kept)


def set_resolution(pipe: Any, wanted: bool) -> None:
    """Let every later call of a pipeline follow the schedule that its denoiser was stored with, or stop it.

    Raises:
        UnsupportedError: if none is stored, or the pipeline cannot follow one.
    """
    if getattr(pipe, "scheduler", None) is not None and (one := vars(pipe.scheduler).pop(MARK, None)) is not None:
        one.remove()
    if not wanted:
        return
    schedule = schedule_of(pipe)
    if schedule is None:
        raise UnsupportedError(
            f"{type(pipe).__name__} stores no schedule of sizes; give a pipeline that was quantized with 'resolution' in its recipe"
        )
    check_pipeline(pipe)
    one = Following(pipe.scheduler, schedule, grain_of(pipe))
    one.install()
    vars(pipe.scheduler)[MARK] = one
