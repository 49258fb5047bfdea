"""Host memory that is no longer needed although something still refers to it: mapped files and holes in the heap."""

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
WORTHWHILE = 64 << 10  # bytes; reading the list of mappings takes milliseconds, as long as preparing many small layers


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    return function


def release_mmap_pages(tensor: Tensor) -> None:
    """Release the pages of a weight that lies in the mapping of a checkpoint's file; once repacked, it would be in memory twice.

    Only whole pages of mapped safetensors files are released. A later read loads the file's bytes again. On systems other than Linux,
    and for tensors below :data:`WORTHWHILE`, this does nothing.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < WORTHWHILE or (advise := _madvise()) is None:
        return
    if not _of_file(tensor.data_ptr()):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        advise(start, length, DONTNEED)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim_heap() -> None:
    """Return free pages of the heap to the system, which glibc does not do by itself. Takes a few milliseconds; only on Linux."""
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
