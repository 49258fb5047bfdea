"""One clip that is made without computing it: the stock pipeline runs, and each of its models runs on the meta device.

So a plan needs no formula for any family: sizes of latents, lengths of texts, calls per step and what the VAE does with a clip are those of
the pipeline itself. What models return to it are zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from reelquant._errors import ReelQuantError, UnsupportedError
from reelquant.clock import timestep_reader
from reelquant.models.blank import CLASS
from reelquant.models.compat import bridged
from reelquant.models.conditions import reads_texts
from reelquant.models.defaults import missing
from reelquant.models.pipelines import calibration_prompts, cannot_open, dropped
from reelquant.models.sampling import FEW, call_arguments, sample
from reelquant.planning.parts import Part, as_modules
from reelquant.planning.trace import NONE, Rounding, Trace, to_meta, traced
from reelquant.streaming import Source

METHODS = ("encode", "decode")


@dataclass(frozen=True, eq=False)
class Scene:
    """What one method of a component was called with first.

    Attributes:
        model: the component.
        method: its name; ``forward`` of all but VAEs.
        arguments, options: positional and keyword arguments, on the meta device.
    """

    model: nn.Module
    method: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    @torch.no_grad()
    def trace(self, rounding: Rounding = NONE) -> Trace:
        """Follow the call again."""
        with traced(self.model, rounding) as trace:
            getattr(self.model, self.method)(*self.arguments, **self.options)
        return trace


@dataclass
class Rehearsal:
    """A clip that was rehearsed.

    Attributes:
        steps: denoising steps that the pipeline takes for it.
        clip: frames, height and width; empty if the pipeline decodes nothing.
        scenes: by component and method.
        calls: how often each denoiser is called in a step, mean over the steps.
        most: how often in a step at which it is called: one of two experts is not called at every step.
        failed: components whose call could not be followed, and why.
    """

    steps: int = 0
    clip: tuple[int, ...] = ()
    scenes: dict[tuple[str, str], Scene] = field(default_factory=dict)
    calls: dict[str, float] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def scenes_of(self, name: str) -> list[Scene]:
        """Those of a component."""
        return [scene for (owner, _), scene in self.scenes.items() if owner == name]


class _Done(Exception):  # noqa: N818
    """The clip would be decoded now: no error, but the way out of a pipeline."""


def rehearse(source: Source, parts: Mapping[str, Part], call: Mapping[str, Any]) -> Rehearsal:
    """Run a pipeline on the meta device.

    Args:
        source: its folder.
        parts: its components.
        call: arguments of the pipeline call.

    Raises:
        CheckpointError: if the pipeline cannot be put together.
        UnsupportedError: if it cannot be followed on the meta device: a model looks at numbers.
        CalibrationError: for sizes that it refuses.
    """
    pipe = _open(source, parts)
    texts = calibration_prompts(pipe, 1) if reads_texts(type(pipe), call) else [""]
    given = dict(call) | {name: values[0] for name, values in missing(pipe, texts, call).items()}
    seen, counted = Rehearsal(), Counter[str]()
    with _on_meta(parts, seen, counted):
        try:
            sample(pipe, texts, **given | {"num_inference_steps": FEW})
        except _Done:
            pass
        except ReelQuantError:
            raise
        except Exception as error:
            raise _unfollowed(pipe, seen, error) from error
    seen.steps = int(call_arguments(pipe, **dict(call)).get("num_inference_steps") or _usual_steps(pipe))
    seen.calls = {name: counted[name] / FEW for name, part in parts.items() if part.denoises}
    return seen


def _usual_steps(pipe: Any) -> int:
    import inspect

    default = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    return default.default if default is not None and isinstance(default.default, int) else 50


def _unfollowed(pipe: Any, seen: Rehearsal, error: Exception) -> UnsupportedError:
    where = next(reversed(seen.failed), type(pipe).__name__)
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UnsupportedError(
        f"{type(pipe).__name__} cannot be planned: '{where}' does not run without its numbers ({type(error).__name__}: {reason:.200}); "
        "measure it instead: reelquant benchmark"
    )


def _open(source: Source, parts: Mapping[str, Part]) -> Any:
    """The stock pipeline around models without weights; it takes itself to be on the CPU."""
    import diffusers

    kind = getattr(diffusers, str(source.index.get(CLASS)), diffusers.DiffusionPipeline)
    try:
        pipe = kind.from_pretrained(source.folder, dtype=source.dtype, **as_modules(parts), **dropped(source.folder))
    except Exception as error:
        raise cannot_open(source.folder, error) from error
    here = property(lambda self: torch.device("cpu"))
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {"device": here, "_execution_device": here})
    return bridged(pipe)


@contextmanager
def _on_meta(parts: Mapping[str, Part], seen: Rehearsal, counted: Counter[str]) -> Iterator[None]:
    """Inside, models compute on the meta device and give zeros."""
    placed: list[tuple[nn.Module, str]] = []
    try:
        for part in parts.values():
            for method in METHODS if part.kind == "vae" else ("forward",):
                if hasattr(part.model, method):
                    setattr(part.model, method, _followed(part, method, seen, counted))
                    placed.append((part.model, method))
        yield
    finally:
        for model, method in placed:
            delattr(model, method)


def _followed(part: Part, method: str, seen: Rehearsal, counted: Counter[str]) -> Callable[..., Any]:
    original, answers = getattr(part.model, method), dict[str, Any]()
    argument = part.map.timestep_argument if part.denoises else None
    timestep = timestep_reader(part.model, argument) if argument is not None else lambda args, kwargs: None
    in_step = Counter[str]()

    @torch.no_grad()
    def run(*args: Any, **kwargs: Any) -> Any:
        counted[part.name] += 1
        if part.denoises:
            in_step[str(timestep(args, kwargs))] += 1
            seen.most[part.name] = max(in_step.values())
        given, options = to_meta(args), to_meta(kwargs)
        shapes = str(tree_map(lambda one: (one.shape, one.dtype) if isinstance(one, Tensor) else one, (given, options)))
        if part.denoises and shapes in answers:  # the steps are alike
            return _zeros(answers[shapes])
        seen.failed[part.name] = method
        with traced(part.model):
            made = original(*given, **options)
        answers[shapes] = made
        del seen.failed[part.name]
        seen.scenes.setdefault((part.name, method), Scene(part.model, method, given, options))
        if method == "decode":
            seen.clip = _clip(made)
            raise _Done
        return _zeros(made)

    return run


def _clip(made: Any) -> tuple[int, ...]:
    frames = made[0] if isinstance(made, tuple) else made.sample
    batch = frames.shape[0]
    return (frames.shape[2] if frames.ndim == 5 else batch, *frames.shape[-2:])


def _zeros(made: Any) -> Any:
    """What a model gave, with zeros for numbers. Distributions of VAEs are objects that hold tensors."""

    def real(one: Any) -> Any:
        if isinstance(one, Tensor) and one.is_meta:
            return torch.zeros(one.shape, dtype=one.dtype)
        if type(one).__name__.endswith("Distribution"):
            vars(one).update({key: real(value) for key, value in vars(one).items()})
        return one

    return tree_map(real, made)
