"""What a clip is made from beside its text: a picture, frames, a class. Which of it a pipeline takes, needs, and takes how many clips of.

A condition is given as an argument of the pipeline call. Given once, it stands for every clip; a list gives one per clip and starts again
at its end. Pipelines differ in what a list of conditions means: clips (I2VGen-XL), moments of one clip (LTX), or an error (Wan). They agree
on what one condition beside one text means. So a pipeline that takes texts is called with one clip at a time once it is given conditions.
A pipeline that takes no text can count its clips by its conditions only: there, a list always means clips.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reelquant._errors import CalibrationError, UnsupportedError

# --------------------------------------------------------------------------------------------------------- what conditions look like


class Kind(NamedTuple):
    """A kind of condition.

    Attributes:
        words: what one of them is, for messages.
        several: whether a value holds one condition per clip.
        listed: whether the pipeline wants a list even of one.
    """

    words: str
    several: Callable[[Any], bool]
    listed: bool = False


def _axes(value: Any) -> int:
    """Axes of a tensor or array; 0 of anything else."""
    return int(getattr(value, "ndim", 0))


def _holds_clips(value: Any) -> bool:
    """Whether frames are those of several clips: each entry holds frames itself."""
    if isinstance(value, list | tuple):
        return len(value) > 0 and (isinstance(value[0], list | tuple) or _axes(value[0]) > 3)
    return _axes(value) > 4


PICTURE = Kind("a PIL image or a tensor [3, height, width]", lambda value: isinstance(value, list | tuple) or _axes(value) > 3)
FRAMES = Kind("a list of PIL images, one for each frame", _holds_clips)
CLASS = Kind("the number of a class", lambda value: isinstance(value, list | tuple) or _axes(value) > 0, listed=True)

CONDITIONS: dict[str, Kind] = {  # argument of a pipeline call -> what it holds
    "image": PICTURE,
    "last_image": PICTURE,
    "mask_image": PICTURE,
    "control_image": PICTURE,
    "ip_adapter_image": PICTURE,
    "video": FRAMES,
    "mask": FRAMES,
    "control_video": FRAMES,
    "conditioning_frames": FRAMES,
    "reference_images": FRAMES,
    "conditions": FRAMES,
    "pose_video": FRAMES,
    "face_video": FRAMES,
    "background_video": FRAMES,
    "mask_video": FRAMES,
    "class_labels": CLASS,
}
LEADING = ("image", "video", "control_video", "conditioning_frames", "class_labels")  # with a default, and yet what a call may fail without


def per_clip(name: str, value: Any) -> list[Any]:
    """The conditions of a value: one that stands for every clip, or one per clip.

    Raises:
        CalibrationError: if there is none.
    """
    kind = CONDITIONS[name]
    if not kind.several(value) and not (isinstance(value, list | tuple) and not value):
        return [value]
    found = value.tolist() if kind is CLASS and _axes(value) else list(value)
    if not found:
        raise CalibrationError(f"{name} is empty; give {kind.words}, or a list with one per clip")
    return found


# --------------------------------------------------------------------------------------------------------------- what a pipeline takes


def _parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.__call__).parameters


def takes_prompt(kind: type) -> bool:
    """Whether a class of pipelines makes clips from texts."""
    parameters = _parameters(kind)
    return "prompt" in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def at_once(kind: type, call: Mapping[str, Any], batch: int) -> int:
    """How many clips one call makes, of at most ``batch``."""
    return 1 if takes_prompt(kind) and any(name in CONDITIONS for name, value in call.items() if value is not None) else batch


def no_texts(count: int) -> list[str]:
    """What stands for the texts of clips that are made from none."""
    return [""] * count


def check_texts(kind: type, texts: Sequence[str]) -> None:
    """Refuse texts for pipelines that take none.

    Raises:
        UnsupportedError: they would be dropped without a word.
    """
    if any(texts) and not takes_prompt(kind):
        raise UnsupportedError(f"{kind.__name__} takes no prompt, got '{next(filter(None, texts)):.40}'; give no prompts{_instead(kind)}")


def _instead(kind: type) -> str:
    names = [f"{name}=..., {CONDITIONS[name].words}" for name in _parameters(kind) if name in CONDITIONS]
    return f", but {' and '.join(names)}" if names else ""


def check_given(kind: type, call: Mapping[str, Any]) -> None:
    """Refuse a call without what the pipeline cannot do without.

    Args:
        kind: a class of pipelines.
        call: arguments of its call.

    Raises:
        CalibrationError: naming the argument and what to pass.
    """
    own = ("self", "prompt", "generator", "output_type")  # given by whoever samples
    for name, parameter in _parameters(kind).items():
        named = parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        if named and parameter.default is inspect.Parameter.empty and name not in own and call.get(name) is None:
            raise CalibrationError(f"{kind.__name__} needs '{name}' for every clip and got none; pass {_how(name)}")


def _how(name: str) -> str:
    if name not in CONDITIONS:
        return f"{name}=... as an argument of the pipeline call"
    return f"{name}=..., {CONDITIONS[name].words}; one stands for every clip, a list gives one per clip"


def lacking(kind: type, call: Mapping[str, Any], error: Exception, *, refused: bool) -> CalibrationError | None:
    """The error for a call that failed where a condition may be missing although it has a default; None if that is not likely.

    Args:
        kind: a class of pipelines.
        call: conditions of the call.
        error: what was raised.
        refused: whether the pipeline itself raised it; then it counts only if it names the condition.
    """
    names = [name for name in LEADING if name in _parameters(kind)]
    if refused:
        names = [name for name in names if re.search(rf"\b{name}\b", str(error))]
    if not names or any(call.get(name) is not None for name in CONDITIONS):
        return None
    reason = (str(error).splitlines() or ["no reason given"])[0]
    return CalibrationError(
        f"{kind.__name__} got no '{names[0]}' and failed ({type(error).__name__}: {reason}); pass {' or '.join(map(_how, names))}"
    )


# ------------------------------------------------------------------------------------------------------------------ clips of a call


class Clips(NamedTuple):
    """What clips are made from: equally many texts, seeds and conditions of each name."""

    texts: Sequence[str]
    seeds: Sequence[int]
    conditions: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, texts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any], first: int = 0) -> Clips:
        """Every clip with its conditions.

        Args:
            texts, seeds: one per clip.
            call: arguments of the pipeline call.
            first: the number of the first clip, which says where lists of conditions begin.
        """
        given = {name: per_clip(name, value) for name, value in call.items() if name in CONDITIONS}
        numbers = range(first, first + len(texts))
        return cls(texts, seeds, {name: [values[i % len(values)] for i in numbers] for name, values in given.items()})

    def cut(self, size: int) -> Iterator[Clips]:
        """So many clips at a time."""
        for start in range(0, len(self.texts), size):
            part = slice(start, start + size)
            yield Clips(self.texts[part], self.seeds[part], {name: values[part] for name, values in self.conditions.items()})

    def call(self, kind: type, *, alone: bool) -> dict[str, Any]:
        """The arguments that make these clips.

        Args:
            kind: the class of the pipeline.
            alone: there is one clip, and the pipeline gets its text, noise and conditions as they are, not in lists of one.
        """
        noise = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        found: dict[str, Any] = {"generator": noise[0] if alone else noise}
        if takes_prompt(kind):
            found["prompt"] = self.texts[0] if alone else list(self.texts)
        elif "batch_size" in _parameters(kind):
            found["batch_size"] = len(self.texts)
        for name, values in self.conditions.items():
            found[name] = _as_one(name, values[0]) if alone else _together(values)
        return found


@contextmanager
def own_noise(clips: Clips) -> Iterator[None]:
    """Inside, what a pipeline draws without the generator that it was given depends on the first seed alone.

    I2VGen-XL encodes its picture with noise of the process: the clips of a float pipeline would differ from each other by more than
    quantization changes.
    """
    if not clips.conditions:
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(clips.seeds[0])
        yield


def _as_one(name: str, value: Any) -> Any:
    if CONDITIONS[name].listed:
        return [value]
    return value[None] if CONDITIONS[name] is PICTURE and isinstance(value, Tensor) and value.ndim == 3 else value


def _together(values: Sequence[Any]) -> Any:
    """Conditions of several clips: tensors as one tensor, anything else as a list."""
    if not all(isinstance(value, Tensor) for value in values):
        return list(values)
    return torch.cat([value[None] if value.ndim == 3 else value for value in values])
