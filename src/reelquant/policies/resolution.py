"""A schedule of sizes: at which steps of the sampler latents have which height and width.

Here the schedule is checked, put on a denoiser and stored with it. What follows it in a pipeline is :mod:`reelquant.models.resolution`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from reelquant._errors import CalibrationError, CheckpointError, RecipeError, nearest
from reelquant.sites import DenoiserMap
from reelquant.stages import ModelWork, Stage

ATTRIBUTE = "_reelquant_resolution"
SMALLEST, LARGEST = 0.125, 4.0  # of the height and width of the call
Resize = Literal["area", "bilinear", "bicubic"]


@dataclass(frozen=True)
class SizeStage:
    """A part of the trajectory in which latents have one size.

    Attributes:
        share: of the sampler's steps, in (0, 1].
        scale: height and width over those of the call.
        shift: of the noise levels from the start of the stage to the end of the trajectory: the level ``u`` (1 at the start of the stage)
            becomes ``shift u / (1 + (shift - 1) u)``, so more than 1 spends more steps where there is much noise. Flow matching only.
        restart: the stages before this one go all the way to a clean clip, which gets noise again: this stage starts where a whole
            trajectory of the sampler has this share of its steps left (``strength`` of image-to-image pipelines). 0 goes on.
        guide: share of the stage's steps, from its start, at which the low frequencies of the estimated clip are those of the clip that
            the stage before left, enlarged.
        details: where the clip comes back to this size: share of the details that the last estimated clip of this size had, beyond the
            size of the stage before, and that are added.
        hold: there, too: share of what that clip had within the size of the stage before, in the place of what the smaller clip shows.
            With both at 1 the smaller clip is not taken at all.
        noise: share of the noise at the start of the stage, by variance, that is not new but was in the clip already: averaged where the
            clip shrinks, that of the last time it had this size where it grows.
    """

    share: float
    scale: float = 1.0
    shift: float = 1.0
    restart: float = 0.0
    guide: float = 0.0
    details: float = 0.0
    hold: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        bounds = {"share": (0, 1), "scale": (SMALLEST, LARGEST), "shift": (0.1, 20), "restart": (0, 1)}
        bounds |= {"guide": (0, 1), "details": (0, 1), "hold": (0, 1), "noise": (0, 1)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise RecipeError(f"'{name}' of a stage of 'resolution' lies from {low} to {high}, got {value!r}")
        if self.share == 0 or self.restart == 1:
            raise RecipeError(f"a stage of 'resolution' has a share above 0 and a restart below 1, got {self.share} and {self.restart}")

    @classmethod
    def read(cls, data: Any) -> SizeStage:
        """A stage from a mapping of a recipe.

        Raises:
            RecipeError: for a key that does not exist, or without ``share``.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or "share" not in data:
            raise RecipeError(f"a stage of 'resolution' is a mapping like {{share: 0.5, scale: 0.5}}, got {data!r:.80}")
        for key in data:
            if key not in known:
                raise RecipeError(f"a stage of 'resolution' has no '{key}'; {nearest(str(key), known)}")
        return cls(**data)

    def to_json(self) -> dict[str, float]:
        """A mapping without defaults."""
        plain = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in dataclasses.asdict(self).items() if value != plain[name]}


@dataclass(frozen=True)
class ChangeResolution(Stage):
    """Sample parts of the trajectory at other sizes: fewer tokens in the middle, or a larger clip in the end.

    The sampler itself is not changed: :func:`reelquant.models.resolution.following` follows the schedule in any pipeline whose latents are
    pictures. Calibration samples with it, so statistics see every size at the steps at which it comes.

    Papers: Bottleneck Sampling (arXiv 2503.18940), high, low and high sizes; DiffuseHigh (arXiv 2406.18459), a clip of the usual size,
    enlarged, noised to an intermediate step and guided by its low frequencies. Deviations: the clean clip is estimated, resized and
    noised in latents (DiffuseHigh: decoded, enlarged, sharpened, encoded); noise after a change has the level of the next
    step (Bottleneck Sampling: levels of its own for every change), and is new or what was in the clip; an earlier estimate can come back
    with its size (neither paper has these two).

    Attributes:
        stages: mappings with the fields of :class:`SizeStage`, in the order of the trajectory; shares add up to 1, and the first has the
            scale 1, because the pipeline makes its noise.
        enlarge: how estimates of the clean clip grow: ``area``, ``bilinear`` or ``bicubic``. They shrink by areas.
    """

    stages: tuple[Mapping[str, Any], ...] = ()
    enlarge: Resize = "bicubic"
    samples: ClassVar[bool] = False
    key: ClassVar[str | None] = "resolution"
    default_on: ClassVar[str] = "*"
    takes_on: ClassVar[bool] = False

    def __post_init__(self) -> None:
        sizes = self.sizes
        if self.enlarge not in get_args(Resize):
            raise RecipeError(f"enlarge of 'resolution' cannot be '{self.enlarge}'; {nearest(str(self.enlarge), get_args(Resize))}")
        if not sizes or abs(sum(stage.share for stage in sizes) - 1) > 1e-3:
            total = sum(stage.share for stage in sizes)
            raise RecipeError(f"the shares of the stages of 'resolution' add up to 1, got {total:g} from {len(sizes)} stages")
        first = sizes[0]
        if first.scale != 1 or first.restart or first.guide or first.details or first.hold or first.noise:
            raise RecipeError(
                f"the first stage of 'resolution' has the size of the call and nothing before it, got {first.to_json()}; other sizes are "
                "relative to it: a clip of twice the size ends with the scale 2"
            )

    @classmethod
    def parse_key(cls, value: Any) -> Mapping[str, Any] | None:
        return super().parse_key({"stages": value} if isinstance(value, list | tuple) else value)

    @property
    def sizes(self) -> tuple[SizeStage, ...]:
        """The stages, read."""
        return tuple(SizeStage.read(one) for one in self.stages)

    def counts(self, steps: int) -> list[int]:
        """Steps of every stage of a sampler that takes so many: at least one each.

        Raises:
            CalibrationError: if there are more stages than steps.
        """
        sizes = self.sizes
        if steps < len(sizes):
            raise CalibrationError(
                f"a resolution of {len(sizes)} stages needs as many steps, and the pipeline takes {steps}; give more steps"
            )
        ends, done = [], 0.0
        for place, stage in enumerate(sizes):
            done += stage.share
            least = (ends[-1] if ends else 0) + 1
            ends.append(min(max(round(done * steps), least), steps - (len(sizes) - 1 - place)))
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def fewer(self, steps: int) -> float:
        """Tokens of a sampler that has the size of the call at all of these steps, over those of the schedule."""
        return steps / sum(count * stage.scale**2 for count, stage in zip(self.counts(steps), self.sizes, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain data that :meth:`from_json` reads."""
        return {"stages": [stage.to_json() for stage in self.sizes], "enlarge": self.enlarge}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ChangeResolution:
        """What a checkpoint stores.

        Raises:
            CheckpointError: if it is no schedule.
        """
        try:
            return cls(tuple(data["stages"]), data.get("enlarge", "bicubic"))
        except (KeyError, TypeError, RecipeError) as error:
            raise CheckpointError(f"quantization_config.resolution is no schedule of sizes ({type(error).__name__}: {error})") from None

    def loaded(self, name: str, model: nn.Module, map_: DenoiserMap) -> None:
        put_resolution(model, self)

    def before_observing(self, work: ModelWork) -> None:
        put_resolution(work.denoiser, self)
        work.undo(lambda: put_resolution(work.denoiser, None))


def put_resolution(model: nn.Module, schedule: ChangeResolution | None) -> None:
    """Note a schedule on a denoiser, or none; pipelines follow it while this library samples with them."""
    vars(model).pop(ATTRIBUTE, None)
    if schedule is not None:
        object.__setattr__(model, ATTRIBUTE, schedule)


def resolution_of(model: nn.Module) -> ChangeResolution | None:
    """The schedule that was put on a denoiser."""
    return vars(model).get(ATTRIBUTE)
