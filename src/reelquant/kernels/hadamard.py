"""The orthonormal Walsh-Hadamard transform, the only rotation that costs ``n log n`` additions and no storage."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

DENSE = 64  # widest block that is one product with a matrix; wider ones are two products with factors of about their root


def block_size(channels: int) -> int:
    """Width of the rotated blocks: the largest power of two that divides the number of channels."""
    return channels & -channels


def hadamard(x: Tensor, dim: int = -1) -> Tensor:
    """Rotate ``x`` along ``dim`` in blocks of :func:`block_size`; its own inverse.

    Values keep their shape and dtype. The matrix of a block is Sylvester's, divided by the root of its width: symmetric and orthonormal.
    """
    moved = x.movedim(dim, -1)
    shape, width = moved.shape, block_size(x.shape[dim])
    inner = width if width <= DENSE else 1 << (width.bit_length() // 2)
    rotated = moved.reshape(-1, inner) @ _matrix(inner, x.dtype, x.device)
    if (outer := width // inner) > 1:  # the matrix of a block is the Kronecker product of two smaller ones
        turned = rotated.reshape(-1, outer, inner).transpose(1, 2).reshape(-1, outer)
        rotated = (hadamard(turned) if outer > DENSE else turned @ _matrix(outer, x.dtype, x.device)).reshape(-1, inner, outer)
        rotated = rotated.transpose(1, 2)
    return rotated.reshape(shape).movedim(-1, dim)


@functools.cache
def _sylvester(size: int) -> tuple[tuple[float, ...], ...]:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return tuple(map(tuple, (matrix / size**0.5).tolist()))


def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(_sylvester(size), dtype=dtype, device=device)
