"""The orthonormal Walsh-Hadamard transform, the only rotation that costs ``n log n`` additions and no storage."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

FACTOR = 16  # widest dense factor: two products with a 16 x 16 matrix instead of eight passes of additions for 256 channels


def block_size(channels: int) -> int:
    """Width of the rotated blocks: the largest power of two that divides the number of channels."""
    return channels & -channels


def hadamard(x: Tensor, dim: int = -1) -> Tensor:
    """Rotate ``x`` along ``dim`` in blocks of :func:`block_size`; its own inverse.

    Values keep their shape and dtype. The matrix of a block is Sylvester's, divided by the root of its width: symmetric and orthonormal.
    """
    moved = x.movedim(dim, -1)
    shape, width = moved.shape, block_size(x.shape[dim])
    inner = 1
    while width > 1:
        factor = min(width, FACTOR)
        blocks = moved.reshape(*shape[:-1], shape[-1] // (factor * inner), factor, inner)
        moved = (_matrix(factor, x.dtype, x.device) @ blocks).reshape(shape)
        width, inner = width // factor, inner * factor
    return moved.movedim(-1, dim)


@functools.cache
def _sylvester(size: int) -> tuple[tuple[float, ...], ...]:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return tuple(map(tuple, (matrix / size**0.5).tolist()))


def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(_sylvester(size), dtype=dtype, device=device)
