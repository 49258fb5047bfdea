"""Pipelines that follow a schedule of sizes: which can, and how they are told to. The steps are :mod:`reelquant.models.following`'s."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from reelquant._errors import UnsupportedError
from reelquant.discover.components import denoisers_of, plain
from reelquant.models.conditions import CONDITIONS, FRAMES, PICTURE, named_arguments
from reelquant.models.following import MARK, WRAPPED, Following
from reelquant.models.noise import check_scheduler
from reelquant.policies.resolution import ChangeResolution, resolution_of

SIZELESS = ("ip_adapter_image",)  # pictures that are read as a whole: latents may have any size beside them


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
