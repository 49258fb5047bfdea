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
from reelquant.models.media import opened

# --------------------------------------------------------------------------------------------------------- what conditions look like


class Kind(NamedTuple):
    """A kind of condition.

    Attributes:
        words: what one of them is, for messages.
        several: whether a value holds one condition per clip.
        listed: whether the pipeline wants a list even of one.
        axes: of a tensor that is one condition and wants an axis of clips in front; 0 for none.
    """

    words: str
    several: Callable[[Any], bool]
    listed: bool = False
    axes: int = 0


def _axes(value: Any) -> int:
    """Axes of a tensor or array; 0 of anything else."""
    return int(getattr(value, "ndim", 0))


def _holds_clips(value: Any) -> bool:
    """Whether frames are those of several clips: each entry holds frames itself."""
    if isinstance(value, list | tuple):
        return len(value) > 0 and (isinstance(value[0], list | tuple) or _axes(value[0]) > 3)
    return _axes(value) > 4


def _more_axes_than(axes: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) or _axes(value) > axes


PICTURE = Kind("a PIL image or a tensor [3, height, width]", _more_axes_than(3), axes=3)
FRAMES = Kind("a list of PIL images, one for each frame", _holds_clips)
CLASS = Kind("the number of a class", _more_axes_than(0), listed=True)
TOKENS = Kind("a tensor [tokens, width]", _more_axes_than(2), axes=2)
VECTOR = Kind("a tensor with one axis", _more_axes_than(1), axes=1)

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
    "prompt_embeds": TOKENS,
    "prompt_embeds_2": TOKENS,
    "negative_prompt_embeds": TOKENS,
    "negative_prompt_embeds_2": TOKENS,
    "pooled_prompt_embeds": VECTOR,
    "negative_pooled_prompt_embeds": VECTOR,
    "prompt_attention_mask": VECTOR,
    "negative_prompt_attention_mask": VECTOR,
    "prompt_embeds_mask": VECTOR,
    "negative_prompt_embeds_mask": VECTOR,
}
EMBEDS = "prompt_embeds"  # stands in the place of the prompt
BATCHED = ("negative_prompt",)  # what a pipeline that takes a list of prompts takes a list of, too
LEADING = (
    "image",
    "control_image",
    "video",
    "control_video",
    "conditioning_frames",
    "class_labels",
)  # with a default, and yet what a call may fail without


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


def named_arguments(kind: type) -> list[str]:
    """The arguments of a call that have a name."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in _parameters(kind).items() if parameter.kind in named and name != "self"]


def argument_default(kind: type, name: str) -> Any:
    """The default of an argument of a call; None if it has none, or if the call does not take it."""
    parameter = _parameters(kind).get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def needed_arguments(kind: type) -> list[str]:
    """The arguments without a default, but for those that the sampling code gives."""
    own = ("prompt", "generator", "output_type")
    return [name for name in named_arguments(kind) if name not in own and _parameters(kind)[name].default is inspect.Parameter.empty]


def reads_texts(kind: type, call: Mapping[str, Any], prompts: Sequence[Any] = ()) -> bool:
    """Whether clips are made from texts: the pipeline takes some, and is not given their embeddings instead."""
    return takes_prompt(kind) and call.get(EMBEDS) is None and not any(EMBEDS in _inputs(one) for one in prompts)


def _inputs(prompt: Any) -> Mapping[str, Any]:
    """What a :class:`~reelquant.models.condition.Condition` gives beside its text; nothing for a text."""
    return getattr(prompt, "inputs", {})


def at_once(kind: type, call: Mapping[str, Any], batch: int, prompts: Sequence[Any] = ()) -> int:
    """How many clips one call makes, of at most ``batch``.

    Args:
        kind: a class of pipelines.
        call: arguments of its call.
        batch: clips that were asked for.
        prompts: texts and conditions of the clips, by the names of the call.
    """
    batch = min(batch, getattr(kind, "CLIPS_AT_ONCE", batch))
    own = [set(_inputs(one)) for one in prompts]
    every = set[str]().union(*own)
    given = every | {name for name, value in call.items() if name in CONDITIONS and value is not None}
    together = given <= set(BATCHED if takes_prompt(kind) else CONDITIONS)
    return batch if together and all(names == every for names in own) else 1


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


def check_given(kind: type, call: Mapping[str, Any], prompts: Sequence[Any] = ()) -> None:
    """Refuse a call without what the pipeline cannot do without.

    Args:
        kind: a class of pipelines.
        call: arguments of its call.
        prompts: texts and conditions of the clips, by the names of the call.

    Raises:
        CalibrationError: naming the argument and what to pass.
    """
    for name in needed_arguments(kind):
        if call.get(name) is None and (not prompts or any(_inputs(one).get(name) is None for one in prompts)):
            raise CalibrationError(f"{kind.__name__} needs '{name}' for every clip and got none; pass {_how(name)}")


def _how(name: str) -> str:
    if name not in CONDITIONS:
        return f"{name}=... as an argument of the pipeline call"
    words = f"{name}=..., {CONDITIONS[name].words}; one stands for every clip, a list gives one per clip"
    return f"{words}; or a file of conditions (--conditions) with the field {name}"


def lacking(kind: type, call: Mapping[str, Any], error: Exception, *, refused: bool) -> CalibrationError | None:
    """The error for a call that failed where a condition may be missing although it has a default; None if that is not likely.

    Args:
        kind: a class of pipelines.
        call: conditions of the call.
        error: what was raised.
        refused: whether the pipeline itself raised it; then it counts only if it names the condition.
    """
    names = [name for name in LEADING if name in _parameters(kind)]
    if refused and "NoneType" not in str(error):  # not a refusal: the pipeline used a value that is missing
        names = [name for name in names if re.search(rf"\b{name}\b", str(error))]
    if not names or any(call.get(name) is not None for name in CONDITIONS):
        return None
    reason = (str(error).splitlines() or ["no reason given"])[0]
    return CalibrationError(
        f"{kind.__name__} got no '{names[0]}' and failed ({type(error).__name__}: {reason}); pass {' or '.join(map(_how, names))}"
    )


def unspoken(pipe: Any, call: Mapping[str, Any], error: Exception) -> CalibrationError | None:
    """The error for a call that failed because the pipeline has no text encoder; None if it has one, or none by nature.

    Args:
        pipe: the pipeline.
        call: conditions of the call.
        error: what was raised.
    """
    needed = [name for name in (EMBEDS, f"negative_{EMBEDS}") if name in _parameters(type(pipe)) and call.get(name) is None]
    if not needed or getattr(pipe, "text_encoder", pipe) is not None or "None" not in str(error):
        return None
    return CalibrationError(
        f"{type(pipe).__name__} has no text encoder and failed ({type(error).__name__}: {error}); pass {' and '.join(map(_how, needed))}"
    )


# ------------------------------------------------------------------------------------------------------------------ clips of a call


class Clips(NamedTuple):
    """What clips are made from: equally many texts, seeds and conditions of each name; None where a clip has none of that name."""

    texts: Sequence[str]
    seeds: Sequence[int]
    conditions: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, prompts: Sequence[Any], seeds: Sequence[int], call: Mapping[str, Any], first: int = 0) -> Clips:
        """Every clip with its conditions; its own come before those of the call.

        Args:
            prompts: texts and conditions, by the names of the call, one per clip.
            seeds: one per clip.
            call: arguments of the pipeline call.
            first: the number of the first clip, which says where lists of conditions begin.
        """
        own, numbers = [_inputs(one) for one in prompts], range(first, first + len(prompts))
        given = {name: per_clip(name, value) for name, value in call.items() if name in CONDITIONS}
        names = dict.fromkeys([*given, *(name for one in own for name in one)])
        every = {name: given.get(name, [call.get(name)]) for name in names}
        texts = [getattr(one, "text", one) for one in prompts]
        return cls(
            texts,
            seeds,
            {name: [one.get(name, vs[i % len(vs)]) for i, one in zip(numbers, own, strict=True)] for name, vs in every.items()},
        )

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
        conditions = {name: [opened(value) for value in values] for name, values in self.conditions.items() if values[0] is not None}
        if EMBEDS in conditions:
            found["prompt"] = None
        elif takes_prompt(kind):
            found["prompt"] = self.texts[0] if alone else list(self.texts)
        elif "batch_size" in _parameters(kind):
            found["batch_size"] = len(self.texts)
        for name, values in conditions.items():
            found[name] = _as_one(name, values[0]) if alone else _together(name, values)
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
    kind = CONDITIONS.get(name)
    return [value] if kind is not None and kind.listed else _with_clips(kind, value)


def _with_clips(kind: Kind | None, value: Any) -> Any:
    """A tensor that is one condition, with an axis of clips in front."""
    return value[None] if kind is not None and kind.axes and isinstance(value, Tensor) and value.ndim == kind.axes else value


def _together(name: str, values: Sequence[Any]) -> Any:
    """Conditions of several clips: tensors as one tensor, anything else as a list."""
    if not all(isinstance(value, Tensor) for value in values):
        return list(values)
    return torch.cat([_with_clips(CONDITIONS.get(name), value) for value in values])
