"""Put the quantized weights of a module that is of no library back into a fresh float one. Imports nothing heavy by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from reelquant._errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor, nn

Module = TypeVar("Module", bound="nn.Module")


def load_denoiser(folder: str | Path, module: Module) -> Module:
    """Turn a float module into the quantized one that :func:`reelquant.save` wrote from a :class:`reelquant.Denoiser`.

    The module computes what the saved one did, bit by bit. No pickle is read.

    Args:
        folder: what was written.
        module: of the same architecture, with any weights, also on the meta device. It is changed in place.

    Returns:
        The module.

    Raises:
        CheckpointError: if the folder is damaged, or the module is of another architecture; the module is as it was.
        UnsupportedError: if the module is quantized already.

    Example:
        >>> model = reelquant.load_denoiser("out", MyModel())
        >>> latents = sampler(model, "a red ball", torch.Generator().manual_seed(0))
    """
    from reelquant._torch_state import stock_torch

    with stock_torch():
        return _load(folder, module)


def _load(folder: str | Path, module: Module) -> Module:
    from reelquant.checkpoint import OwnModule
    from reelquant.checkpoint.own_module import RECIPE
    from reelquant.discover.arguments import OWN
    from reelquant.integrations.loading import start_loaded
    from reelquant.nn import quantized_layers, start_clock
    from reelquant.nn.around.routed import route

    if quantized_layers(module):
        raise UnsupportedError(f"{type(module).__name__} is quantized already; give a fresh one in float")
    saved = OwnModule.open(folder)
    stored = saved.stored
    _fill(module, saved)
    if stored.slots is not None:
        start_clock(module, stored.slots.clock(), stored.slots.argument)
    start_loaded(module, stored, covered=True)
    setattr(module, OWN, dict(saved.arguments))
    if saved.routed:
        route(module)
        vars(module)["reelquant_direct"] = True
    setattr(module, RECIPE, (stored.recipe, stored.recipe_digest))
    return module


def _fill(module: nn.Module, saved: Any) -> None:
    """Exchange float layers for those that were stored, and put all tensors in; nothing has changed if they do not fit."""
    from reelquant.checkpoint import verify
    from reelquant.integrations.loading import put_empty_layers
    from reelquant.nn import get_module, set_module

    tensors = saved.tensors()
    floats: dict[str, nn.Module] = {}
    kept = module.state_dict()
    try:
        floats = {name: module.get_submodule(name) for name in saved.stored.layers if _there(module, name)}
        put_empty_layers(module, saved.stored)
        _check(module, tensors, saved)
        module.load_state_dict(tensors, assign=True)
        verify(module, saved.stored.checksums)
    except BaseException:
        for name, layer in floats.items():
            set_module(module, name, layer)
        module.load_state_dict(kept, assign=True)
        raise
    for name in saved.stored.layers:
        get_module(module, name).requires_grad_(False)


def _there(module: nn.Module, name: str) -> bool:
    return name in dict(module.named_modules())


def _check(module: nn.Module, tensors: Mapping[str, Tensor], saved: Any) -> None:
    """Names, shapes and, in quantized layers, dtypes must be those of the module."""
    expected = module.state_dict()
    what = f"'{saved.folder}' was saved from {saved.kind}, and this {type(module).__name__}"
    for names, verb in ((tensors.keys() - expected.keys(), "lacks"), (expected.keys() - tensors.keys(), "has, but the folder lacks,")):
        if names:
            some = ", ".join(f"'{name}'" for name in sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
            raise CheckpointError(f"{what} {verb} {len(names)} tensors: {some}; build it with the settings of the one that was saved")
    for name, value in tensors.items():
        own, layer = expected[name], name.rpartition(".")[0]
        if own.shape != value.shape:
            raise CheckpointError(f"{what} has '{name}' with shape {tuple(own.shape)}, the folder with {tuple(value.shape)}")
        if layer in saved.stored.layers and not name.endswith(".bias") and own.dtype != value.dtype:
            raise CheckpointError(f"{what}: '{name}' is stored as {value.dtype}, its description asks for {own.dtype}")
