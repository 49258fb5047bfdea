"""Which components of a pipeline denoise."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from reelquant._errors import UnsupportedError
from reelquant.discover.arguments import kind_of

_FIRST = ("transformer", "transformer_2", "unet")


def denoisers_of(pipeline: Any) -> dict[str, nn.Module]:
    """Every component that takes a latent and a timestep, by component name; two for pipelines with two experts (Wan 2.2).

    Raises:
        UnsupportedError: if there is none.
    """
    components = getattr(pipeline, "components", None) or vars(pipeline)
    found = {name: part for name, part in components.items() if isinstance(part, nn.Module) and denoises(part)}
    if not found:
        raise UnsupportedError(
            f"{type(pipeline).__name__} has no denoiser: none of its components ({', '.join(components)}) takes both a latent and a "
            "timestep; pass the module itself"
        )
    return dict(sorted(found.items(), key=lambda item: _FIRST.index(item[0]) if item[0] in _FIRST else len(_FIRST)))


def denoiser_of(pipeline: Any) -> tuple[str, nn.Module]:
    """Component name and module of the (first) denoiser of a pipeline."""
    return next(iter(denoisers_of(pipeline).items()))


def plain(module: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile(module)`` returns, which has no signature of its own."""
    return getattr(module, "_orig_mod", module)


def denoises(module: nn.Module) -> bool:
    """Whether a model takes a latent and a timestep."""
    names = inspect.signature(plain(module).forward).parameters
    kinds = {kind_of((name,)) for name in names}
    return {"latent", "timestep"} <= kinds and "controlnet_cond" not in names
