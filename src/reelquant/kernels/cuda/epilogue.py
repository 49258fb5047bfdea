"""Functions that run inside of kernels: activations, rounding to codes, and everything between an accumulator and its output."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATION_KINDS: dict[str, int] = {"none": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}

# 1.5 * 2^23: adding it to a float32 below 2^22 leaves no bits behind the point, so the hardware's own rounding (nearest, ties to even)
# does the work, and the low byte of the sum is the integer in two's complement.
_ROUNDING = tl.constexpr(12582912.0)
_LARGEST_E4M3 = tl.constexpr(448.0)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """One of ``ACTIVATION_KINDS`` on float32. gelu_tanh is written with a sigmoid: ``(1 + tanh(u)) / 2 = sigmoid(2 u)``."""
    if KIND == 1:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == 3:
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def to_int8(x):
    """Nearest integer, ties to even, saturated to -128 .. 127. NaN has no code and becomes any."""
    x = tl.minimum(tl.maximum(x, -128.0), 127.0)
    return (x + _ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def to_codes(x, CODES: tl.constexpr):
    """Float32 units to codes of the element type ``CODES``: int8 or e4m3, both saturating; NaN has a code in e4m3 and keeps it."""
    if CODES == tl.int8:
        return to_int8(x)
    else:
        x = tl.maximum(x, -_LARGEST_E4M3, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(x, _LARGEST_E4M3, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def of_slot(table, slot, slots):
    """The scale of the current step, read on the device: the host never waits for the clock. A table of one row holds for all steps."""
    if slot is not None:
        return tl.load(table + tl.minimum(tl.load(slot), slots - 1))
    else:
        return tl.load(table)


@triton.jit
def place(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column tile of this program. ``GROUP`` row tiles are walked together, so that programs that run at the same time read
    the same few tiles of both operands and find them in the level-2 cache."""
    many_m, many_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * many_n) * GROUP
    high = tl.minimum(many_m - first, GROUP)
    inner = program % (GROUP * many_n)
    return first + inner % high, inner // high


@triton.jit
def scaled(
    product, row, column, rows, columns, input_scale, input_zero_point, slot, slots, weight_scale, weight_sums,
    PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Float32 values of an accumulator tile ``[BLOCK_M, BLOCK_N]``.

    With int8 codes ``c = q - 128`` of affine inputs, ``sum (q - z) w = sum c w + (128 - z) sum w``, exact where both sums are int32.
    """
    if input_zero_point is not None:
        sums = tl.load(weight_sums + column, mask=column < columns, other=0)
        product += ((128.0 - of_slot(input_zero_point, slot, slots)).to(sums.dtype) * sums)[None, :]
    value = product.to(tl.float32)
    if PER_TOKEN:
        value *= tl.load(input_scale + row, mask=row < rows, other=0.0)[:, None]
    elif input_scale is not None:
        value *= of_slot(input_scale, slot, slots)
    if PER_CHANNEL:
        value *= tl.load(weight_scale + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    elif weight_scale is not None:
        value *= tl.load(weight_scale).to(tl.float32)
    return value


@triton.jit
def added(value, row, column, rows, columns, bias, down, up, down_stride, up_stride, rank, RANK: tl.constexpr):
    """Bias and the low-rank term ``down @ up^T`` on top of a tile; ``RANK``: the rank, padded to a power of two the tensor cores take."""
    if bias is not None:
        value += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if RANK > 0:
        index = tl.arange(0, RANK)
        left = tl.load(
            down + row.to(tl.int64)[:, None] * down_stride + index[None, :], mask=(row < rows)[:, None] & (index < rank)[None, :], other=0.0
        )
        right = tl.load(
            up + column[None, :] * up_stride + index[:, None], mask=(column < columns)[None, :] & (index < rank)[:, None], other=0.0
        )
        value = tl.dot(left, right, value)
    return value


@triton.jit
def emit(value, ACTIVATION: tl.constexpr, TYPE: tl.constexpr):
    """The activated output."""
    return activate(value, ACTIVATION).to(TYPE)
