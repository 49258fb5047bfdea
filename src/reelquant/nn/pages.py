"""Memory that is not needed any more although something still refers to it."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")
DONTNEED = 4  # MADV_DONTNEED


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    return function


def drop_mapped(tensor: Tensor) -> None:
    """Let go of the pages of a weight that lies in the mapping of a checkpoint's file: repacked, it would be in memory twice.

    Only mappings of files are touched, and only whole pages; whoever reads them again gets the file's bytes. Elsewhere nothing happens.
    """
    if tensor.device.type != "cpu" or (advise := _madvise()) is None or not _of_file(tensor.data_ptr()):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        advise(start, length, DONTNEED)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back() -> None:
    """Let go of the pages of the heap that hold nothing: glibc keeps holes for good. A few milliseconds; elsewhere nothing happens."""
    if (trim := _trim()) is not None:
        trim(0)


def _of_file(address: int) -> bool:
    """Whether an address lies in the mapping of a safetensors file."""
    for line in MAPS.read_text().splitlines():
        span, _, rest = line.partition(" ")
        first, _, last = span.partition("-")
        if int(first, 16) <= address < int(last, 16):
            return rest.rstrip().endswith(".safetensors")
    return False
