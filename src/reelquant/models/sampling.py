"""Run any diffusers pipeline the same way: texts and conditions in, clips or latents out, one seed per clip."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from reelquant._errors import CalibrationError, CheckpointError, ReelQuantError, UnsupportedError, nearest
from reelquant._remarks import remark
from reelquant.models.blank import read_json
from reelquant.models.condition import Prompts, fitted, texts_of
from reelquant.models.conditions import CONDITIONS, Clips, at_once, check_given, check_texts, lacking, own_noise, reads_texts, unspoken

FEW = 4  # steps in which both experts of a pipeline are called
MOST = {"num_frames": 10_000, "height": 2**14, "width": 2**14, "num_inference_steps": 10_000, "fps": 10_000}  # of a call
NOTES_FILE = "reelquant.json"  # beside model_index.json: {"call": {recommended arguments}, "prompts": [calibration texts]}


def notes(pipe: Any) -> dict[str, Any]:
    """What the pipeline's folder says about itself in ``reelquant.json``; empty if it says nothing."""
    return folder_notes(str(pipe.config.get("_name_or_path", "")))


def folder_notes(folder: str | Path) -> dict[str, Any]:
    """The ``reelquant.json`` of a pipeline folder; empty if there is none.

    Raises:
        CheckpointError: if it cannot be read, or is not what :func:`write_notes` writes.
    """
    file = Path(folder) / NOTES_FILE
    if not str(folder) or not file.is_file():
        return {}
    found = read_json(file)
    kinds = {"call": ("a mapping of arguments", dict), "prompts": ("a list of texts", list)}
    for key, (words, kind) in kinds.items():
        value = found.get(key, kind())
        if not isinstance(value, kind) or (kind is list and not all(isinstance(one, str) for one in value)):
            raise CheckpointError(f"'{file}': '{key}' is {words}, got {value!r:.60}; correct or delete it")
    return found


def write_notes(folder: str | Path, call: dict[str, Any], prompts: Sequence[str]) -> None:
    """Leave ``reelquant.json`` in a pipeline folder: the arguments it samples best with, and texts to calibrate it on."""
    Path(folder, NOTES_FILE).write_text(json.dumps({"call": call, "prompts": list(prompts)}, indent=2) + "\n", encoding="utf-8")


def call_arguments(pipe: Any, **overrides: Any) -> dict[str, Any]:
    """Arguments for one call: the folder's recommendations, as far as the pipeline takes them, then overrides that are not None.

    Raises:
        UnsupportedError: for an override that the pipeline does not take; the message gives the nearest name.
    """
    own = notes(pipe).get("call", {})
    wanted = {key: value for key, value in overrides.items() if value is not None}
    accepted = check_call(type(pipe), [key for key in wanted if key not in own])
    return {key: value for key, value in (own | wanted).items() if key in accepted}


def check_call(kind: type, names: Iterable[str]) -> list[str]:
    """The names of the arguments that a class of pipelines takes.

    Raises:
        UnsupportedError: if one that is wanted is not among them; it would be dropped without a word.
    """
    accepted = call_names(kind)
    for name in names:
        if name not in accepted:
            raise UnsupportedError(f"{kind.__name__} takes no argument '{name}'; {nearest(name, accepted)}")
    return accepted


def call_names(kind: type) -> list[str]:
    """The names of the arguments that a class of pipelines takes; none if it cannot be called (a base class)."""
    return [name for name, p in inspect.signature(kind.__call__).parameters.items() if p.kind in _NAMED and name != "self"]


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Turns(Protocol):
    """Decides which calls of the pipeline this process makes. Several processes may share the clips of one :func:`sample`."""

    def turn(self) -> AbstractContextManager[bool]:
        """The next call of the pipeline happens inside, if this is true; else it is left out."""
        ...

    def run(self, number: int) -> None:
        """Hears, before the sampler runs, the number of the run among all of this :func:`sample`, those that are left out included."""
        ...

    @property
    def partial(self) -> bool:
        """Whether calls may be left out: what :func:`sample` gives is then of no use to who asked for it."""
        ...

    @property
    def heard(self) -> bool:
        """Whether the steps of the present turn are told to who listens for progress."""
        ...


class EveryTurn:
    """A :class:`Turns` of a process that makes all calls."""

    def turn(self) -> AbstractContextManager[bool]:
        """Every call is made."""
        return nullcontext(True)

    def run(self, number: int) -> None:
        """Ignored."""

    partial, heard = False, True


_turns: ContextVar[Turns | None] = ContextVar("reelquant_turns", default=None)


def _present() -> Turns:
    return _turns.get() or EveryTurn()


def partial() -> bool:
    """Whether calls of the pipeline may be left out at present."""
    return _present().partial


@contextmanager
def taking(turns: Turns) -> Iterator[None]:
    """Inside, these decide which calls are made; :func:`sample` then gives the clips of those, or an empty tensor."""
    token = _turns.set(turns)
    try:
        yield
    finally:
        _turns.reset(token)


@torch.no_grad()
def sample(
    pipe: Any,
    prompts: Prompts,
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    first: int = 0,
    batch: int = 4,
    output: Literal["frames", "latent"] = "frames",
    on_step: Callable[[], None] | None = None,
    on_latents: Callable[[int, Tensor], None] | None = None,
    **overrides: Any,
) -> Tensor:
    """Sample one clip per prompt; clip ``i`` starts from the noise of seed ``seed + i``, for every batch size.

    Args:
        pipe: a diffusers pipeline.
        prompts: one text per clip, or one :class:`~reelquant.models.condition.Condition`; empty texts where the pipeline takes none.
        seed: seed of the first clip.
        seeds: one per clip instead.
        first: the number of the first clip among all that are made, which says where lists of conditions begin.
        batch: clips per pipeline call, at most; see :mod:`reelquant.models.conditions`.
        output: ``frames`` gives ``[clips, frames, 3, height, width]`` in [0, 1], ``latent`` the final latents.
        on_step: told after every denoising step (progress).
        on_latents: given the index of the step (from 0 in every pipeline call) and the latents after it, a clip per row; never
            called by pipelines that have no step callback.
        overrides: arguments of the pipeline call, for example ``num_inference_steps``, ``guidance_scale``, ``num_frames``; and conditions,
            for example ``image``: one for every clip, or a list with one per clip.

    Raises:
        CalibrationError: if there is no prompt, or a condition is missing.
        UnsupportedError: for a text or an argument that the pipeline does not take.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not prompts:
        raise CalibrationError("no prompts: give at least one text")
    seeds = range(seed, seed + len(prompts)) if seeds is None else seeds
    for one in seeds:
        if not -(2**63) <= one < 2**64:
            raise CalibrationError(f"seed {one:.3e} does not fit into 64 bits; choose a smaller one")
    arguments = call_arguments(pipe, **overrides)
    for name, most in MOST.items():
        if isinstance(value := arguments.get(name), int | float) and not value <= most:
            raise CalibrationError(f"{name} is at most {most}, got {value:.4g}; the clip would not fit into any memory")
    for name, value in arguments.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise CalibrationError(f"{name} is a finite number, got {value}")
    check_texts(type(pipe), texts_of(prompts))
    prompts = fitted(type(pipe), prompts)
    check_given(type(pipe), arguments, prompts)
    if reads_texts(type(pipe), arguments, prompts) and any(not text for text in texts_of(prompts)):
        remark(f"{type(pipe).__name__} takes a prompt; clips whose condition has none are made from an empty one")
    clips, size = Clips.of(prompts, seeds, arguments, first), at_once(type(pipe), arguments, batch, prompts)
    settings = {name: value for name, value in arguments.items() if name not in CONDITIONS and name not in clips.conditions}
    settings |= {"output_type": "latent" if output == "latent" else "pt", **_callback(pipe, on_step, on_latents)}
    with quiet(pipe), _failing(pipe, arguments), _listening(pipe) if output == "latent" else nullcontext():
        made = _together(_made(pipe, clips, size, settings), type(pipe).__name__)
    if output == "frames" and made.numel():
        _tell_sizes(type(pipe).__name__, made, overrides)
    return made


@contextmanager
def _failing(pipe: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Inside, what torch says when a pipeline is called with sizes that do not fit it names the call."""
    try:
        yield
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # ours, out of memory, not implemented, dynamo's
            raise
        given = ", ".join(f"{name}={value}" for name, value in arguments.items() if isinstance(value, int | float)) or "its own defaults"
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise CalibrationError(
            f"{type(pipe).__name__} fails when it is called with {given}: {reason:.300}; other sizes or frames may fit it"
        ) from error


def _together(parts: Sequence[Tensor], pipeline: str) -> Tensor:
    """All clips as one tensor.

    Raises:
        CalibrationError: if they are not equal in size; conditions can decide on it.
    """
    other = next((part for part in parts if part.shape[1:] != parts[0].shape[1:]), None)
    if other is not None:
        sizes = " and ".join(str(list(part.shape[1:])) for part in (parts[0], other))
        raise CalibrationError(
            f"{pipeline} made clips or latents of {sizes} from the conditions of one run; give conditions of one kind and size together"
        )
    return torch.cat(list(parts)) if parts else torch.empty(0)


def _made(pipe: Any, clips: Clips, size: int, settings: Mapping[str, Any]) -> list[Tensor]:
    """Clips of every call that is this process's turn. If the pipeline itself refuses lists, it is called with one clip at a time."""
    alone, turns, made = size == 1 and bool(clips.conditions), _present(), list[Tensor]()
    for number, part in enumerate(clips.cut(size)):
        with turns.turn() as due:
            if not due:
                continue
            if not alone:
                turns.run(number)
                try:
                    made.append(_called(pipe, part, settings, alone=False))
                    continue
                except (ValueError, TypeError) as error:
                    if _refused_in(pipe, error) is None:
                        raise
                    alone = True
            for place, one in enumerate(part.cut(1)):
                turns.run(number * size + place)
                with refusing(pipe):
                    made.append(_called(pipe, one, settings, alone=True))
    return made


def _called(pipe: Any, clips: Clips, settings: Mapping[str, Any], *, alone: bool) -> Tensor:
    """The clips of one call. What fails inside the pipeline may lack a condition that has a default; then the error says so."""
    try:
        with own_noise(clips):
            return _tensor(pipe(**clips.call(type(pipe), alone=alone), **settings))
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        better = unspoken(pipe, clips.conditions, error)
        better = better or lacking(type(pipe), clips.conditions, error, refused=_refused_in(pipe, error) is not None)
        if isinstance(error, ReelQuantError) or better is None:
            raise
        raise better from error


def _refused_in(pipe: Any, error: Exception) -> str | None:
    """The method of the pipeline that raised an error itself; None if what it calls did."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last.tb_frame.f_code.co_name if last is not None and last.tb_frame.f_locals.get("self") is pipe else None


def _tell_sizes(pipeline: str, made: Tensor, wanted: Mapping[str, Any]) -> None:
    """Warn of sizes that the pipeline rounded to others."""
    for name, axis in _AXES.items():
        if made.ndim + axis >= 0 and wanted.get(name) not in (None, made.shape[axis]):
            made_, sizes = made.shape[axis], "its VAE takes certain sizes only"
            remark(f"{pipeline} was asked for {name}={wanted[name]} and made {made_}: {sizes}")


_AXES = {"num_frames": -4, "height": -2, "width": -1}  # argument of a call -> axis of the clips that it makes


class _Heard(logging.Handler):
    """What a pipeline says of the call, as a remark of ours."""

    def __init__(self, pipeline: str) -> None:
        super().__init__(logging.WARNING)
        self.pipeline = pipeline

    def emit(self, record: logging.LogRecord) -> None:
        remark(f"{self.pipeline}: {' '.join(record.getMessage().split()):.300}")


@contextmanager
def _listening(pipe: Any) -> Iterator[None]:
    """Pass on what a pipeline logs about the call, such as sizes that it rounds: latents do not tell the size of their clip.

    diffusers' own level is set aside, which the command line raises, and so is its way to the screen: it is said once.
    """
    heard = _Heard(type(pipe).__name__)
    names = {kind.__module__ for kind in type(pipe).__mro__ if kind.__module__.startswith("diffusers.")}
    loggers = [logging.getLogger(name) for name in sorted(names)]
    before = [(one, one.level, one.propagate) for one in loggers]
    for one in loggers:
        one.addHandler(heard)
        one.setLevel(logging.WARNING)
        one.propagate = False
    try:
        yield
    finally:
        for one, level, propagate in before:
            one.removeHandler(heard)
            one.setLevel(level)
            one.propagate = propagate


class _Called(Exception):  # noqa: N818
    """The component was called: no error, but the way out of a pipeline."""


def first_call(pipe: Any, module: torch.nn.Module, prompts: Prompts, **overrides: Any) -> tuple[tuple, dict[str, Any]] | None:
    """Positional and keyword arguments of the first call of a component while the pipeline samples; None if it is not called.

    Args:
        pipe: a diffusers pipeline.
        module: the component.
        prompts, overrides: as in :func:`sample`, of which not more than :data:`FEW` steps are run.
    """
    seen: list[tuple[tuple, dict[str, Any]]] = []

    def stop(_module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Called

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        sample(pipe, prompts, output="latent", **overrides | {"num_inference_steps": FEW})
    except _Called:
        pass
    finally:
        handle.remove()
    return seen[0] if seen else None


def _callback(pipe: Any, on_step: Callable[[], None] | None, on_latents: Callable[[int, Tensor], None] | None) -> dict[str, Any]:
    """Arguments that make the pipeline report its steps; empty without a listener, or if the pipeline has no step callback."""
    if on_step is None and on_latents is None:
        return {}

    def told(step: int, latents: Tensor | None) -> None:
        if on_step is not None and _present().heard:
            on_step()
        if on_latents is not None and latents is not None:
            on_latents(step, latents)

    def at_step_end(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        told(step, kwargs.get("latents"))
        return kwargs

    ways = {  # argument of the call -> what to pass
        "callback_on_step_end": {"callback_on_step_end": at_step_end},
        "callback": {"callback": lambda step, timestep, latents: told(step, latents)},  # pipelines of old
    }
    accepted = inspect.signature(pipe.__call__).parameters
    return next((way for name, way in ways.items() if name in accepted), {})


def _tensor(result: Any) -> Tensor:
    frames = result.frames if hasattr(result, "frames") else result.images
    if isinstance(frames, np.ndarray):  # pipelines of old give channels last, whatever they are asked for
        return torch.from_numpy(frames).movedim(-1, -3)
    return frames if isinstance(frames, Tensor) else torch.stack(list(frames))


@contextmanager
def refusing(pipe: Any) -> Iterator[None]:
    """Inside, what a pipeline itself refuses of its arguments is an error of ours, with the pipeline's own words."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if isinstance(error, ReelQuantError) or _refused_in(pipe, error) != "check_inputs":
            raise
        raise CalibrationError(f"{type(pipe).__name__} refuses the call: {error}") from error


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Silence the pipeline's own progress bar."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe._progress_bar_config = before or {}
