"""How a quantized model is computed: the settings of :func:`reelquant.configure`, a row of :data:`SETTINGS` each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from reelquant._errors import UnsupportedError
from reelquant.clock import NAME
from reelquant.discover import discover
from reelquant.discover.components import denoises, plain
from reelquant.graphs import check_runtime, set_runtime
from reelquant.kernels import check_backend
from reelquant.kernels.attention import Asked, parse_asked
from reelquant.nn import placed, quantized_layers, set_attention, set_kernels, stock_attention


def _any(model: nn.Module) -> bool:
    return True


def _has_table(model: nn.Module) -> bool:
    return any(layer.layout.table for layer in quantized_layers(model).values())


def _set_tables(model: nn.Module, wanted: bool) -> None:
    getattr(model, NAME).tables = wanted


def _set_attention(model: nn.Module, asked: Asked) -> None:
    """Rules are for denoisers, whose places of attention are looked for here; other parts are left as they are."""
    if not isinstance(asked, tuple):
        return set_attention(model, placed(asked, ()))
    if not denoises(model):
        return None
    with stock_attention(model):
        sites = discover(model).attention
    clock = getattr(model, NAME, None)
    return set_attention(model, placed(asked, sites, [] if clock is None else clock.timesteps.tolist()))


def _parse_runtime(name: str) -> str:
    check_runtime(name)
    return name


@dataclass(frozen=True)
class Setting:
    """One argument of :func:`reelquant.configure`.

    Attributes:
        parse: checks the argument and returns the value to set.
        apply: sets the value of one model.
        suits: whether a quantized model has this setting; it is applied to those that have.
        missing: the error if no model has it, after the name of the class.
    """

    parse: Callable[[Any], Any]
    apply: Callable[[nn.Module, Any], None]
    suits: Callable[[nn.Module], bool] = _any
    missing: str = ""


SETTINGS: dict[str, Setting] = {
    "kernels": Setting(check_backend, set_kernels),
    "attention": Setting(parse_asked, _set_attention),
    "temporal_table": Setting(
        bool,
        _set_tables,
        _has_table,
        "stores no tables of temporal outputs; quantize with overrides={'temporal': 'table'} to have them",
    ),
    "runtime": Setting(
        _parse_runtime,
        set_runtime,
        denoises,
        "holds no quantized denoiser, and nothing else runs as a graph; leave runtime out",
    ),
}
"""Argument -> setting, in the order in which they are applied."""


def configure_model(model: Any, arguments: Mapping[str, Any]) -> None:
    """Check all settings, then apply them; after an error nothing has changed, unless a runtime refuses the model.

    Args:
        model: a quantized model, or a pipeline.
        arguments: values by the names of :data:`SETTINGS`; None leaves a setting as it is.

    Raises:
        RecipeError: for an unknown value.
        UnsupportedError: if nothing is quantized, or no part of the model has a setting that is asked for.
    """
    parts = _quantized_parts(model)
    given = {name: setting for name, setting in SETTINGS.items() if arguments.get(name) is not None}
    values = {name: setting.parse(arguments[name]) for name, setting in given.items()}
    targets = {name: [part for part in parts if setting.suits(part)] for name, setting in given.items()}
    for name, setting in given.items():
        if not targets[name] and arguments[name]:  # switching off what is not there is not an error
            raise UnsupportedError(f"{type(model).__name__} {setting.missing}")
    for name, setting in given.items():
        for part in targets[name]:
            setting.apply(part, values[name])


def _quantized_parts(model: Any) -> list[nn.Module]:
    modules = [model] if isinstance(model, nn.Module) else [part for part in model.components.values() if isinstance(part, nn.Module)]
    parts = [part for part in map(plain, modules) if quantized_layers(part)]
    if not parts:
        raise UnsupportedError(f"{type(model).__name__} has no quantized layers; reelquant.quantize makes some")
    return parts
