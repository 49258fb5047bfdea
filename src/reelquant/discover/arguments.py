"""What the arguments of a denoiser mean, and changing one kind of them at a time."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError

Kind = Literal["latent", "timestep", "prompt", "image", "other"]
KINDS: tuple[Kind, ...] = ("latent", "timestep", "prompt", "image", "other")
Path = tuple[str | int, ...]

# First match wins, so the narrow ones come first: `img_ids` is a position, `encoder_hidden_states_image` a picture.
_NAMES: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("other", re.compile(r"ids$|rotary|rope|coords|indicator|guidance|fps|resolution|aspect|crop|timestep_cond|scale")),
    ("timestep", re.compile(r"^(audio_)?(timesteps?|time_steps?|timestep_r|r_timestep|sigmas?|time|t)$")),
    ("image", re.compile(r"image|img|control|vace|pose|face|vit_|siglip")),
    ("prompt", re.compile(r"encoder_hidden_states|encoder_attention_mask|prompt|text|txt|caption|cap_|pooled|context|class_labels")),
    ("latent", re.compile(r"^(audio_)?(hidden_states|sample|latents?|x)$")),
)


def kind_of(path: Path) -> Kind:
    """Kind of an argument by name; inside a nested argument the innermost telling name decides.

    Example:
        >>> kind_of(("added_cond_kwargs", "text_embeds")), kind_of(("added_cond_kwargs", "time_ids"))
        ('prompt', 'other')
    """
    for part in reversed(path):
        for kind, pattern in _NAMES:
            if isinstance(part, str) and pattern.search(part):
                return kind
    return "other"


OWN = "reelquant_arguments"  # attribute of a module that came without a pipeline: kind by the name of an argument of its forward


def own_kinds(module: nn.Module) -> dict[str, Kind] | None:
    """What is known of the arguments of a module that came without a pipeline, beside their names; None for other modules."""
    return vars(module).get(OWN)


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every tensor and number in nested arguments with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    elif isinstance(value, Tensor | int | float) and not isinstance(value, bool):
        yield path, value


def kinds(inputs: dict[str, Any], own: Mapping[str, Kind] | None = None) -> dict[Path, Kind]:
    """Kind of every leaf that can be perturbed: all tensors, and a timestep given as a plain number.

    Args:
        inputs: the arguments of a call by name.
        own: kinds of arguments that their names do not tell; see :func:`own_kinds`.

    Raises:
        UnsupportedError: if no argument can be the latent.
    """
    values = dict(leaves(inputs))
    known = own or {}
    found: dict[Path, Kind] = {path: known.get(str(path[0])) or kind_of(path) for path in values}
    found = {path: kind for path, kind in found.items() if isinstance(values[path], Tensor) or kind == "timestep"}
    if "latent" not in found.values():
        found[_latent_by_shape(values, found)] = "latent"
    return found


def _latent_by_shape(values: dict[Path, Any], found: dict[Path, Kind]) -> Path:
    for path, kind in found.items():
        if kind == "other" and values[path].is_floating_point() and values[path].ndim >= 3:
            return path
    names = ", ".join(".".join(map(str, path)) for path in values)
    raise UnsupportedError(
        f"no argument of the denoiser looks like the latent; arguments seen: {names or 'none'}; tried the names hidden_states, sample, "
        "latent, x, then any unnamed float tensor of three or more dimensions; pass inputs= with the arguments of one real call by name"
    )


def argument_of(found: dict[Path, Kind], kind: Kind) -> str | None:
    """Name of the (first) forward argument of this kind."""
    return next((str(path[0]) for path, its in found.items() if its == kind), None)


def perturbed(inputs: dict[str, Any], found: dict[Path, Kind], kind: Kind) -> dict[str, Any]:
    """The same inputs with every leaf of one kind changed."""
    return _rebuild(inputs, (), {path for path, its in found.items() if its == kind})


def _rebuild(value: Any, path: Path, change: set[Path]) -> Any:
    if path in change:
        return _changed(value)
    if isinstance(value, dict):
        return {key: _rebuild(item, (*path, key), change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_rebuild(item, (*path, index), change) for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _changed(value: Any) -> Any:
    """Different values, same dtype and shape, still legal: masks stay masks, timesteps stay in the schedule's range."""
    if not isinstance(value, Tensor):
        return type(value)(value / 2) if value else type(value)(1)
    if value.dtype == torch.bool or _is_mask(value):
        flipped = value.clone()
        last = flipped[..., -1] if value.ndim else flipped
        last.copy_(last == 0)
        return flipped
    if not value.is_floating_point():
        return torch.where(value > 1, value // 2, value + 1)
    if value.ndim < 2:
        return torch.where(value != 0, value / 2, torch.full_like(value, 0.5))
    return value + _noise_for(value)


def _is_mask(value: Tensor) -> bool:
    return value.ndim >= 2 and bool(((value == 0) | (value == 1)).all()) and value.shape[-1] > 1 and bool((value == 1).any())


def _noise_for(value: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    spread = value.float().std() if value.numel() > 1 else value.float().abs().mean()
    noise = torch.randn(value.shape, generator=generator).to(value.device)
    return (noise * (spread if spread > 0 else 1.0)).to(value.dtype)


def bind(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of one recorded call as keywords, whatever was passed by position.

    Raises:
        UnsupportedError: if they do not fit the signature of the forward.
    """
    try:
        bound = inspect.signature(denoiser.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UnsupportedError(f"the recorded call does not fit {type(denoiser).__name__}.forward: {error}") from error
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        spread = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        named |= value if spread else {name: value}
    return named
