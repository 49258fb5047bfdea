"""A module without a pipeline, and the user's own loop around it, in the form of a small pipeline."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from reelquant._errors import CalibrationError, UnsupportedError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

COMPONENT = "denoiser"
CALLS = 8  # of the module, that are looked at: four steps with guidance in a second call
ROLES: dict[str, tuple[str, ...]] = {  # what the library calls an argument of a sampler -> what samplers call it
    "prompt": ("prompt", "text", "caption"),
    "generator": ("generator", "rng"),
    "num_inference_steps": ("num_inference_steps", "num_steps", "steps", "num_sampling_steps", "sampling_steps"),
}
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Denoiser:
    """A module of one's own, to quantize like the denoiser of a pipeline; docs/own-modules.md.

    Args:
        module: takes a latent and a timestep, under any names; in ``eval`` mode.
        sampler: makes one clip: ``sampler(module, prompt, generator, ...)`` returns its final latents. It gets what it has arguments for:
            the module first; ``prompt`` (or ``text``, ``caption``), one text; ``generator`` (or ``rng``), which all noise must come
            from; ``num_inference_steps`` (or ``num_steps``, ``steps``, ``sampling_steps``). Others are arguments of every verb that
            samples; conditions (``class_labels``, ``image`` ...) are one clip's.
        decode: latents -> frames ``[frames, 3, height, width]`` in [0, 1]; :func:`reelquant.evaluate` needs it.
        arguments: what arguments of the module's forward mean, where neither name nor values tell: ``{"idx": "timestep"}``. Meanings:
            ``latent``, ``timestep``, ``prompt``, ``image``, ``other``.

    Raises:
        UnsupportedError: if the sampler has no argument for the module or the generator, or ``arguments`` names what is not there.

    Example:
        >>> own = reelquant.Denoiser(model, sampler)
        >>> report = reelquant.quantize(own, "qvd-w8a8", ["a red ball", "a boat"])
        >>> reelquant.save(own, "out", report)
        >>> reelquant.load_denoiser("out", MyModel())
    """

    CLIPS_AT_ONCE: ClassVar[int] = 1

    def __new__(
        cls,
        module: nn.Module,
        sampler: Callable[..., Any],
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Denoiser:
        """Verbs read off the signature of a pipeline's call what it takes, so every sampler makes a class of its own."""
        return object.__new__(type("Denoiser", (cls,), {"__call__": _call(sampler)}))

    def __init__(
        self,
        module: nn.Module,
        sampler: Callable[..., Any],
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        from reelquant.discover.arguments import OWN
        from reelquant.discover.components import plain

        self.denoiser, self.sampler, self.decode = module, sampler, decode
        self.config: dict[str, Any] = {}
        self.given = dict(arguments or {})
        inner = plain(module)
        _check_given(inner, self.given)
        setattr(inner, OWN, getattr(inner, OWN, {}) | self.given)

    @property
    def components(self) -> dict[str, Any]:
        """The module, as pipelines list their parts."""
        return {COMPONENT: self.denoiser}

    def to(self, *args: Any, **kwargs: Any) -> Denoiser:
        """Move or cast the module."""
        self.denoiser.to(*args, **kwargs)
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        """There is none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Denoiser:
        return Denoiser(copy.deepcopy(self.denoiser, memo), self.sampler, decode=self.decode, arguments=self.given)

    def learn(self, prompts: Sequence[Any], call: Mapping[str, Any]) -> dict[str, Any]:
        """Find out what the arguments of the module mean, by the first calls that the sampler makes for two clips.

        Args:
            prompts: texts; the first and one that differs from it are sampled.
            call: further arguments of the sampler.

        Returns:
            The arguments of the first call, by name.

        Raises:
            UnsupportedError: if nothing looks like the timestep or the latent, or the module is not called.
        """
        from reelquant.discover.arguments import OWN, bind
        from reelquant.discover.components import plain
        from reelquant.discover.learned import learned
        from reelquant.models.pipelines import calibration_prompts
        from reelquant.nn.around.routed import keep_if_used, route

        module = plain(self.denoiser)
        texts = list(prompts) or calibration_prompts(self, 2)
        second = next((text for text in texts if text != texts[0]), texts[0])
        route(module)
        try:
            clips = [[bind(module, *one) for one in _calls(self, module, text, i, call)] for i, text in enumerate((texts[0], second))]
        finally:
            keep_if_used(module)
        setattr(module, OWN, learned(*clips, self.given, type(module).__name__))
        return clips[0][0]


def _check_given(module: nn.Module, given: Mapping[str, Any]) -> None:
    from reelquant.discover.arguments import KINDS

    parameters = inspect.signature(module.forward).parameters
    names = [name for name, one in parameters.items() if one.kind in _NAMED]
    if positional := next((name for name, one in parameters.items() if one.kind not in (*_NAMED, inspect.Parameter.VAR_KEYWORD)), None):
        raise UnsupportedError(
            f"{type(module).__name__}.forward takes '{positional}' by position only, so what it means cannot be told by name; wrap "
            "the module in one whose forward names its arguments"
        )
    for name, kind in given.items():
        if name not in names:
            raise UnsupportedError(f"{type(module).__name__}.forward has no argument '{name}'; {nearest(name, names)}")
        if kind not in KINDS:
            raise UnsupportedError(f"arguments[{name!r}] is {kind!r}; {nearest(str(kind), KINDS)}")


class _Enough(BaseException):
    """Enough calls were seen: no error, but the way out of a sampler, also of one that catches exceptions."""


def _calls(pipe: Denoiser, module: nn.Module, text: Any, number: int, call: Mapping[str, Any]) -> list[tuple[tuple, dict[str, Any]]]:
    """Arguments of the first calls of the module for one clip, by position and by name, as they were then."""
    import torch
    from torch.utils._pytree import tree_map

    from reelquant.models.sampling import sample

    seen: list[Any] = []

    def remember(_module: nn.Module, *arguments: Any) -> None:
        seen.append(tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, arguments))
        if len(seen) == CALLS:
            raise _Enough

    handle = module.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        sample(pipe, [text], seeds=[0], first=number, output="latent", **call)
    except _Enough:
        pass
    finally:
        handle.remove()
    if not seen:
        raise UnsupportedError(
            f"the sampler never called {type(module).__name__} as module(...): it got the module to call as its first argument"
        )
    return seen


# --------------------------------------------------------------------------------------------------------------------- the call
def _call(sampler: Callable[..., Any]) -> Callable[..., Any]:
    """The ``__call__`` of a pipeline that makes its clips by a sampler, with a signature that says what the sampler takes."""
    names = _names(sampler)

    def call(self: Denoiser, **given: Any) -> SimpleNamespace:
        frames = given.pop("output_type", "latent") != "latent"
        noise = given.get("generator")
        count = len(noise) if isinstance(noise, list) else 1
        clips = [_clip(self, {names[name]: _of_clip(name, value, i) for name, value in given.items()}) for i in range(count)]
        return SimpleNamespace(frames=_together([_decoded(self, clip) for clip in clips] if frames else clips))

    parameters = inspect.signature(sampler).parameters
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None if name in ROLES else parameters[theirs].default)
        for name, theirs in names.items()
    ]
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    output = inspect.Parameter("output_type", inspect.Parameter.KEYWORD_ONLY, default="latent")
    call.__signature__ = inspect.Signature([this, *own, output])  # pyright: ignore[reportFunctionMemberAccess]
    return call


def _names(sampler: Callable[..., Any]) -> dict[str, str]:
    """The library's name of every argument of a sampler but the module, and the sampler's own."""
    if not callable(sampler):
        raise UnsupportedError(f"sampler is a function (module, prompt, generator) -> latents of one clip, got {sampler!r:.60}")
    taken = [name for name, one in inspect.signature(sampler).parameters.items() if one.kind in _NAMED]
    if not taken:
        raise UnsupportedError("the sampler takes no argument; its first one must be the module, as sampler(module, prompt, generator)")
    roles = {theirs: role for role, known in ROLES.items() for theirs in known}
    found = {roles.get(name, name): name for name in reversed(taken[1:])}
    if "generator" not in found:
        raise UnsupportedError(
            f"the sampler takes {', '.join(taken)} and no generator; give it an argument 'generator' and draw all noise from it, "
            "or no two runs could be compared"
        )
    return {name: found[name] for name in reversed(found)}


def _of_clip(name: str, value: Any, i: int) -> Any:
    """One clip's text and noise of those of several; its condition as it was given."""
    from reelquant.models.conditions import CONDITIONS, PICTURE

    if name in ("prompt", "generator"):
        return value[i] if isinstance(value, list) else value
    if name not in CONDITIONS or value is None:
        return value
    batched = CONDITIONS[name].listed or (CONDITIONS[name] is PICTURE and getattr(value, "ndim", 0) > 3)
    return value[0] if batched else value


def _clip(pipe: Denoiser, given: Mapping[str, Any]) -> Tensor:
    """What the sampler returns for one clip, with an axis of clips.

    Raises:
        CalibrationError: if it is not a tensor.
    """
    import torch

    made = pipe.sampler(pipe.denoiser, **given)
    if not isinstance(made, torch.Tensor) or made.ndim < 2:
        what = f"a tensor {list(made.shape)}" if isinstance(made, torch.Tensor) else f"{type(made).__name__}"
        raise CalibrationError(f"the sampler returns {what}; it must return the final latents of one clip as a tensor")
    return made if len(made) == 1 else made[None]


def _decoded(pipe: Denoiser, latents: Tensor) -> Tensor:
    """Frames of one clip, with an axis of clips."""
    if pipe.decode is None:
        raise UnsupportedError(
            "clips are wanted, and this Denoiser makes latents only; pass decode=, latents -> frames [frames, 3, h, w] in [0, 1]"
        )
    frames = pipe.decode(latents)
    frames = frames[0] if frames.ndim == 5 else frames
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise CalibrationError(f"decode returns a tensor {list(frames.shape)}; it must be [frames, 3, height, width] in [0, 1]")
    return frames[None]


def _together(clips: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat(list(clips))
