"""Inputs of an 8-bit product in one pass over memory: read floats once, write codes once.

    codes = round(((x - pre_shift) / pre_scale) / input_scale)

The rewrite is optional. Statistics and arithmetic are float32 for every dtype of the input.

Deviation from the reference (:mod:`reelquant.kernels.reference`): the kernel multiplies by one reciprocal of ``pre_scale * input_scale``
where the reference divides twice. A value whose quotient lies within a few units of 2^-24 (relative) of the middle between two codes
may get the neighbouring code.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelquant.kernels.cuda import launch
from reelquant.kernels.cuda.epilogue import of_slot, to_codes
from reelquant.kernels.cuda.launch import FP8, check_fp8, check_table, check_vector, require, rows_of, slots_of

WIDEST = 65536  # a row is held in registers: 128 a thread at most
TILE = 4096  # values per program for narrow rows: 16 bytes per thread and load
LARGEST = {torch.int8: 127.0, FP8: 448.0}
LEVELS = (-128.0, 127.0)  # smallest and largest int8 code


@triton.jit
def _quantize(
    x, codes, scales, rows, width, stride_row, stride_column,
    pre_shift, pre_scale, input_scale, zero_point, slot, slots, sample, lowest, highest,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row, in_column = row < rows, column < width
    inside = in_row[:, None] & in_column[None, :]
    source = x + row.to(tl.int64)[:, None] * stride_row + column[None, :] * stride_column
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if pre_shift is not None:
        value -= tl.load(pre_shift + column, mask=in_column, other=0.0).to(tl.float32)[None, :]
    value = _round(
        value, inside, row, in_row, column, in_column, scales, pre_scale, input_scale, zero_point, slot, slots, sample, lowest, highest,
        codes.dtype.element_ty,
    )  # fmt: skip
    tl.store(codes + row.to(tl.int64)[:, None] * width + column[None, :], value, mask=inside)


@triton.jit
def _round(
    value, inside, row, in_row, column, in_column, scales, pre_scale, input_scale, zero_point, slot, slots, sample, lowest, highest,
    CODES: tl.constexpr,
):  # fmt: skip
    """Codes of one tile: with the step's static scale, with one that is known for every ``sample`` rows, or (``scales`` given) with a
    scale per row, which is written too."""
    if scales is not None:
        if pre_scale is not None:
            value = value / tl.load(pre_scale + column, mask=in_column, other=1.0).to(tl.float32)[None, :]
        value = tl.where(inside, value, 0.0)
        if CODES == tl.int8:  # the range (-128 .. 127 of 8 bits) is not symmetric: each side has its own largest code
            scale = tl.maximum(tl.max(value, 1) / highest, tl.min(value, 1) / lowest)
        else:
            scale = tl.max(tl.abs(value), 1) / 448.0
        scale = tl.where(scale <= 1.1754943508222875e-38, 1.0, scale)  # a row of zeros keeps its zeros
        scale = tl.where(tl.max((value != value).to(tl.int32), 1) > 0, float("nan"), scale)  # int8 has no code for NaN, and it must show
        tl.store(scales + row, scale, mask=in_row)
        return to_codes(value * (1.0 / scale)[:, None], CODES)
    else:
        if sample is not None:
            scale = tl.load(input_scale + row // sample, mask=in_row, other=1.0)[:, None]
        else:
            scale = of_slot(input_scale, slot, slots)
        if pre_scale is not None:
            value = value * (1.0 / (scale * tl.load(pre_scale + column, mask=in_column, other=1.0).to(tl.float32)[None, :]))
        else:
            value = value * (1.0 / scale)
        if zero_point is not None:
            value += of_slot(zero_point, slot, slots) - 128.0
        if CODES == tl.int8:  # integers of fewer bits saturate earlier
            value = tl.minimum(tl.maximum(value, lowest), highest)
        return to_codes(value, CODES)


def _check(x: Tensor, pre_shift: Tensor | None, pre_scale: Tensor | None, width: int, dtype: torch.dtype) -> None:
    """Refuse what the kernel would read wrongly."""
    require(dtype in LARGEST, lambda: f"codes of dtype {dtype}: the kernel writes {', '.join(map(str, LARGEST))}")
    require(x.dtype in launch.FLOATS, lambda: f"quantizing a tensor of {x.dtype}: the kernel reads {', '.join(map(str, launch.FLOATS))}")
    require(width <= WIDEST, lambda: f"rows of {width} channels: the kernel holds a row in registers, at most {WIDEST}")
    check_vector(pre_shift, width, "pre_shift")
    check_vector(pre_scale, width, "pre_scale")
    check_fp8(dtype, x.device)


def run(
    x: Tensor,
    codes: Tensor,
    pre_shift: Tensor | None,
    pre_scale: Tensor | None,
    *,
    scales: Tensor | None = None,
    input_scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    slot: Tensor | None = None,
    sample: int | None = None,
    levels: tuple[float, float] = LEVELS,
) -> None:
    """Fill ``codes`` ``[rows, width]`` (and ``scales`` ``[rows]`` if given) from ``x`` ``[rows, width]``.

    With ``sample``, so many rows in turn have one scale of ``input_scale`` ``[rows / sample]``.
    """
    rows, width = codes.shape
    _check(x, pre_shift, pre_scale, width, codes.dtype)
    if rows == 0 or width == 0:
        if scales is not None:
            scales.fill_(1.0)
        return
    block = launch.size_class(width)
    many = max(1, min(TILE // block, 32)) if not launch.INTERPRETED else 4
    _quantize[(launch.tiles(rows, many),)](
        x, codes, scales, rows, width, x.stride(0), x.stride(1),
        pre_shift, pre_scale, input_scale, zero_point, slot, slots_of(input_scale, zero_point), sample, *levels,
        many, block, num_warps=max(4, min(16, block // 1024)),
    )  # fmt: skip


def _fake_static(x: Tensor, dtype: torch.dtype, **_: Any) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@launch.operation(_fake_static)
def quantize_static(
    x: Tensor,
    input_scale: Tensor,
    slot: Tensor | None = None,
    zero_point: Tensor | None = None,
    pre_shift: Tensor | None = None,
    pre_scale: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
    lowest: float = LEVELS[0],
    highest: float = LEVELS[1],
) -> Tensor:
    """Codes of ``x`` with the static scale of the current step.

    Args:
        x: ``[..., width]`` float, any strides.
        input_scale: ``[slots, 1]`` float32, of which the row of ``slot`` holds.
        slot: 0-d int64 on the same device; read by the kernel. May be None for a table of one row.
        zero_point: ``[slots, 1]`` float32 integers 0 .. 255 of affine 8-bit inputs; the codes are then ``q - 128`` as int8.
        pre_shift, pre_scale: ``[width]`` or None.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
        lowest, highest: the smallest and largest int8 code, for integers of fewer bits; affine ones count from -128.

    Returns:
        ``[..., width]`` codes, contiguous.

    Raises:
        UnsupportedError: on shapes or dtypes that the kernel does not know.
    """
    check_table(input_scale, slot, "input_scale")
    if zero_point is not None:
        check_table(zero_point, slot, "zero_point")
        require(dtype == torch.int8, lambda: f"a zero point belongs to 8-bit integers, not to {dtype}")
    codes = launch.new(x.shape, dtype, x.device)
    levels = (lowest, highest)
    run(rows_of(x), rows_of(codes), pre_shift, pre_scale, input_scale=input_scale, zero_point=zero_point, slot=slot, levels=levels)
    return codes


def _fake_per_token(x: Tensor, dtype: torch.dtype, **_: Any) -> tuple[Tensor, Tensor]:
    return _fake_static(x, dtype), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@launch.operation(_fake_per_token)
def quantize_per_token(
    x: Tensor,
    pre_shift: Tensor | None = None,
    pre_scale: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
    lowest: float = LEVELS[0],
    highest: float = LEVELS[1],
) -> tuple[Tensor, Tensor]:
    """Codes of ``x`` with one scale per row, found in the same pass: the smallest that saturates nothing.

    Args:
        x: ``[..., width]`` float, any strides.
        pre_shift, pre_scale: ``[width]`` or None.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
        lowest, highest: the smallest and largest int8 code, for integers of fewer bits.

    Returns:
        ``[..., width]`` codes and ``[rows]`` float32 scales.

    Raises:
        UnsupportedError: on shapes or dtypes that the kernel does not know.
    """
    codes, scales = launch.new(x.shape, dtype, x.device), launch.new((x.shape[:-1].numel(),), torch.float32, x.device)
    run(rows_of(x), rows_of(codes), pre_shift, pre_scale, scales=scales, levels=(lowest, highest))
    return codes, scales


def _fake_per_sample(x: Tensor, dtype: torch.dtype, **_: Any) -> tuple[Tensor, Tensor]:
    return _fake_static(x, dtype), x.new_empty(x.shape[0], dtype=torch.float32)


@launch.operation(_fake_per_sample)
def quantize_per_sample(
    x: Tensor,
    pre_shift: Tensor | None = None,
    pre_scale: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
    lowest: float = LEVELS[0],
    highest: float = LEVELS[1],
) -> tuple[Tensor, Tensor]:
    """Codes of ``x`` with one scale per item of the leading axis: the smallest that saturates nothing.

    A sample does not fit into registers, so its extremes are found first, channel by channel, in a pass of torch's own.

    Args:
        x: ``[N, ..., width]`` float, any strides.
        pre_shift, pre_scale, dtype, lowest, highest: as in :func:`quantize_per_token`.

    Returns:
        ``[N, ..., width]`` codes and ``[N]`` float32 scales. A sample with NaN has the scale NaN.

    Raises:
        UnsupportedError: on shapes or dtypes that the kernel does not know.
    """
    codes = launch.new(x.shape, dtype, x.device)
    if not x.numel():
        return codes, torch.ones(x.shape[0], device=x.device)
    ends = [end(tuple(range(1, x.ndim - 1))).float() for end in (x.amin, x.amax)]  # [N, width]
    low, high = ((value if pre_shift is None else value - pre_shift.float()) for value in ends)
    low, high = ((value if pre_scale is None else value / pre_scale.float()) for value in (low, high))
    if dtype == torch.int8:
        scales = torch.maximum(high.amax(1) / highest, low.amin(1) / lowest)
    else:
        scales = torch.maximum(high.abs(), low.abs()).amax(1) / LARGEST[dtype]
    scales = torch.where(scales <= torch.finfo(torch.float32).tiny, 1.0, scales)  # a sample of zeros keeps its zeros
    sample = rows_of(x).shape[0] // x.shape[0]
    run(rows_of(x), rows_of(codes), pre_shift, pre_scale, input_scale=scales, sample=sample, levels=(lowest, highest))
    return codes, scales
