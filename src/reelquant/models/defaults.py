"""Pictures and clips of our own, for pipelines that cannot do without and are given none.

They are there so that a pipeline can be calibrated and compared in one command. Results are better with pictures of the kind that the
pipeline is used for, so a report that uses these says so. ``training/conditions.py`` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reelquant._errors import CalibrationError, ReelQuantError
from reelquant.discover import denoiser_of
from reelquant.models.condition import Prompts, as_condition
from reelquant.models.conditions import CONDITIONS, FRAMES, LEADING, PICTURE, argument_default, named_arguments, needed_arguments
from reelquant.models.media import opened, stored
from reelquant.models.sampling import call_arguments, first_call

FOLDER = Path(__file__).parent / "pictures"
SERVED = (PICTURE, FRAMES)


def own_pictures() -> list[Any]:
    """The bundled pictures, as PIL images."""
    return [opened(stored(file)) for file in sorted(FOLDER.glob("picture-*.webp"))]


def own_clips(frames: int | None = None) -> list[list[Any]]:
    """The bundled clips, lists of PIL images; with ``frames`` they are cut, or run forwards and backwards, to that length."""
    clips = [opened(stored(file)) for file in sorted(FOLDER.glob("clip-*.webp"))]
    return [clip if frames is None else _lasting(clip, frames) for clip in clips]


def _lasting(clip: list[Any], frames: int) -> list[Any]:
    course = clip + clip[-2:0:-1]
    return [course[i % len(course)] for i in range(frames)]


def required(kind: type, prompts: Prompts, call: Mapping[str, Any]) -> dict[str, Any]:
    """Bundled values for the pictures and frames that a call of this class requires and that were not given.

    Args:
        kind: a class of pipelines.
        prompts: texts and conditions, by the names of the call.
        call: arguments of the pipeline call.
    """
    return _bundled(kind, [name for name in needed_arguments(kind) if _lacks(name, prompts, call)], call)


def missing(pipe: Any, prompts: Prompts, call: Mapping[str, Any]) -> dict[str, Any]:
    """The same of an opened pipeline, with those that have a default although the pipeline fails without: it is tried, up to the first call
    of its denoiser.

    Args:
        pipe: the pipeline.
        prompts, call: as in :func:`required`.
    """
    kind, call = type(pipe), call_arguments(pipe, **call)
    found = required(kind, prompts, call)
    leading = undecided(kind, prompts, call | found)
    while leading and (error := _failure(pipe, denoiser_of(pipe)[1], prompts, call | found)) is not None:
        name = leading.pop(0)
        more = _bundled(kind, [name], call)
        if not more:
            raise error
        found |= more
    return found


def undecided(kind: type, prompts: Prompts, call: Mapping[str, Any]) -> list[str]:
    """Arguments with a default that were not given. Only a trial shows whether the pipeline works without them."""
    return [name for name in LEADING if name in named_arguments(kind) and _lacks(name, prompts, call)]


def notice(kind: type, names: Mapping[str, Any]) -> str | None:
    """What to say of the bundled values that were taken; None without any."""
    if not names:
        return None
    return (
        f"{kind.__name__} was given no {' and no '.join(names)}, so those that come with reelquant were taken; give some of the kind that "
        "it is used with (--conditions FILE, or as arguments of the call)"
    )


def _lacks(name: str, prompts: Prompts, call: Mapping[str, Any]) -> bool:
    inputs = [as_condition(one).inputs for one in prompts]
    return call.get(name) is None and (not inputs or any(one.get(name) is None for one in inputs))


def _bundled(kind: type, names: list[str], call: Mapping[str, Any]) -> dict[str, Any]:
    frames = call.get("num_frames") or argument_default(kind, "num_frames")
    values = {PICTURE: own_pictures, FRAMES: lambda: own_clips(frames)}
    return {name: values[CONDITIONS[name]]() for name in names if CONDITIONS.get(name) in SERVED}


def _failure(pipe: Any, module: torch.nn.Module, prompts: Prompts, call: Mapping[str, Any]) -> CalibrationError | None:
    """The error for a missing condition; None if the pipeline gets as far as its first step, or fails for another reason."""
    try:
        first_call(pipe, module, list(prompts[:1]) or [""], **call)
    except CalibrationError as error:
        return error
    except (ReelQuantError, ValueError, TypeError, RuntimeError, AttributeError, LookupError):
        return None  # it will be raised, and explained, where clips are made
    return None
