"""Integer products of linear layers whose inputs have a scale for every group of channels: int4 in groups, NVFP4, MXFP4 and their like.

Codes of inputs and weights become 16-bit integers (:mod:`~reelquant.kernels.cpu.group_inputs`). They are multiplied and added in 32 bits
over the channels that share their scales, and these sums are added in float32, each with its two scales. Nothing is folded, so
products are exact; only the order of the float32 additions differs from the reference.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba.core import types
from numba.extending import overload
from torch import Tensor

from reelquant.kernels.cpu import group_inputs, loops
from reelquant.kernels.cpu.group_inputs import GroupInputs, multiples
from reelquant.kernels.cpu.int8 import NATIVE
from reelquant.kernels.cpu.int16_madd import available, columns_of, panelled, unpanelled
from reelquant.kernels.cpu.options import EXACT, PART, compiled
from reelquant.kernels.cpu.powers import ACTIVATION_CODES, activate
from reelquant.kernels.cpu.scaled_tile import look_up, scaled_tile
from reelquant.kernels.cpu.tile import COLUMNS, PAIRS, PANELS, ROWS, ROWS_AT_ONCE, WIDTH
from reelquant.kernels.operands import Operands, PackedWeight, check_width

LARGEST = 128  # of an integer that stands for a number of a weight
GRAINS = ("tensor", "channel", "group")


def refuses(operands: Operands) -> str | None:
    """Why a layer cannot take this path, or None."""
    weight = operands.weight.quantizer
    if weight.granularity.kind not in GRAINS or weight.zero_point is not None:
        return f"weights are {weight.format.name} per {weight.granularity}, not symmetric with a scale per tensor, channel or group"
    if multiples(weight.format, LARGEST) is None:
        return f"weights of {weight.format.name} are not multiples of one of them up to {LARGEST}"
    return group_inputs.refuses(operands) or _uneven(operands) or available()


def _uneven(operands: Operands) -> str | None:
    assert operands.input is not None
    width = operands.weight.width
    for grain in (operands.weight.quantizer.granularity, operands.input.granularity):
        if grain.kind == "group" and grain.size % 2 and grain.size < width:
            return f"groups of {grain.size} channels are no whole pairs"
    return None


class GroupProduct:
    """``y[n] = sum over groups of (codes . weight codes of row n) * input scale * weight scale, + bias[n]``."""

    fused = tuple(ACTIVATION_CODES)

    def __init__(self, operands: Operands) -> None:
        weight, self.inputs = operands.weight, GroupInputs(operands)
        self.rows, self.channels = weight.shape
        found = multiples(weight.quantizer.format, LARGEST)
        assert found is not None
        self.table = found.values.astype(np.int32)
        self.codes = self._pack(weight, found.values)
        size = weight.quantizer.granularity.size or self.channels
        scales = weight.quantizer.scale.expand(self.rows if weight.quantizer.granularity.kind == "tensor" else -1)
        scales = scales.float().reshape(self.rows, -1) * (found.unit * self.inputs.unit)
        self.scales = F.pad(scales.T, (0, -self.rows % COLUMNS)).contiguous().numpy()
        self.edges, self.groups = _pieces(self.channels, self.inputs.size, size)
        self.bias = columns_of(torch.zeros(self.rows) if operands.bias is None else operands.bias.detach().float())

    def _pack(self, weight: PackedWeight, values: np.ndarray[Any, Any]) -> Any:
        """Bring the weight into panels; what gives its codes back where panels hold them, else None."""
        if weight.quantizer.format.bits == 4 and self.channels % 2 == 0:
            self.panels = panelled(weight.codes.unsqueeze(1)).numpy()[:, 0]
            return self._stored_nibbles
        wide = torch.from_numpy(values)[weight.unpacked().int()].to(torch.int8)
        pieces = F.pad(wide, (0, self.channels % 2)).unflatten(1, (-1, 2)).unsqueeze(1)
        self.panels = panelled(pieces).numpy()[:, 0]
        return self._stored_bytes if weight.codes.dtype == torch.int8 else None

    def _stored_nibbles(self) -> Tensor:
        return unpanelled(torch.from_numpy(self.panels)[:, None], self.rows)[:, 0].contiguous()

    def _stored_bytes(self) -> Tensor:
        return unpanelled(torch.from_numpy(self.panels)[:, None], self.rows).flatten(1)[:, : self.channels].contiguous()

    def rounding(self, operands: Operands) -> GroupProduct:
        """The same weight, in the same memory, with another rounding of its inputs in the same groups."""
        twin = copy.copy(self)
        twin.inputs = GroupInputs(operands)
        twin.scales = self.scales * np.float32(twin.inputs.unit / self.inputs.unit)
        return twin

    def __call__(self, x: Tensor, slot: int | Tensor = 0, activation: str = "") -> Tensor:
        check_width(x, (self.rows, self.channels), None)
        dtype = x.dtype if x.dtype in NATIVE else torch.float32
        out = torch.empty(*x.shape[:-1], self.rows, dtype=dtype)
        if not x.numel():
            return out.to(x.dtype)
        codes, scales, poisoned = self.inputs.rows(x)
        if poisoned:
            return out.fill_(torch.nan).to(x.dtype)
        units = -(-len(codes) // ROWS_AT_ONCE) * -(-len(self.panels) // PANELS)
        weights = self.panels, self.table, self.scales, self.edges, self.groups, self.bias
        target = loops.view(out).reshape(len(codes), self.rows)
        by_group = np.zeros((scales.shape[1], len(codes) + ROWS), np.float32)  # the last tile reads a few more
        by_group[:, : len(codes)] = scales.T
        loops.spread(multiply, units, codes.size * self.rows, codes, by_group, *weights, ACTIVATION_CODES[activation], target)
        return out if dtype == x.dtype else out.to(x.dtype)


def _pieces(channels: int, inputs: int, weights: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pieces of a row that have one scale on both sides and fit into the cache.

    Args:
        channels: in a row.
        inputs, weights: channels that share a scale of the inputs and of the weights.

    Returns:
        ``[pieces + 1]`` pairs of channels where they begin and end, and ``[pieces, 2]`` groups of inputs and of weights.
    """
    starts = sorted({start for step in (inputs, weights, 2 * PAIRS) for start in range(0, channels, step)})
    edges = [*(start // 2 for start in starts), -(-channels // 2)]
    groups = [(start // inputs, start // weights) for start in starts]
    return np.array(edges, np.int64), np.array(groups, np.int64).reshape(-1, 2)


def widen(panel: Any, table: Any, out: Any) -> None:
    """A piece of a panel as 16-bit numbers ``[pairs, COLUMNS]``, a pair in 32 bits.

    Args:
        panel: ``[pairs, COLUMNS, 2]`` int8, the numbers, or ``[pairs, COLUMNS]`` uint8 that hold two 4-bit codes each.
        table: ``[16]`` int32, what 4-bit codes stand for.
        out: ``[pairs, COLUMNS]`` int32, written.
    """


@overload(widen, jit_options=PART)
def _widen_of(panel: Any, table: Any, out: Any) -> Any:
    assert isinstance(panel, types.Array)
    if panel.ndim == 3:

        def bytes_(panel: Any, table: Any, out: Any) -> None:
            flat, target = panel.reshape(-1), out.view(np.int16).reshape(-1)
            for j in range(flat.shape[0]):
                target[j] = flat[j]

        return bytes_

    def nibbles(panel: Any, table: Any, out: Any) -> None:
        for k in range(panel.shape[0]):
            look_up(panel.ctypes.data + k * COLUMNS, table.ctypes.data, out.ctypes.data + 4 * k * COLUMNS)

    return nibbles


@compiled(**EXACT)
def multiply(start, stop, codes, inputs, panels, table, weights, edges, groups, bias, which, out):  # type: ignore[no-untyped-def]
    """``out[m, n] = sum over pieces of (codes of row m . weights of column n) * inputs[m] * weights[n], + bias[n]``.

    Args:
        start, stop: units of work, each :data:`ROWS_AT_ONCE` rows and :data:`PANELS` panels.
        codes: ``[rows, channels]`` int16; one number more may be read, and is multiplied by zero.
        inputs: ``[groups, rows]`` float32, scales; :data:`ROWS` more may be read than there are rows.
        panels, table: see :func:`widen`; ``[panels, pairs, COLUMNS]`` or ``[panels, pairs, COLUMNS, 2]``.
        weights: ``[groups, panels * COLUMNS]`` float32, scales.
        edges, groups: see :func:`_pieces`.
        bias: ``[panels * COLUMNS]`` float32.
        which: activation, of :data:`~reelquant.kernels.cpu.powers.ACTIVATION_CODES`.
        out: ``[rows, columns]`` float32, or bfloat16 as int16; written.
    """
    chunks = -(-panels.shape[0] // PANELS)
    kept = np.empty((ROWS_AT_ONCE, WIDTH), np.float32)
    wide = np.empty((np.diff(edges).max(), COLUMNS), np.int32)
    addresses = np.empty(ROWS_AT_ONCE, np.int64)
    for unit in range(start, stop):
        first, one = unit // chunks * ROWS_AT_ONCE, unit % chunks * PANELS
        last, end = min(first + ROWS_AT_ONCE, codes.shape[0]), min(one + PANELS, panels.shape[0])
        for r in range(ROWS_AT_ONCE):  # the last tile repeats its last row
            addresses[r] = codes.ctypes.data + 2 * codes.shape[1] * min(first + r, last - 1)
        kept[:] = np.float32(0)
        for piece in range(len(edges) - 1):
            pair, length = edges[piece], edges[piece + 1] - edges[piece]
            scales = inputs[groups[piece, 0], first:].ctypes.data
            for p in range(one, end):
                widen(panels[p, pair : pair + length], table, wide[:length])
                factors = weights[groups[piece, 1], p * COLUMNS :].ctypes.data
                for m in range(0, last - first, ROWS):
                    target = kept.ctypes.data + 4 * (m * WIDTH + (p - one) * COLUMNS)
                    scaled_tile(addresses.ctypes.data + 8 * m, 4 * pair, length, wide.ctypes.data, factors, scales + 4 * m, target)
        left, right = one * COLUMNS, min(end * COLUMNS, out.shape[1])
        for m in range(first, last):
            line = kept[m - first, : right - left]
            for j in range(right - left):
                line[j] += bias[left + j]
            if which:
                activate(line, which)
            loops.write(line, out[m, left:right])
