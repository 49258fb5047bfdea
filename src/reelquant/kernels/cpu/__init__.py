"""Kernels of x86 processors: integer products of oneDNN, and loops of numba where torch would take several passes. Kernels of other
devices, and code that needs a compiler on the user's machine, do not belong here."""

from __future__ import annotations

from reelquant.kernels.cpu import floats, int8, int8_quads, int8_tiles, int16_groups, int16_madd, nibbles
from reelquant.kernels.kernel import Kernel

TAKES = frozenset({"input", "shift", "scale", "rotate", "window"})
GROUPS = TAKES - {"window"} | {"input_groups", "scale_codes"}
KERNELS = (
    Kernel("int8 tiles", TAKES, int8_tiles.refuses, int8_tiles.TileProduct),
    Kernel("int8 quads", TAKES, int8_quads.refuses, int8_quads.QuadProduct),
    Kernel("onednn int8", TAKES, int8.refuses, int8.prepare),
    Kernel("onednn int8 from int4", TAKES, nibbles.refuses, nibbles.prepare),
    Kernel("int16 pairs", TAKES, int16_madd.refuses, int16_madd.Int16Product),
    Kernel("int16 groups", GROUPS, int16_groups.refuses, int16_groups.GroupProduct),
    Kernel("float products", TAKES, floats.refuses, floats.FloatProduct, low_bit=False),
)
"""Best first."""
