"""Memory for arrays that live long: pages of their own, which return to the system as soon as the array is freed.

glibc serves all but the largest arrays from one heap. A weight there would lie between what comes and goes, and holes that are too
small for the next activation count as memory until the process ends.
"""

from __future__ import annotations

import math
import mmap
import sys
from typing import Any

import numpy as np


def alloc_pages(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray[Any, Any]:
    """Zeros, in pages of their own on Linux."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if sys.platform != "linux" or size < mmap.PAGESIZE:
        return np.zeros(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype).reshape(shape)
