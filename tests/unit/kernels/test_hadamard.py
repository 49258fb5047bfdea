"""Rotations in registers against the matrix."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import hadamard

from reelquant.kernels.cpu.hadamard import rotate


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024])
def test_every_block_is_multiplied_by_the_matrix(block: int, blocks: int) -> None:
    x = np.random.randn(block * blocks).astype(np.float32)
    expected = (x.astype(np.float64).reshape(blocks, block) @ hadamard(block)).reshape(-1)
    around = np.full(len(x) + 2, 7.0, np.float32)  # nothing beside the buffer is touched
    around[1:-1] = x
    rotate(around[1:-1], block)
    np.testing.assert_allclose(around[1:-1], expected, rtol=1e-5, atol=1e-6 * block)
    assert around[0] == around[-1] == 7


@pytest.mark.parametrize("block", [4, 8, 64, 256])
def test_whole_numbers_are_rotated_exactly(block: int) -> None:
    x = np.random.randint(-100, 100, block).astype(np.float32)
    expected = x @ hadamard(block)
    rotate(x, block)
    assert (x == expected).all()
