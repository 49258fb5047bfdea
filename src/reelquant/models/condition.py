"""What one clip is made from: its text, and whatever else its pipeline takes. Files of them: :mod:`reelquant.models.prompts`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reelquant._errors import CalibrationError, UnsupportedError
from reelquant.models.conditions import CLASS, CONDITIONS, FRAMES, PICTURE, Kind, named_arguments
from reelquant.models.media import KINDS, Stored, holds

ARGUMENTS: dict[str, tuple[str, ...]] = {  # field of a file -> what calls name it; a field that the call itself names needs no row
    "image": ("control_image",),
    "first_image": ("image",),
    "first_frame": ("image",),
    "start_image": ("image",),
    "last_frame": ("last_image",),
    "end_image": ("last_image",),
    "video": ("control_video", "conditioning_frames"),
    "control": ("control_image", "control_video", "conditioning_frames", "image"),
    "control_image": ("image",),
    "controlnet_cond": ("control_image", "image"),
    "control_video": ("conditioning_frames",),
    "conditioning_frames": ("control_video",),
    "mask": ("mask_image", "mask_video"),
    "mask_image": ("mask",),
    "reference_image": ("reference_images",),
    "class": ("class_labels",),
    "class_label": ("class_labels",),
    "label": ("class_labels",),
    "negative": ("negative_prompt",),
}
CONTROLS, CONTROLLED = ("control", "control_image", "controlnet_cond"), "controlnet_conditioning_scale"
SHARED = {  # argument of the call -> how it is given; the same for all clips of a run
    "num_inference_steps": "--steps",
    "num_frames": "--frames",
    "height": "--height",
    "width": "--width",
}
OURS = (
    "prompt",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "timesteps",
    "sigmas",
    "num_videos_per_prompt",
    "num_images_per_prompt",
)


@dataclass(frozen=True)
class Condition:
    """What one clip is made from.

    Attributes:
        text: the prompt; empty where there is none.
        seed: of the noise, if the file gives one.
        name: of the clip, if the file gives one.
        dimensions: what the prompt is there to test, such as VBench's ``temporal_flickering``; empty if the file does not say.
        inputs: what else goes into the pipeline call: pictures, frames, classes, tensors, texts, numbers, by its names or those of
            :data:`ARGUMENTS`.
        where: file and line, for messages.
    """

    text: str = ""
    seed: int | None = None
    name: str | None = None
    dimensions: tuple[str, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    def __described__(self) -> Any:
        """Text and inputs; a mere text where there are none."""
        return {"prompt": self.text, **self.inputs} if self.inputs else self.text


Prompts = Sequence[str | Condition]


def as_condition(prompt: str | Condition) -> Condition:
    """A text as the condition that it is."""
    return prompt if isinstance(prompt, Condition) else Condition(prompt)


def texts_of(prompts: Iterable[str | Condition]) -> list[str]:
    """The texts alone."""
    return [as_condition(prompt).text for prompt in prompts]


def fitted(kind: type, prompts: Prompts) -> list[str | Condition]:
    """The same conditions by the names of a pipeline's call.

    Args:
        kind: a class of pipelines.
        prompts: texts stay as they are.

    Raises:
        UnsupportedError: for an input that the call does not take; the message lists those that it does.
        CalibrationError: for a value that is not what the argument holds.
    """
    return [replace(one, inputs=_fitted(kind, one)) if isinstance(one, Condition) and one.inputs else one for one in prompts]


def _fitted(kind: type, condition: Condition) -> dict[str, Any]:
    found: dict[str, Any] = {}
    where = f"{condition.where}: " if condition.where else ""
    for name, value in condition.inputs.items():
        argument = _argument(kind, name, where)
        if argument in found:
            raise UnsupportedError(f"{where}'{name}' is a second value for '{argument}' of {kind.__name__}; leave one of them out")
        found[argument] = _checked(argument, value, f"{where}{name}")
    return found


def _argument(kind: type, name: str, where: str) -> str:
    """What the call names a field."""
    taken = [one for one in named_arguments(kind) if one not in OURS and not one.startswith("callback")]
    if name in SHARED:
        raise UnsupportedError(f"{where}'{name}' is the same for all clips of a run; leave it out and give {SHARED[name]}")
    for argument in (name, *ARGUMENTS.get(name, ())):
        controls = argument == "image" and name in CONTROLS  # a pipeline without a ControlNet would take it for its first frame
        if argument in taken and not (controls and CONTROLLED not in taken):
            return argument
    own = [one for one in taken if one not in SHARED]
    near = difflib.get_close_matches(name, own, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ";"
    raise UnsupportedError(f"{where}{kind.__name__} takes no '{name}' for a clip{hint} it takes {', '.join(own) or 'nothing'}")


# ---------------------------------------------------------------------------------------------------------------- values from files


def _checked(argument: str, value: Any, where: str) -> Any:
    """A value that fits its argument; one path of a frame or class stands for a list of it."""
    kind, found = CONDITIONS.get(argument), holds(value)
    if kind is CLASS and not (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        raise CalibrationError(f"{where} is {CLASS.words}, got {value!r:.60}")
    if isinstance(value, str) and (kind is not None or ("prompt" not in argument and Path(value).suffix)):
        raise CalibrationError(
            f"{where}: '{value:.80}' is a text, and {argument} takes {kind.words if kind else 'no file of this kind'}; give {KINDS}"
        )
    if "prompt" in argument and kind is None and not isinstance(value, str):
        raise CalibrationError(f"{where} is a text, got {value!r:.60}")
    if (kind is PICTURE and "frames" in found) or (kind is PICTURE and isinstance(value, list)):
        raise CalibrationError(f"{where}: {_path(value)} holds several pictures, and {argument} takes one; give the one that is meant")
    if kind is FRAMES and found == ["picture"] and not isinstance(value, list) and argument != "reference_images":
        raise CalibrationError(f"{where}: {_path(value)} is one picture, and {argument} takes the frames of a clip; give a clip")
    if kind is FRAMES and found == ["picture"] and not isinstance(value, list):
        return [value]
    if kind in (PICTURE, FRAMES) and not _is_media(kind, value, found):
        raise CalibrationError(f"{where}: {argument} takes {kind.words}, got {value!r:.60}; give {KINDS}")
    return value


def _is_media(kind: Kind | None, value: Any, found: Sequence[str]) -> bool:
    """Whether a value can be pictures at all; values that Python code gives (PIL images, arrays) are for the pipeline to judge."""
    return not isinstance(value, bool | int | float | Mapping) and not (isinstance(value, list) and not found and not _objects(value))


def _objects(values: Sequence[Any]) -> bool:
    return bool(values) and not any(isinstance(one, str | bool | int | float) for one in values)


def _path(value: Any) -> str:
    return f"'{value.path}'" if isinstance(value, Stored) else "the list"
