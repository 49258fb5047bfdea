"""What a verb was asked for: names of arguments and kinds of models are checked before anything is opened."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from reelquant._errors import UnsupportedError, nearest
from reelquant._progress import Progress, Silent
from reelquant._torch_state import stock_torch
from reelquant.api.bars import shown

P = ParamSpec("P")
R = TypeVar("R")
Expects = Callable[[str, Any], None]  # refuses a first argument of another kind, given the name of the verb


def verb(expects: Expects) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A verb of the library: its arguments are checked, torch is as it starts while it runs, and its progress is shown.

    A verb with an argument ``progress`` draws bars of its own if that is None, and none if it is False.

    Args:
        expects: checks the first argument of the verb, which is a pipeline or says where one is.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        first = next(iter(signature.parameters))

        @functools.wraps(function)
        def asked(*args: P.args, **kwargs: P.kwargs) -> R:
            if args or first in kwargs:
                model = args[0] if args else kwargs[first]
                expects(function.__name__, model)
                _check_names(function.__name__, signature.parameters, model, kwargs)
            with ExitStack() as stack:
                stack.enter_context(stock_torch())
                if "progress" in signature.parameters:
                    kwargs["progress"] = _heard(kwargs.get("progress"), stack)
                return function(*args, **kwargs)

        return asked

    return decorate


def _heard(progress: Progress | Literal[False] | None, stack: ExitStack) -> Progress:
    """Who hears how far the verb is."""
    if progress is None:
        return stack.enter_context(shown())
    return progress or Silent()


def _check_names(name: str, own: Mapping[str, inspect.Parameter], model: Any, given: Mapping[str, Any]) -> None:
    """Refuse keywords that neither the verb nor the call of the pipeline takes, with the nearest name of both.

    Raises:
        UnsupportedError: naming the keyword.
    """
    model = model[0] if isinstance(model, list | tuple) and model else model  # of several tests: they are of one class
    passes = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in own.values())
    known = [key for key, one in own.items() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    others = [key for key, value in given.items() if key not in known and (value is not None or not passes)]
    if not others:
        return
    kind, taken = _call(model) if passes else (None, [])
    if passes and taken is None:  # nothing is known of the pipeline before it is opened, which checks its own names
        return
    for other in others:
        if other not in (taken or ()):
            who = f"reelquant.{name} takes" if kind is None else f"{kind.__name__} takes"
            nor = "" if kind is None else f"nor does reelquant.{name}; "
            raise UnsupportedError(f"{who} no argument '{other}'; {nor}{nearest(other, [*known, *(taken or ())])}")


def _call(model: Any) -> tuple[type | None, list[str] | None]:
    """The class of a pipeline, and what its call takes: by its signature, and by what its folder recommends. None if that is not known."""
    from reelquant.models.pipelines import locate, pipeline_class
    from reelquant.models.sampling import call_names, folder_notes, notes

    kind = pipeline_class(model)
    taken = call_names(kind)
    own = folder_notes(locate(model)) if isinstance(model, str | Path) else notes(model)
    return kind, [*taken, *own.get("call", {})] if taken else None


# --- what the first argument may be -----------------------------------------------------------------------------------


def in_memory(name: str, model: Any) -> None:
    """Refuse anything but a pipeline in memory.

    Raises:
        UnsupportedError: saying what was given, and what to write instead.
    """
    if isinstance(model, str | Path):
        raise UnsupportedError(f"{name} takes a pipeline in memory, got '{model}'; open it first: reelquant.open_pipeline('{model}')")
    _refuse_module(name, model)


def anywhere(name: str, model: Any) -> None:
    """Refuse what is neither the place of a pipeline nor a pipeline in memory."""
    if isinstance(model, list | tuple):
        raise UnsupportedError(
            f"{name} takes one pipeline, got {len(model)}; reelquant.evaluate_several takes several of one float pipeline"
        )
    if not isinstance(model, str | Path):
        _refuse_module(name, model)


def each_anywhere(name: str, models: Any) -> None:
    """Refuse anything but a list of places of pipelines and pipelines in memory.

    Raises:
        UnsupportedError: saying what was given.
    """
    if isinstance(models, str | Path) or not isinstance(models, Sequence):
        raise UnsupportedError(f"{name} takes a list of quantized pipelines, got {models!r:.80}; reelquant.evaluate takes one")
    for model in models:
        anywhere(name, model)


def on_disk(name: str, model: Any) -> None:
    """Refuse what does not say where a pipeline is.

    Raises:
        UnsupportedError: saying what was given, and what to write instead.
    """
    if not isinstance(model, str | Path):
        raise UnsupportedError(f"{name} takes the folder, bundled name or hub id of a pipeline, got {_words(model)}{_instead(name)}")


def clips_on_disk(name: str, clips: Any) -> None:
    """Refuse what does not say where clips are."""
    if not isinstance(clips, str | Path):
        raise UnsupportedError(f"{name} takes folders of clips, got {_words(clips)}; reelquant.evaluate takes pipelines")


def model_in_memory(name: str, model: Any) -> None:
    """Refuse what is neither a pipeline in memory nor a module."""
    from torch import nn

    if not isinstance(model, nn.Module):
        in_memory(name, model)


def _refuse_module(name: str, model: Any) -> None:
    from torch import nn

    if isinstance(model, nn.Module):
        kind = type(model).__name__
        raise UnsupportedError(
            f"{name} takes a pipeline, got a bare module ({kind}); give the pipeline that it belongs to, or say how it is sampled: "
            "reelquant.Denoiser(module, sampler)"
        )
    if not (hasattr(model, "components") or hasattr(model, "__dict__")) or isinstance(model, type):
        raise UnsupportedError(f"{name} takes a pipeline, got {_words(model)}; open one: reelquant.open_pipeline('tiny-dit')")


def _words(model: Any) -> str:
    """An object in a few words: pipelines print pages."""
    return f"{model!r:.60}" if isinstance(model, int | float | bool | type(None)) else f"an object of {type(model).__name__}"


def _instead(name: str) -> str:
    """What to write instead where a pipeline in memory was given."""
    other = {"quantize_folder": "reelquant.quantize takes one in memory", "verify": "reelquant.save writes one"}
    return f"; {other.get(name, 'save it first: reelquant.save(pipe, folder)')}"


def check_sides(name: str, sides: Mapping[str, Any], expects: Expects = anywhere) -> None:
    """Check both pipelines of a comparison."""
    for side, model in sides.items():
        expects(f"{side} of {name}", model)
