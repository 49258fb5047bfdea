"""Kernels of x86 processors: integer products of oneDNN, and loops of numba where torch would take several passes."""

from __future__ import annotations

from reelquant.kernels import Kernel
from reelquant.kernels.cpu import floats, int8, nibbles, pairs

KERNELS = (
    Kernel("onednn int8", int8.refuses, int8.prepare),
    Kernel("onednn int8 from int4", nibbles.refuses, nibbles.prepare),
    Kernel("int16 pairs", pairs.refuses, pairs.PairProduct),
    Kernel("float products", floats.refuses, floats.FloatProduct, low_bit=False),
)
"""Best first."""
