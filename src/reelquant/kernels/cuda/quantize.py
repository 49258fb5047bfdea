"""Everything between the residual stream and an 8-bit product in one pass over memory: read floats once, write codes once.

    codes = round(((modulate(norm(activate(x))) - pre_shift) / pre_scale) / input_scale)

every stage optional. Statistics and arithmetic are float32 whatever the dtype of the input.

Deviation from the reference (:mod:`reelquant.kernels.reference`): the kernel multiplies by one reciprocal of ``pre_scale * input_scale``
where the reference divides twice. A value whose quotient lies within a few units of 2^-24 (relative) of the middle between two codes
may get the neighbouring code; norms add the rounding of their sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelquant.kernels.cuda import launch
from reelquant.kernels.cuda.epilogue import ACTIVATIONS, activate, of_slot, to_codes
from reelquant.kernels.cuda.launch import FP8, check_fp8, check_table, check_vector, choose, require, rows_of, slots_of

NORMS: dict[str, int] = {"none": 0, "layer": 1, "rms": 2}
GATES: dict[str, int] = {"none": 0, "first": 1, "last": 2}
WIDEST = 65536  # a row is held in registers: 128 a thread at most
TILE = 4096  # values per program for narrow rows: 16 bytes per thread and load
LARGEST = {torch.int8: 127.0, FP8: 448.0}
LEVELS = (-128.0, 127.0)  # smallest and largest static int8 code


@triton.jit
def _quantize(
    x, codes, scales, rows, width, stride_row, stride_column,
    norm_weight, norm_bias, eps, modulation_scale, modulation_shift, scale_stride, shift_stride, rows_per_modulation,
    pre_shift, pre_scale, input_scale, zero_point, slot, slots, lowest, highest,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row, in_column = row < rows, column < width
    inside = in_row[:, None] & in_column[None, :]
    source = x + row.to(tl.int64)[:, None] * stride_row + column[None, :] * stride_column
    value = _read(source, inside, width * stride_column, ACTIVATION, GATE)
    if NORM != 0:
        value = _normalize(value, inside, width, eps, NORM)
        if norm_weight is not None:
            value *= tl.load(norm_weight + column, mask=in_column, other=0.0).to(tl.float32)[None, :]
        if norm_bias is not None:
            value += tl.load(norm_bias + column, mask=in_column, other=0.0).to(tl.float32)[None, :]
    which = (row // rows_per_modulation).to(tl.int64)[:, None]
    if modulation_scale is not None:
        value *= 1.0 + tl.load(modulation_scale + which * scale_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if modulation_shift is not None:
        value += tl.load(modulation_shift + which * shift_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if pre_shift is not None:
        value -= tl.load(pre_shift + column, mask=in_column, other=0.0).to(tl.float32)[None, :]
    value = _round(
        value, inside, row, in_row, column, in_column, scales, pre_scale, input_scale, zero_point, slot, slots, lowest, highest,
        codes.dtype.element_ty,
    )  # fmt: skip
    tl.store(codes + row.to(tl.int64)[:, None] * width + column[None, :], value, mask=inside)


@triton.jit
def _read(source, inside, half, ACTIVATION: tl.constexpr, GATE: tl.constexpr):
    """The activated input in float32; of a gated one, ``activate(gate) * other half``."""
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if GATE == 0:
        return activate(first, ACTIVATION)
    else:
        second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        if GATE == 1:
            return activate(first, ACTIVATION) * second
        else:
            return first * activate(second, ACTIVATION)


@triton.jit
def _normalize(value, inside, width, eps, NORM: tl.constexpr):
    """Layer norm (biased variance, two passes over registers) or root-mean-square norm; masked places stay zero."""
    if NORM == 1:
        value = tl.where(inside, value - (tl.sum(value, 1) / width)[:, None], 0.0)
    return value * tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]


@triton.jit
def _round(
    value, inside, row, in_row, column, in_column, scales, pre_scale, input_scale, zero_point, slot, slots, lowest, highest,
    CODES: tl.constexpr,
):  # fmt: skip
    """Codes of one tile, with the step's static scale or (``scales`` given) with a scale per row, which is written too."""
    if scales is not None:
        if pre_scale is not None:
            value = value / tl.load(pre_scale + column, mask=in_column, other=1.0).to(tl.float32)[None, :]
        value = tl.where(inside, value, 0.0)
        if CODES == tl.int8:  # the range -128 .. 127 is not symmetric: each side has its own largest code
            scale = tl.maximum(tl.max(value, 1) / 127.0, -tl.min(value, 1) / 128.0)
        else:
            scale = tl.max(tl.abs(value), 1) / 448.0
        scale = tl.where(scale <= 1.1754943508222875e-38, 1.0, scale)  # a row of zeros keeps its zeros
        scale = tl.where(tl.max((value != value).to(tl.int32), 1) > 0, float("nan"), scale)  # int8 has no code for NaN, and it must show
        tl.store(scales + row, scale, mask=in_row)
        return to_codes(value * (1.0 / scale)[:, None], CODES)
    else:
        scale = of_slot(input_scale, slot, slots)
        if pre_scale is not None:
            value = value * (1.0 / (scale * tl.load(pre_scale + column, mask=in_column, other=1.0).to(tl.float32)))[None, :]
        else:
            value = value * (1.0 / scale)
        if zero_point is not None:
            value += of_slot(zero_point, slot, slots) - 128.0
        if CODES == tl.int8:  # integers of fewer bits saturate earlier
            value = tl.minimum(tl.maximum(value, lowest), highest)
        return to_codes(value, CODES)


@dataclass(frozen=True, eq=False)
class Stages:
    """The optional stages before rounding; ``width`` is the number of channels after gating.

    Attributes:
        activation: a key of ``ACTIVATIONS``, applied first.
        gate: the input has ``2 * width`` channels; which half is activated and multiplies the other: ``none | first | last``.
        norm: ``none | layer | rms``, with ``norm_weight`` and ``norm_bias`` ``[width]`` and ``eps``.
        modulation_scale, modulation_shift: ``[groups, width]``, ``groups`` a divisor of the rows: ``x * (1 + scale) + shift``.
            One group per clip, or one per row. The last dimension is contiguous, the first may have any stride.
        pre_shift, pre_scale: ``[width]``.
    """

    activation: str = "none"
    gate: str = "none"
    norm: str = "none"
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 1e-6
    modulation_scale: Tensor | None = None
    modulation_shift: Tensor | None = None
    pre_shift: Tensor | None = None
    pre_scale: Tensor | None = None


def width_of(x: Tensor, gate: str) -> int:
    """Channels of the codes."""
    return x.shape[-1] // 2 if gate != "none" else x.shape[-1]


def _check(x: Tensor, stages: Stages, rows: int, width: int, dtype: torch.dtype) -> int:
    """Refuse what the kernel would read wrongly; returns the rows that share one modulation."""
    require(dtype in LARGEST, lambda: f"codes of dtype {dtype}: the kernel writes {', '.join(map(str, LARGEST))}")
    require(x.dtype in launch.FLOATS, lambda: f"quantizing a tensor of {x.dtype}: the kernel reads {', '.join(map(str, launch.FLOATS))}")
    require(width <= WIDEST, lambda: f"rows of {width} channels: the kernel holds a row in registers, at most {WIDEST}")
    require(stages.gate == "none" or x.shape[-1] % 2 == 0, lambda: f"a gated input needs an even number of channels, got {x.shape[-1]}")
    for name in ("norm_weight", "norm_bias", "pre_shift", "pre_scale"):
        check_vector(getattr(stages, name), width, name)
    modulation = [m for m in (stages.modulation_scale, stages.modulation_shift) if m is not None]
    groups = modulation[0].shape[0] if modulation else 1
    for table in modulation:
        require(
            table.ndim == 2 and tuple(table.shape) == (groups, width) and groups > 0 and rows % groups == 0
            and (width <= 1 or table.stride(1) == 1),
            lambda table=table: f"a modulation is [groups, {width}] with contiguous channels, groups dividing the {rows} rows and alike "
            f"for scale and shift; got shape {tuple(table.shape)} with strides {table.stride()}",
        )  # fmt: skip
    check_fp8(dtype, x.device)
    return max(rows // groups, 1)


def run(
    x: Tensor,
    codes: Tensor,
    stages: Stages,
    *,
    scales: Tensor | None = None,
    input_scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    slot: Tensor | None = None,
    levels: tuple[float, float] = LEVELS,
) -> None:
    """Fill ``codes`` ``[rows, width]`` (and ``scales`` ``[rows]`` if given) from ``x`` ``[rows, width or 2 * width]``."""
    rows, width = codes.shape
    shared = _check(x, stages, rows, width, codes.dtype)
    flags = (
        choose(ACTIVATIONS, stages.activation, "activation"), choose(GATES, stages.gate, "gate"), choose(NORMS, stages.norm, "norm"),
    )  # fmt: skip
    if rows == 0 or width == 0:
        if scales is not None:
            scales.fill_(1.0)
        return
    block = launch.size_class(width)
    many = max(1, min(TILE // block, 32)) if not launch.INTERPRETED else 4
    scale, shift = stages.modulation_scale, stages.modulation_shift
    _quantize[(launch.tiles(rows, many),)](
        x, codes, scales, rows, width, x.stride(0), x.stride(1),
        stages.norm_weight, stages.norm_bias, stages.eps, scale, shift,
        0 if scale is None else scale.stride(0), 0 if shift is None else shift.stride(0), shared,
        stages.pre_shift, stages.pre_scale, input_scale, zero_point, slot, slots_of(input_scale, zero_point), *levels,
        *flags, many, block, num_warps=max(4, min(16, block // 1024)),
    )  # fmt: skip


def _fake_static(x: Tensor, gate: str, dtype: torch.dtype, **_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], width_of(x, gate)), dtype=dtype)


@launch.operation(_fake_static)
def quantize_static(
    x: Tensor,
    input_scale: Tensor,
    slot: Tensor | None = None,
    zero_point: Tensor | None = None,
    activation: str = "none",
    gate: str = "none",
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    modulation_scale: Tensor | None = None,
    modulation_shift: Tensor | None = None,
    pre_shift: Tensor | None = None,
    pre_scale: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
    lowest: float = LEVELS[0],
    highest: float = LEVELS[1],
) -> Tensor:
    """Codes of ``x`` with the static scale of the current step.

    Args:
        x: ``[..., channels]`` float, any strides.
        input_scale: ``[slots, 1]`` float32, of which the row of ``slot`` holds.
        slot: 0-d int64 on the same device; read by the kernel. May be None for a table of one row.
        zero_point: ``[slots, 1]`` float32 integers 0 .. 255 of affine 8-bit inputs; the codes are then ``q - 128`` as int8.
        activation, gate, norm, norm_weight, norm_bias, eps, modulation_scale, modulation_shift, pre_shift, pre_scale: see :class:`Stages`.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
        lowest, highest: the smallest and largest int8 code, for integers of fewer bits; affine ones count from -128.

    Returns:
        ``[..., width]`` codes, contiguous.

    Raises:
        UnsupportedError: on shapes, dtypes or names that the kernel does not know.
    """
    check_table(input_scale, slot, "input_scale")
    if zero_point is not None:
        check_table(zero_point, slot, "zero_point")
        require(dtype == torch.int8, lambda: f"a zero point belongs to 8-bit integers, not to {dtype}")
    stages = Stages(activation, gate, norm, norm_weight, norm_bias, eps, modulation_scale, modulation_shift, pre_shift, pre_scale)
    codes = launch.new((*x.shape[:-1], width_of(x, gate)), dtype, x.device)
    run(rows_of(x), rows_of(codes), stages, input_scale=input_scale, zero_point=zero_point, slot=slot, levels=(lowest, highest))
    return codes


def _fake_per_token(x: Tensor, gate: str, dtype: torch.dtype, **_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], width_of(x, gate)), dtype=dtype), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@launch.operation(_fake_per_token)
def quantize_per_token(
    x: Tensor,
    activation: str = "none",
    gate: str = "none",
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    modulation_scale: Tensor | None = None,
    modulation_shift: Tensor | None = None,
    pre_shift: Tensor | None = None,
    pre_scale: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor]:
    """Codes of ``x`` with one scale per row, found in the same pass: the smallest that saturates nothing.

    Args:
        x: ``[..., channels]`` float, any strides.
        activation, gate, norm, norm_weight, norm_bias, eps, modulation_scale, modulation_shift, pre_shift, pre_scale: see :class:`Stages`.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.

    Returns:
        ``[..., width]`` codes and ``[rows]`` float32 scales.

    Raises:
        UnsupportedError: on shapes, dtypes or names that the kernel does not know.
    """
    stages = Stages(activation, gate, norm, norm_weight, norm_bias, eps, modulation_scale, modulation_shift, pre_shift, pre_scale)
    codes = launch.new((*x.shape[:-1], width_of(x, gate)), dtype, x.device)
    scales = launch.new((x.shape[:-1].numel(),), torch.float32, x.device)
    run(rows_of(x), rows_of(codes), stages, scales=scales)
    return codes, scales
