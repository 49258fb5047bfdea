"""Layers that get the tensors of a quantized one: ``float_model.load_state_dict(quantized_model.state_dict())``.

diffusers builds models out of others this way: AnimateDiff's motion UNet around a UNet for pictures, the blocks of FreeNoise, ControlNets
out of the denoiser that they control. A float layer that is given codes becomes the quantized layer that they describe, where it stands.

A state dict describes its layers. Copies of it as plain dicts do not; there the layers are known by their tensors, as long as those are the
same memory. Tensors that nothing describes are refused before anything is changed: torch would take codes for numbers.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.clock import NAME, Clock
from reelquant.nn.around.graph import alive, by_handle, is_alive
from reelquant.nn.extended import quantized_class
from reelquant.nn.layer_classes import LAYERS
from reelquant.nn.layers import DESCRIPTION, QuantLayer
from reelquant.nn.narrow import is_narrow
from reelquant.nn.spec import LayerLayout

HOOK = "_load_from_state_dict"
SCALE = ".weight_scale"


def take_over_codes() -> None:
    """Let stock float layers take the tensors of quantized ones, which carry a description; twice is once."""
    for kind in LAYERS:
        if not hasattr(getattr(kind, HOOK), "__wrapped__"):
            setattr(kind, HOOK, _watched(getattr(kind, HOOK)))
    if not hasattr(nn.Module.load_state_dict, "__wrapped__"):
        nn.Module.load_state_dict = _describing(nn.Module.load_state_dict)  # type: ignore[method-assign]


def _describing(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_state_dict(self: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(state_dict, Mapping):
            state_dict = _described(self, state_dict)
        return load(self, state_dict, *args, **kwargs)

    return load_state_dict


def _described(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict, with the descriptions that it lacks for float layers that are given codes.

    Raises:
        UnsupportedError: naming the first layer whose codes are described by nothing.
    """
    facts: dict[str, Any] = dict(getattr(state, "_metadata", None) or {})
    names = [name for key in state if key.endswith(SCALE) and DESCRIPTION not in facts.get(name := key.removesuffix(SCALE), {})]
    undescribed = [name for name in names if _takes_codes(model, name, state.get(f"{name}.weight"))]
    if not undescribed:
        return state
    layers = {_place(layer.weight_scale): layer for layer in alive() if isinstance(layer, QuantLayer)}
    for name in undescribed:
        source = layers.get(_place(state[f"{name}{SCALE}"]))
        if source is None:
            raise UnsupportedError(
                f"'{name}' of {type(model).__name__} is float and is given the codes of a quantized layer in a plain dict, which does not "
                "say how to read them; pass model.state_dict() itself, open the saved model with from_pretrained, or dequantize it first"
            )
        facts[name] = facts.get(name, {}) | {DESCRIPTION: _facts(source)}
    described = OrderedDict(state)
    described._metadata = facts  # type: ignore[attr-defined]  # where torch keeps it
    return described


def _takes_codes(model: nn.Module, name: str, weight: Any) -> bool:
    """Whether a float layer would be given a tensor of another kind of numbers."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        return False
    own = getattr(layer, "weight", None)
    if isinstance(layer, QuantLayer) or not isinstance(own, Tensor) or not isinstance(weight, Tensor):
        return False
    return _computes(own) and not _computes(weight)


def _computes(value: Tensor) -> bool:
    return value.is_floating_point() and not is_narrow(value)


def _facts(layer: QuantLayer) -> dict[str, Any]:
    """What its own state dict says about a layer."""
    return layer.state_dict()._metadata[""][DESCRIPTION]  # type: ignore[attr-defined]  # where torch keeps it


def _place(value: Tensor) -> tuple[str, int]:
    return str(value.device), value.data_ptr()


def _watched(load: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(load)
    def watched(self: Any, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *args: Any) -> None:
        facts = metadata.get(DESCRIPTION)
        if facts is not None and not isinstance(self, QuantLayer):
            _become(self, prefix.rstrip("."), facts)
        load(self, state, prefix, metadata, *args)

    return watched


def _become(module: Any, name: str, facts: Mapping[str, Any]) -> None:
    """Turn a float layer into an empty quantized one; a layer of another shape is left for torch to refuse.

    Raises:
        UnsupportedError: if the layer has no quantized form, or its steps would be those of another model.
    """
    if list(module.weight.shape) != facts["shape"]:
        return
    kind, layout = quantized_class(module), LayerLayout.from_json(facts["layout"])
    if kind is None:
        raise UnsupportedError(f"'{name}' ({type(module).__name__}) is given the tensors of a quantized layer, and has no quantized form")
    source = by_handle(facts["layer"]) if is_alive(facts["layer"]) else None
    clock = _clock_for(module, name, layout, source)
    device = module.weight.device
    module.__class__ = kind
    module._build(layout, device)
    module.requires_grad_(False)
    module.clock, module.bits_group = ((), 0) if clock is None or source is None else ((clock,), source.bits_group)


def _clock_for(module: nn.Module, name: str, layout: LayerLayout, source: QuantLayer | None) -> Clock | None:
    """The clock of the layer that the tensors come from, if both are in the model that it is the clock of.

    Raises:
        UnsupportedError: if the layer needs it and is in another model, whose calls it would not see.
    """
    clock = next(iter(source.clock), None) if source is not None else None
    if clock is not None and _ticks_for(clock, module):
        return clock
    if layout.steps > 1 or layout.cfg_halves or (clock is not None and clock.changes_bits):
        raise UnsupportedError(
            f"layer '{name or type(module).__name__}' was calibrated by denoising step, and is copied into another model, which would not "
            "tell it the step; build that model in float first and quantize the pipeline then"
        )
    return None


def _ticks_for(clock: Clock, module: nn.Module) -> bool:
    home = clock.home() if clock.home is not None else None
    return home is not None and getattr(home, NAME, None) is clock and any(part is module for part in home.modules())
