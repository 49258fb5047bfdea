"""4-bit weights times 8-bit inputs: codes stay packed in memory, and every product fills one matrix of bytes per shape with them.
Convolutions keep their widened codes.

WARNING: this module WRITES INTO ONEDNN'S OPAQUE MEMORY. A packed weight of oneDNN is a private buffer whose layout no version promises;
:func:`workspace` takes its address and :class:`NibbleLinear` overwrites its bytes before every product. What makes that safe:

* :func:`layout_known` packs a random matrix once per process and compares every byte and every row sum with the layout that is written
  here. If anything differs, the kernel refuses all layers and another kernel computes them.
* A workspace belongs to this module alone. Its lock is held from the first written byte to the end of the product.
* Never hand ``Workspace.packed`` to other code, and never change :data:`TILE`, :func:`_in_tiles` or the prepack call without the other two.

Scales of groups are folded into the codes: ``round(code * group_scale / row_scale)`` with a row's largest weight at 127. Each weight moves
by at most half of its row's 127th part, that is a sixteenth of a 4-bit step at the row's largest group.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reelquant.formats import Granularity, Int, Quantizer, pack, unpack
from reelquant.kernels.cpu import inputs, int8, loops
from reelquant.kernels.operands import Operands, PackedWeight

TILE = 64  # rows and columns of a tile of oneDNN's int8 layout; inside, four columns of a row lie together
SLAB = 16 * TILE  # rows that are brought into tiles at a time


def refuses(operands: Operands) -> str | None:
    """Why a layer cannot take this path, or None."""
    weight = operands.weight.quantizer
    if not isinstance(weight.format, Int) or not weight.format.signed or weight.format.bits != 4:
        return f"weights are {weight.format.name}, not int4"
    if weight.granularity.kind not in ("group", "channel") or weight.granularity.size % 4:
        return f"weights have a scale per {weight.granularity}; groups are multiples of 4"
    if operands.window is not None and len(operands.window.stride) not in int8.DIMS:
        return "one-dimensional convolutions have no integer product in oneDNN"
    return inputs.refuses(operands) or int8.available() or layout_known()


def prepare(operands: Operands) -> NibbleLinear | NibbleConvolution:
    """What computes the layer."""
    return NibbleLinear(operands) if operands.window is None else NibbleConvolution(operands)


class NibbleConvolution(int8.IntegerConvolution):
    """A convolution whose weights are widened once and kept beside the packed ones: 12 bits a weight.

    The layout that oneDNN convolves from depends on the shape of the window, so it cannot be filled as that of products is.
    """

    def __init__(self, operands: Operands) -> None:
        codes, scale = widened(operands.weight)
        wide = PackedWeight(codes, Quantizer(Int(8), Granularity("channel"), scale), operands.weight.shape)
        super().__init__(replace(operands, weight=wide))
        self.codes = None


def widened(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """8-bit codes ``[out, width]`` with a scale per row; the very codes where rows have one scale already."""
    if weight.quantizer.granularity.kind == "channel":
        return int8.signed(weight), weight.quantizer.scale.float()
    codes, scale = torch.empty(weight.shape[0], weight.width, dtype=torch.int8), torch.empty(weight.shape[0])
    for start in range(0, len(codes), SLAB):  # as floats a whole weight would be the peak of loading
        some = slice(start, start + SLAB)
        values = weight.rows(some).dequantize().flatten(1)
        largest = values.abs().amax(1)
        scale[some] = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        codes[some] = values.div_(scale[some, None]).round_()
    return codes, scale


class NibbleLinear(int8.IntegerLinear):
    """A linear layer whose weights are widened in every call."""

    def _pack(self, operands: Operands) -> None:
        rows, width = operands.weight.shape
        size, scales = operands.weight.quantizer.granularity.size or width, operands.weight.scales
        self.scale = torch.empty(rows)
        self.nibbles = torch.empty(-(-rows // TILE), -(-width // TILE), TILE // 4, TILE * 2, dtype=torch.uint8)
        for start in range(0, rows, SLAB):  # a whole weight widened several times over would be the peak of loading
            some = slice(start, min(start + SLAB, rows))
            codes = unpack(operands.weight.codes[some], 4, width)
            self.scale[some] = scales[some, 0] if scales.shape[1] == 1 else row_scale(codes, scales[some].float(), size)
            self.nibbles[start // TILE : -(-some.stop // TILE)] = _tiled(codes)
        self.groups = loops.view(inputs.readable(scales)), self.scale.numpy(), max(size, 4)
        self.workspace = workspace(rows, width)
        self.width = width
        self.codes = self._codes

    def _codes(self) -> Tensor:
        return _untiled(self.nibbles, self.rows, self.width)

    def _multiply(self, codes: Tensor, scale: float, zero: int, bias: Tensor | None, dtype: torch.dtype, activation: str = "") -> Tensor:
        work = self.workspace
        with work.lock:
            tiles = len(self.nibbles)
            loops.spread(loops.fill_tiles, tiles, work.bytes.size, self.nibbles.numpy(), *self.groups, work.bytes, work.sums)
            self.packed = work.packed
            try:
                return super()._multiply(codes, scale, zero, bias, dtype, activation)
            finally:
                del self.packed


@dataclass(eq=False)
class Workspace:
    """A packed weight of oneDNN and its opaque memory, which is written here: bytes in tiles, then minus the sum of every row."""

    packed: Tensor
    bytes: np.ndarray[Any, Any]
    sums: np.ndarray[Any, Any]
    lock: threading.Lock = field(default_factory=threading.Lock)


@functools.lru_cache(maxsize=32)
def workspace(rows: int, width: int) -> Workspace:
    return _opened(torch.ops.onednn.qlinear_prepack(torch.zeros(rows, width, dtype=torch.int8), [int8.ROWS, width]))


def _opened(packed: Tensor) -> Workspace:
    size = torch.ops.mkldnn._nbytes(packed)
    memory = np.ctypeslib.as_array(ctypes.cast(torch.ops.mkldnn.data_ptr(packed), ctypes.POINTER(ctypes.c_int8)), (size,))
    rows = -(-packed.shape[1] // TILE)
    inside = rows * -(-packed.shape[0] // TILE) * TILE * TILE
    return Workspace(packed, memory[:inside].reshape(rows, -1, TILE // 4, TILE * 4), memory[inside:].view(np.int32).reshape(rows, -1))


@functools.cache
def layout_known() -> str | None:
    """Why this oneDNN cannot be written into, or None: its layout of one random matrix must be ours to the byte, row sums included."""
    reason = "this version of oneDNN lays weights out in another way"
    codes = torch.randint(-128, 128, (2 * TILE + 3, TILE + 5), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    rows, columns = (-(-size // TILE) for size in codes.shape)
    if not hasattr(torch.ops.mkldnn, "data_ptr"):
        return "this version of torch does not show where packed weights lie"
    packed = torch.ops.onednn.qlinear_prepack(codes, [int8.ROWS, codes.shape[1]])
    if torch.ops.mkldnn._nbytes(packed) != rows * columns * TILE * TILE + 4 * rows * TILE:
        return reason
    opened = _opened(packed)
    same = torch.equal(torch.from_numpy(opened.bytes), _in_tiles(codes))
    sums = torch.nn.functional.pad(-codes.sum(1, dtype=torch.int32), (0, rows * TILE - len(codes)))
    return None if same and torch.equal(torch.from_numpy(opened.sums).flatten(), sums) else reason


def _in_tiles(codes: Tensor) -> Tensor:
    """``[rows, width]`` to ``[row tiles, column tiles, 16, 256]``: four columns of 64 rows side by side; padded with zeros."""
    rows, width = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -width % TILE, 0, -rows % TILE))
    tiles = padded.reshape(padded.shape[0] // TILE, TILE, padded.shape[1] // TILE, TILE // 4, 4)
    return tiles.permute(0, 2, 3, 1, 4).reshape(tiles.shape[0], tiles.shape[2], TILE // 4, TILE * 4)


def _tiled(codes: Tensor) -> Tensor:
    """Codes 0 to 15 in tiles, two a byte: the first half of a line in the low nibbles, the second in the high ones."""
    low, high = _in_tiles(codes ^ 8).bitwise_xor_(8).chunk(2, -1)  # padding must be code 8, which stands for zero
    return (low | high << 4).contiguous()


def _untiled(nibbles: Tensor, rows: int, width: int) -> Tensor:
    """Undo :func:`_tiled`, as a checkpoint stores it: ``[rows, bytes]``."""
    lines = torch.cat([nibbles & 15, nibbles >> 4], -1)
    tiles = lines.reshape(*lines.shape[:3], TILE, 4).permute(0, 3, 1, 2, 4)
    return pack(tiles.reshape(lines.shape[0] * TILE, -1)[:rows, :width].contiguous(), 4)


def row_scale(codes: Tensor, scale: Tensor, size: int, top: int = 127) -> Tensor:
    """The scale that puts the largest weight of a row at ``top``: ``[rows]``; 1 for a row of zeros."""
    distance = (codes.to(torch.int16) - 8).abs().to(torch.uint8)
    padded = torch.nn.functional.pad(distance, (0, -distance.shape[1] % size))
    largest = (padded.reshape(len(codes), -1, size).amax(2) * scale).amax(1)
    return torch.where(largest > 0, largest / top, torch.ones_like(largest))
