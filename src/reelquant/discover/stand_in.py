"""A model to run before its weights are there: what a layer's input depends on does not depend on the values of the weights."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK = 4  # of the matrices that stand for those of linear layers


def stand_in(model: nn.Module) -> nn.Module:
    """A float32 copy of a model on the meta device that runs on the CPU and takes no memory: every parameter is a view of one short
    row of random numbers, shifted by one from row to row, and linear layers multiply by matrices of low rank instead of their own.

    Args:
        model: parameters on the meta device; parameters and buffers elsewhere are copied as they are.
    """
    twin = copy.deepcopy(model)
    noise = torch.randn(_longest(twin), generator=torch.Generator().manual_seed(0))
    made: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = made.setdefault(id(parameter), nn.Parameter(_view(noise, name, parameter.shape), requires_grad=False))
                module._parameters[name] = value
    for number, module in enumerate(twin.modules()):
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            module.forward = functools.partial(_project, module, noise.roll(number))  # instances first: hooks still see the module
    return twin


def _longest(model: nn.Module) -> int:
    shapes = [(*parameter.shape, 1) for parameter in model.parameters()]
    return max((max(shape[0] + math.prod(shape[1:]), RANK * max(shape)) for shape in shapes), default=1)


def _view(noise: Tensor, name: str, shape: torch.Size) -> Tensor:
    """Row ``i`` is the noise from number ``i`` on, in the size that keeps activations finite."""
    if len(shape) < 2:
        values = 0.02 * noise[: math.prod(shape)].reshape(shape)
        return 1 + values if name == "weight" else values  # a norm scales by about one
    width = math.prod(shape[1:])
    strides = [math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
    return (noise[: shape[0] + width] * width**-0.5).as_strided(shape, (1, *strides))


def _project(layer: nn.Linear, noise: Tensor, input: Tensor, **_: Any) -> Tensor:
    """What a linear layer of rank :data:`RANK` would answer; a full matrix would have to be written out first."""
    down = noise[: RANK * layer.in_features].reshape(RANK, -1) * layer.in_features**-0.5
    up = noise[: RANK * layer.out_features].reshape(-1, RANK) * RANK**-0.5
    hidden = F.linear(input.to(down.dtype), down)
    return F.linear(hidden, up, layer.bias)
