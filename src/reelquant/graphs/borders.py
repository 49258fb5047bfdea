"""Convolutions of shifted inputs, whose border holds other numbers than zero, as convolutions with zeros around them.

``F.pad`` puts zeros around an input; a layer that shifts its input makes ``(0 - shift) / scale`` of them. OpenVINO pads integers with zeros
only, and a border of floats costs 10 % of a step of ``tiny-unet``: each number is copied, and everything up to the product computes more of
them (2.25 times as many for pictures of 4 x 4). What the border would add to an output depends only on which members of the window stand
outside, so it is a bias by position. It is not rounded to codes, as that of the layer is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino.opset13 as ops
import torch
from torch import Tensor

from reelquant.kernels import Operands, Window

Node = Any


def keeps_sizes(window: Window | None, kernel: Sequence[int]) -> bool:
    """Whether outputs are as many as inputs, the window stands in the middle of each, and some of it outside at the border."""
    if window is None or any(size % 2 == 0 for size in kernel) or max(kernel, default=1) == 1:
        return False
    padding = window.padding or (0,) * (2 * len(kernel))
    around = [size // 2 for size in reversed(kernel) for _ in range(2)]
    return list(padding) == around and {*window.stride, *window.dilation} == {1}


def zeros_become(operands: Operands) -> Tensor:
    """What zeros are after the input's rewriting, ``[channels]``."""
    zeros = torch.zeros(1, operands.weight.shape[1], *[1] * (len(operands.weight.shape) - 2))
    return operands.rewritten_input(zeros).float().flatten()


def added_by(border: Tensor, weight: Tensor) -> Tensor:
    """What a border of these values adds to an output.

    Args:
        border: ``[channels]``.
        weight: ``[out, channels, *kernel]``.

    Returns:
        ``[out, *zones]``: along each axis, :func:`zones` of a kernel of this size.
    """
    one = torch.einsum("oc...,c->o...", weight.double(), border.double())
    kernel = one.shape[1:]
    inside = one
    for size in kernel:
        inside = torch.tensordot(inside, _inside(size).double(), dims=([1], [1]))  # the axis moves to the end: the next one is axis 1 now
    return (one.flatten(1).sum(1).reshape(-1, *[1] * len(kernel)) - inside).float()


def _inside(size: int) -> Tensor:
    """``[zones, size]``: which members of a window along an axis stand inside, by the distances to both ends."""
    half = size // 2
    member = torch.arange(-half, half + 1)
    before, after = torch.meshgrid(torch.arange(half + 1), torch.arange(half + 1), indexing="ij")
    return (member >= -before.reshape(-1, 1)) & (member <= after.reshape(-1, 1))


def by_position(values: Tensor, kernel: Sequence[int], x: Node) -> Node:
    """``[out, *zones]`` as a constant ``[out, *sizes]`` with the sizes of ``x``, ``[N, channels, *sizes]``."""
    found = ops.constant(np.ascontiguousarray(values.numpy()))
    shape = ops.shape_of(x)
    for axis, size in enumerate(kernel):
        found = ops.gather(found, zones(ops.gather(shape, _number(axis + 2), _number(0)), size // 2), _number(axis + 1))
    return found


def zones(count: Node, half: int) -> Node:
    """Of every position along an axis, which members of a window of ``2 half + 1`` stand outside: by the distances to both ends."""
    positions = ops.range(_number(0), count, _number(1), "i64")
    last = ops.subtract(count, _number(1))
    before, after = (ops.minimum(distance, _number(half)) for distance in (positions, ops.subtract(last, positions)))
    return ops.add(ops.multiply(before, _number(half + 1)), after)


def _number(value: int) -> Node:
    return ops.constant(np.int64(value))
