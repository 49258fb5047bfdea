"""What the components of a pipeline are: which denoise, which encode texts, which encode pictures."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from torch import nn

from reelquant._errors import UnsupportedError, nearest
from reelquant.discover.arguments import kind_of, own_kinds

_FIRST = ("transformer", "transformer_2", "unet")
Kind = Literal["denoiser", "controlnet", "text encoder", "image encoder", "vae"]
TIMED: tuple[Kind, ...] = ("denoiser", "controlnet")  # called at every denoising step, with the timestep


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    """Every component that is a module, by name."""
    components = getattr(pipeline, "components", None) or vars(pipeline)
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def component_of(pipeline: Any, name: str) -> nn.Module:
    """The component of this name.

    Raises:
        UnsupportedError: if the pipeline has no module of this name; the message gives the nearest one.
    """
    parts = modules_of(pipeline)
    if name not in parts:
        raise UnsupportedError(f"{type(pipeline).__name__} has no component '{name}' that could be quantized; {nearest(name, parts)}")
    return parts[name]


def kind_of_component(name: str, part: nn.Module) -> Kind:
    """What a component does, by what it can be called with.

    Raises:
        UnsupportedError: for components that are none of them.
    """
    names = set(inspect.signature(plain(part).forward).parameters)
    if takes_timestep(part):
        return "controlnet" if names & CONTROLS else "denoiser"
    if hasattr(part, "encode") and hasattr(part, "decode"):
        return "vae"
    if "input_ids" in names:
        return "text encoder"
    if "pixel_values" in names:
        return "image encoder"
    raise UnsupportedError(
        f"component '{name}' ({type(part).__name__}) is neither a denoiser, a ControlNet, an encoder of texts or pictures nor a VAE, so "
        "nothing is known of what it is called with; leave it out"
    )


def denoisers_of(pipeline: Any) -> dict[str, nn.Module]:
    """Every component that takes a latent and a timestep, by component name; two for pipelines with two experts (Wan 2.2).

    Raises:
        UnsupportedError: if there is none.
    """
    found = {name: part for name, part in modules_of(pipeline).items() if denoises(part)}
    if not found:
        components = getattr(pipeline, "components", None) or vars(pipeline)
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


CONTROLS = {"controlnet_cond", "controls_latents", "control_context"}  # arguments of ControlNets; what they give is added inside a denoiser


def denoises(module: nn.Module) -> bool:
    """Whether a model takes a latent and a timestep and is not a ControlNet."""
    return takes_timestep(module) and not CONTROLS & set(inspect.signature(plain(module).forward).parameters)


def takes_timestep(module: nn.Module) -> bool:
    """Whether a model is called at every denoising step: a denoiser or a ControlNet. What came without a pipeline is."""
    if own_kinds(plain(module)) is not None:
        return True
    kinds = {kind_of((name,)) for name in inspect.signature(plain(module).forward).parameters}
    return {"latent", "timestep"} <= kinds
