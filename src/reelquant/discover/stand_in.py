"""A model that can be probed without its weights: which arguments a layer depends on is the same for all values of the weights."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant.discover.probe import QUANTIZABLE

RANK = 4  # of the matrices that stand for those of linear layers


def stand_in(model: nn.Module) -> nn.Module:
    """A float32 CPU copy of a model on the meta device, for probing. It takes almost no memory.

    Parameters are strided views of one noise vector. Layers multiply by low-rank noise, taken at an offset of their own.

    Args:
        model: parameters on the meta device; parameters and buffers elsewhere are copied as they are.
    """
    twin = copy.deepcopy(model)
    layers = {number: module for number, module in enumerate(twin.modules()) if _is_stock(module)}
    needed = [_view_length(parameter.shape) for parameter in twin.parameters()]
    needed += [number + RANK * max(_width(layer.weight.shape), len(layer.weight)) for number, layer in layers.items()]
    noise = torch.randn(max(needed, default=0), generator=torch.Generator().manual_seed(0))
    made: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = made.setdefault(id(parameter), nn.Parameter(_view(noise, name, parameter.shape), requires_grad=False))
                module._parameters[name] = value
    for number, layer in layers.items():
        layer.forward = functools.partial(_project, layer, noise[number:])  # instances first: hooks still see the module
    return twin


def _is_stock(module: nn.Module) -> bool:
    """Whether a layer multiplies by its weight as torch's own do."""
    kind = next((kind for kind in QUANTIZABLE if isinstance(module, kind)), None)
    return kind is not None and type(module).forward is kind.forward and getattr(module, "groups", 1) == 1


def _width(shape: torch.Size) -> int:
    """Numbers in a row of a weight."""
    return math.prod(shape[1:])


def _view_length(shape: torch.Size) -> int:
    return math.prod(shape) if len(shape) < 2 else shape[0] + _width(shape)


def _view(noise: Tensor, name: str, shape: torch.Size) -> Tensor:
    """Row ``i`` is the noise from number ``i`` on, in the size that keeps activations finite."""
    if len(shape) < 2:
        values = 0.02 * noise[: math.prod(shape)].reshape(shape)
        return 1 + values if name == "weight" else values  # a norm scales by about one
    strides = [math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
    return (noise[: _view_length(shape)] * _gain(shape)).as_strided(shape, (1, *strides))


def _gain(shape: torch.Size) -> float:
    """What keeps sums over a row as large as one of their terms."""
    return max(_width(shape), 1) ** -0.5


def _project(layer: Any, noise: Tensor, input: Tensor, *_: Any, **__: Any) -> Tensor:
    """What a layer of rank :data:`RANK` would answer; a full weight would have to be written out first."""
    shape = layer.weight.shape
    down = (noise[: RANK * _width(shape)] * _gain(shape)).view(RANK, *shape[1:])
    up = (noise[: RANK * shape[0]] * RANK**-0.5).view(-1, RANK)
    if len(shape) == 2:
        return F.linear(F.linear(input.to(down.dtype), down), up, layer.bias)
    hidden = layer._conv_forward(input.to(down.dtype), down, None)
    return F.linear(hidden.movedim(1 - len(shape), -1), up, layer.bias).movedim(-1, 1 - len(shape))
