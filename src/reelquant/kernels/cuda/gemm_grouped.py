"""Linear layers whose weight is smaller than their input: 4-bit codes in groups with 8-bit or float inputs, 8-bit codes (int8 or e4m3)
with float inputs.

A byte of a packed checkpoint holds two neighbours along the depth, so unpacking a tile would interleave registers. :func:`repack_4bit`
changes that once, when a layer is loaded: a byte then holds two codes that lie half a group apart, and the two halves of an unpacked
group stand side by side. Codes become signed, so that two shifts unpack them.

Known cost: with 8-bit inputs every group of 64 ends in a conversion and a multiply-add per output, about as many cycles as its tensor
core instructions take on Hopper by their nominal rates. What 4 bits save here is memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from reelquant.formats import unpack
from reelquant.kernels.cuda import launch
from reelquant.kernels.cuda.epilogue import ACTIVATION_KINDS, added, emit, place, scaled
from reelquant.kernels.cuda.gemm import DEEPEST, check_input_scale, check_low_rank, check_output
from reelquant.kernels.cuda.launch import FP8, Tile, check_fp8, check_table, check_vector, choose, require, rows_of, slots_of

GROUPS = (64, 128)  # half a group is at least one int8 instruction deep
DEPTH_TILE = 64  # of 8-bit weights with float inputs

TILES: list[Tile] = [
    ({"BLOCK_M": m, "BLOCK_N": n, "GROUP": 8}, warps, stages)
    for m, n, warps, stages in [
        (128, 256, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4),
        (64, 64, 4, 4), (32, 64, 4, 5), (16, 64, 4, 5), (16, 128, 4, 5),
    ]
]  # fmt: skip
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "GROUP": 2}


@launch.tuned(TILES, SMALL, key=["size", "columns", "depth"])
@triton.jit
def _mixed(
    x, weight, group_scale, out, rows, columns, depth, size, row_stride, depth_stride, weight_stride, out_stride,
    input_scale, input_zero_point, slot, slots, weight_scale, weight_sums, bias, down, up, down_stride, up_stride, rank,
    ACTIVATION: tl.constexpr, PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr,
    BITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = place(rows, columns, BLOCK_M, BLOCK_N, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    row, column, k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    left = x + (row % rows).to(tl.int64)[:, None] * row_stride + k[None, :] * depth_stride
    channel = column % columns  # rows past the end repeat earlier ones; they are never stored
    BYTES: tl.constexpr = BLOCK_K * BITS // 8
    byte = tl.arange(0, BYTES)
    right = weight + channel.to(tl.int64)[:, None] * weight_stride + byte[None, :]
    KIND: tl.constexpr = x.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(tl.cdiv(depth, BLOCK_K)):
        tile = tl.load(left) if EVEN else tl.load(left, mask=(k < depth - group * BLOCK_K)[None, :], other=0.0)
        if EVEN or BITS == 4:  # repacked rows hold whole groups
            packed = tl.load(right)
        else:
            packed = tl.load(right, mask=(byte < depth - group * BLOCK_K)[None, :], other=0.0)
        if BITS == 4:
            scale = tl.load(group_scale + group * columns + channel).to(tl.float32)
            codes = tl.join((packed << 4) >> 4, packed >> 4)  # arithmetic shifts: both keep the sign
            codes = tl.reshape(tl.permute(codes, (0, 2, 1)), (BLOCK_N, BLOCK_K))
            if KIND == tl.int8:
                total += tl.dot(tile, tl.trans(codes), out_dtype=tl.int32).to(tl.float32) * scale[None, :]
            else:
                values = (codes.to(tl.float32) * scale[:, None]).to(KIND)
                total = tl.dot(tile, tl.trans(values), total)
        else:
            total = tl.dot(tile, tl.trans(packed.to(KIND)), total)  # int8 and e4m3 are exact in both 16-bit floats
        left += BLOCK_K * depth_stride
        right += BYTES
    value = scaled(
        total, row, column, rows, columns, input_scale, input_zero_point, slot, slots, weight_scale, weight_sums, PER_TOKEN, PER_CHANNEL
    )
    value = added(value, row, column, rows, columns, bias, down, up, down_stride, up_stride, rank, RANK)
    value = emit(value, ACTIVATION, out.dtype.element_ty)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * out_stride + column[None, :], value, mask=inside)


def repack_4bit(packed: Tensor, scale: Tensor, depth: int, group: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """The form of a packed 4-bit weight that the kernels read; made once per layer, in the same number of bytes.

    Args:
        packed: ``[out, ceil(depth / 2)]`` uint8 as stored: codes 0 .. 15 for -8 .. 7, low nibble first.
        scale: ``[out * ceil(depth / group)]`` as stored: the groups of a row lie together.
        depth: channels of the input.
        group: channels that share a scale.

    Returns:
        ``[out, ceil(depth / group) * group / 2]`` int8, byte ``j`` of a group holding channels ``j`` and ``j + group / 2`` as signed
        nibbles; the scales as ``[ceil(depth / group), out]``; the row sums of the dequantized weight ``[out]`` float32, for affine inputs.

    Raises:
        UnsupportedError: for groups the kernels do not know.
    """
    require(group in GROUPS, lambda: f"4-bit weights in groups of {group}: the kernels know {', '.join(map(str, GROUPS))}")
    out, groups = packed.shape[0], launch.tiles(depth, group)
    check_vector(scale, out * groups, "the group scales")
    nibbles = F.pad(unpack(packed, 4, depth) ^ 8, (0, groups * group - depth)).reshape(out, groups, 2, group // 2)
    signed = (nibbles ^ 8).float() - 8
    sums = (signed.flatten(2).sum(2) * scale.float().reshape(out, groups)).sum(1)
    repacked = (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).reshape(out, groups * group // 2)
    return repacked.view(torch.int8), scale.reshape(out, groups).t().contiguous(), sums


def run(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    depth_tile: int,
    bits: int,
    group_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    input_scale: Tensor | None = None,
    slot: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    input_zero_point: Tensor | None = None,
    sums: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> None:
    """Fill ``out`` ``[rows, columns]``, contiguous in its rows; arguments as in the public functions."""
    (rows, depth), columns = x.shape, weight.shape[0]
    width = depth if bits == 8 else launch.tiles(depth, depth_tile) * depth_tile // 2
    known = (torch.int8, FP8) if bits == 8 else (torch.int8,)
    check_fp8(weight.dtype, weight.device)
    require(
        weight.dtype in known and weight.shape[1] == width and (width <= 1 or weight.stride(1) == 1),
        lambda: (
            f"a {bits}-bit weight for {depth} channels is {' or '.join(map(str, known))} [{columns}, {width}] with contiguous rows, "
            f"got {weight.dtype} {tuple(weight.shape)}{'' if bits == 8 else '; repack_4bit makes it'}"
        ),
    )
    check_vector(bias, columns, "bias")
    check_output(out.dtype)
    per_token = input_scale is not None and check_input_scale(input_scale, slot, rows)
    rank, kind = check_low_rank(down, up, rows, columns), choose(ACTIVATION_KINDS, activation, "activation")
    if rows == 0 or columns == 0:
        return
    _mixed[lambda tile: (launch.tiles(rows, tile["BLOCK_M"]) * launch.tiles(columns, tile["BLOCK_N"]),)](
        x, weight, group_scale, out, rows, columns, depth, launch.size_class(rows),
        x.stride(0), x.stride(1), weight.stride(0), out.stride(0),
        input_scale, input_zero_point, slot, slots_of(None if per_token else input_scale, input_zero_point), weight_scale, sums, bias,
        down, up, 0 if down is None else down.stride(0), 0 if up is None else up.stride(0), 0 if up is None else up.shape[1],
        kind, per_token, weight_scale is not None and weight_scale.numel() > 1, depth % depth_tile == 0, rank, bits, depth_tile,
    )  # fmt: skip


def _check_group_scale(scale: Tensor, depth: int, columns: int, group: int) -> None:
    require(group in GROUPS, lambda: f"4-bit weights in groups of {group}: the kernels know {', '.join(map(str, GROUPS))}")
    shape = (launch.tiles(depth, group), columns)
    require(
        scale.shape == shape and scale.is_contiguous(),
        lambda: f"group scales are {list(shape)}, got {list(scale.shape)}; repack_4bit makes them",
    )


def _check_float(x: Tensor, what: str) -> None:
    require(
        x.dtype in (torch.bfloat16, torch.float16),
        lambda: f"{what} multiplies 16-bit floats on the tensor cores, got an input of {x.dtype}",
    )


def _fake_codes(codes: Tensor, weight: Tensor, out_dtype: torch.dtype, **_: Any) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=out_dtype)


def _fake_floats(x: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@launch.operation(_fake_codes)
def linear_w4a8(
    codes: Tensor,
    weight: Tensor,
    group_scale: Tensor,
    input_scale: Tensor,
    slot: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    group: int = 64,
    input_zero_point: Tensor | None = None,
    weight_sums: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """8-bit input codes times 4-bit weights: int32 sums inside of a group, float32 sums over the groups.

    Args:
        codes: ``[..., depth]`` int8, symmetric, or affine ``q - 128`` with ``input_zero_point`` and ``weight_sums``.
        weight, group_scale, weight_sums: as :func:`repack_4bit` returns them.
        group: channels that share a scale.
        input_scale, slot, bias, activation, input_zero_point, down, up, out_dtype: as in
            :func:`reelquant.kernels.cuda.gemm.linear_8bit`.

    Returns:
        ``[..., out]``.

    Raises:
        UnsupportedError: on dtypes, shapes or names the kernel does not know.
    """
    require(codes.dtype == torch.int8, lambda: f"input codes are int8 (affine ones as q - 128), got {codes.dtype}")
    require(codes.shape[-1] <= DEEPEST, lambda: f"the kernel takes at most {DEEPEST} channels, got {codes.shape[-1]}")
    _check_group_scale(group_scale, codes.shape[-1], weight.shape[0], group)
    if input_zero_point is not None:
        check_table(input_zero_point, slot, "input_zero_point")
        require(
            weight_sums is not None and weight_sums.dtype == torch.float32,
            lambda: "affine inputs need weight_sums, float32 [columns]; repack_4bit makes them",
        )
        check_vector(weight_sums, weight.shape[0], "weight_sums")
    out = launch.new((*codes.shape[:-1], weight.shape[0]), out_dtype, codes.device)
    run(
        rows_of(codes), weight, rows_of(out), group, 4, group_scale, None, input_scale, slot, bias, activation,
        input_zero_point, weight_sums, down, up,
    )  # fmt: skip
    return out


@launch.operation(_fake_floats)
def linear_w4a16(
    x: Tensor,
    weight: Tensor,
    group_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    group: int = 64,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Float inputs times 4-bit weights, dequantized in the tile: ``code * scale`` is rounded to the dtype of ``x`` before the product.

    Args:
        x: ``[..., depth]`` bfloat16 or float16, any strides.
        weight, group_scale: as :func:`repack_4bit` returns them.
        bias, activation, down, up: as in :func:`reelquant.kernels.cuda.gemm.linear_8bit`.
        group: channels that share a scale.

    Returns:
        ``[..., out]`` in the dtype of ``x``.

    Raises:
        UnsupportedError: on dtypes, shapes or names the kernel does not know.
    """
    _check_float(x, "a product with 4-bit weights")
    _check_group_scale(group_scale, x.shape[-1], weight.shape[0], group)
    out = launch.new((*x.shape[:-1], weight.shape[0]), x.dtype, x.device)
    run(rows_of(x), weight, rows_of(out), group, 4, group_scale, None, None, None, bias, activation, down=down, up=up)
    return out


@launch.operation(_fake_floats)
def linear_w8a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Float inputs times int8 or e4m3 weights: the codes are exact in 16-bit floats, the scale multiplies the sums.

    Args:
        x: ``[..., depth]`` bfloat16 or float16, any strides.
        weight: ``[out, depth]`` int8 or float8_e4m3fn, as stored.
        weight_scale: ``[out]`` or ``[1]``.
        bias, activation, down, up: as in :func:`reelquant.kernels.cuda.gemm.linear_8bit`.

    Returns:
        ``[..., out]`` in the dtype of ``x``.

    Raises:
        UnsupportedError: on dtypes, shapes or names the kernel does not know.
    """
    _check_float(x, "a product with 8-bit weights")
    check_vector(weight_scale, weight.shape[0] if weight_scale.numel() != 1 else 1, "weight_scale")
    out = launch.new((*x.shape[:-1], weight.shape[0]), x.dtype, x.device)
    run(rows_of(x), weight, rows_of(out), DEPTH_TILE, 8, None, weight_scale, None, None, bias, activation, down=down, up=up)
    return out
