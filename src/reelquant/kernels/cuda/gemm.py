"""Linear layers with 8-bit codes on both sides: ``[rows, depth]`` int8 or e4m3 codes times ``[columns, depth]`` weight codes.

Integers are summed exactly in int32. e4m3 products are summed by the tensor cores, which keep some 14 bits between the terms of one
instruction; ``tl.dot`` is told to move the partial sum to a float32 register after every tile of the depth.

What follows the product happens in registers: scales, zero point, bias, low-rank term, activation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelquant.kernels.cuda import launch
from reelquant.kernels.cuda.epilogue import ACTIVATION_KINDS, added, emit, place, scaled
from reelquant.kernels.cuda.launch import FP8, Tile, check_fp8, check_table, check_vector, choose, require, rows_of, slots_of

DEPTH_TILE = 128  # bytes: one line of the level-2 cache, and the widest swizzle of shared memory
DEEPEST = 65535  # twice depth * 128 * 128 stays below 2^31: product and zero-point correction together
LARGEST_RANK = 256
CODES = (torch.int8, torch.uint8, FP8)

TILES: list[Tile] = [
    ({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": DEPTH_TILE, "GROUP": 8}, warps, stages)
    for m, n, warps, stages in [
        (128, 256, 8, 3), (256, 128, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3), (64, 256, 4, 3),
        (128, 64, 4, 4), (64, 128, 4, 4), (64, 64, 4, 5), (32, 64, 4, 5), (16, 64, 4, 6), (16, 32, 2, 6),
    ]
]  # fmt: skip
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 2}


@launch.tuned(TILES, SMALL, key=["size", "columns", "depth"])
@triton.jit
def _product(
    codes, weight, out, rows, columns, depth, size,
    row_stride, depth_stride, weight_row_stride, weight_depth_stride, out_stride,
    input_scale, input_zero_point, slot, slots, weight_scale, weight_sums, bias, down, up, down_stride, up_stride, rank,
    ACTIVATION: tl.constexpr, PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr, EVEN: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = place(rows, columns, BLOCK_M, BLOCK_N, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    row, column, k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # Rows past the end repeat earlier ones instead of being masked: their products are never stored.
    left = codes + (row % rows).to(tl.int64)[:, None] * row_stride + k[None, :] * depth_stride
    right = weight + (column % columns).to(tl.int64)[None, :] * weight_row_stride + k[:, None] * weight_depth_stride
    KIND: tl.constexpr = weight.dtype.element_ty
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if KIND == tl.int8 else tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN:
            x, w = tl.load(left), tl.load(right)
        else:
            x = tl.load(left, mask=(k < depth - start)[None, :], other=0.0)
            w = tl.load(right, mask=(k < depth - start)[:, None], other=0.0)
        if codes.dtype.element_ty == tl.uint8:  # q - 128 in two's complement; past the depth the weight is zero
            x = (x ^ 128).to(tl.int8, bitcast=True)
        if KIND == tl.int8:
            product = tl.dot(x, w, product, out_dtype=tl.int32)
        else:
            product = tl.dot(x, w, product, max_num_imprecise_acc=BLOCK_K)
        left += BLOCK_K * depth_stride
        right += BLOCK_K * weight_depth_stride
    value = scaled(
        product, row, column, rows, columns, input_scale, input_zero_point, slot, slots, weight_scale, weight_sums, PER_TOKEN, PER_CHANNEL
    )
    value = added(value, row, column, rows, columns, bias, down, up, down_stride, up_stride, rank, RANK)
    value = emit(value, ACTIVATION, out.dtype.element_ty)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * out_stride + column[None, :], value, mask=inside)


def weight_sums(weight: Tensor) -> Tensor:
    """Row sums of int8 weight codes ``[out, ...]`` as int32 ``[out]``; made once per layer with affine inputs."""
    return weight.flatten(1).sum(1, dtype=torch.int32)


def check_input_scale(scale: Tensor, slot: Tensor | None, rows: int) -> bool:
    """Whether ``scale`` is per token or sample ``[rows]`` (True) or a table ``[slots, 1]`` (False)."""
    if scale.ndim == 1:
        check_vector(scale, rows, "an input_scale that was found at run time")
        require(scale.dtype == torch.float32, lambda: f"input_scale is float32, got {scale.dtype}")
        return True
    check_table(scale, slot, "input_scale")
    return False


def check_low_rank(down: Tensor | None, up: Tensor | None, rows: int, columns: int) -> int:
    """The padded rank of the low-rank term, 0 without one."""
    if down is None or up is None:
        require(down is None and up is None, lambda: "a low-rank term needs both factors, down [rows, rank] and up [columns, rank]")
        return 0
    require(
        down.dtype == up.dtype and down.dtype in (torch.bfloat16, torch.float16) and down.shape == (rows, up.shape[1])
        and up.shape[0] == columns and down.stride(1) == up.stride(1) == 1 and 0 < up.shape[1] <= LARGEST_RANK,
        lambda: f"a low-rank term is down [{rows}, rank] and up [{columns}, rank] of one 16-bit float type with contiguous rows and "
        f"rank 1 to {LARGEST_RANK}; got {tuple(down.shape)} {down.dtype} and {tuple(up.shape)} {up.dtype}",
    )  # fmt: skip
    return max(16, launch.size_class(up.shape[1]))


def check_output(dtype: torch.dtype) -> None:
    """Outputs are floats."""
    require(dtype in launch.FLOATS, lambda: f"an output of {dtype}: the kernels write {', '.join(map(str, launch.FLOATS))}")


def check_affine(zero_point: Tensor | None, sums: Tensor | None, slot: Tensor | None, columns: int, codes: torch.dtype) -> None:
    """Affine inputs come with the row sums of the weight; uint8 codes are always affine."""
    require(codes != torch.uint8 or zero_point is not None, lambda: "uint8 input codes need their input_zero_point")
    if zero_point is not None:
        require(codes != FP8, lambda: "a zero point belongs to 8-bit integers, not to float8 codes")
        require(
            sums is not None and sums.dtype == torch.int32,
            lambda: "affine inputs need weight_sums, int32 [columns]; make them once with weight_sums(weight)",
        )
        check_vector(sums, columns, "weight_sums")
        check_table(zero_point, slot, "input_zero_point")


def run(
    codes: Tensor,
    weight: Tensor,
    out: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    slot: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    input_zero_point: Tensor | None = None,
    sums: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> None:
    """Fill ``out`` ``[rows, columns]``, contiguous in its rows; arguments as in :func:`linear_8bit`."""
    (rows, depth), columns = codes.shape, weight.shape[0]
    require(weight.shape[1] == depth, lambda: f"codes with {depth} channels meet a weight with {weight.shape[1]}")
    require(depth <= DEEPEST, lambda: f"{depth} channels could overflow the int32 sums; the kernel takes at most {DEEPEST}")
    require(
        codes.dtype in CODES and weight.dtype == (FP8 if codes.dtype == FP8 else torch.int8),
        lambda: f"codes of {codes.dtype} meet a weight of {weight.dtype}; known: int8 or uint8 with int8, float8_e4m3fn with itself",
    )
    check_fp8(codes.dtype, codes.device)
    check_affine(input_zero_point, sums, slot, columns, codes.dtype)
    check_vector(weight_scale, columns if weight_scale.numel() != 1 else 1, "weight_scale")
    check_vector(bias, columns, "bias")
    check_output(out.dtype)
    per_token, rank = check_input_scale(input_scale, slot, rows), check_low_rank(down, up, rows, columns)
    kind, slots = choose(ACTIVATION_KINDS, activation, "activation"), slots_of(None if per_token else input_scale, input_zero_point)
    if rows == 0 or columns == 0:
        return
    _product[lambda tile: (launch.tiles(rows, tile["BLOCK_M"]) * launch.tiles(columns, tile["BLOCK_N"]),)](
        codes, weight, out, rows, columns, depth, launch.size_class(rows),
        codes.stride(0), codes.stride(1), weight.stride(0), weight.stride(1), out.stride(0),
        input_scale, input_zero_point, slot, slots, weight_scale, sums, bias,
        down, up, 0 if down is None else down.stride(0), 0 if up is None else up.stride(0), 0 if up is None else up.shape[1],
        kind, per_token, weight_scale.numel() > 1, depth % DEPTH_TILE == 0, rank,
    )  # fmt: skip


def _fake(codes: Tensor, weight: Tensor, out_dtype: torch.dtype, **_: Any) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=out_dtype)


@launch.operation(_fake)
def linear_8bit(
    codes: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    slot: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    input_zero_point: Tensor | None = None,
    weight_sums: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``activation(dequantize(codes) @ dequantize(weight)^T + bias + down @ up^T)``.

    Args:
        codes: ``[..., depth]`` int8 (symmetric, or affine ``q - 128``), uint8 (affine ``q``) or float8_e4m3fn.
        weight: ``[columns, depth]`` int8, or float8_e4m3fn with float8 codes, as stored.
        input_scale: float32 table ``[slots, 1]``, of which the row of ``slot`` holds, or ``[rows]`` with one scale per token.
        weight_scale: ``[columns]`` or ``[1]``, any float type.
        slot: 0-d int64 on the same device, for all tables.
        bias: ``[columns]`` or None.
        activation: ``none | gelu | gelu_tanh | silu``.
        input_zero_point: ``[slots, 1]`` float32 integers 0 .. 255 of affine inputs, with ``weight_sums`` ``[columns]`` int32.
        down, up: ``[rows, rank]`` and ``[columns, rank]``, both float16 or both bfloat16: the input and weight factors of a low-rank term.
        out_dtype: of the result.

    Returns:
        ``[..., columns]``.

    Raises:
        UnsupportedError: on dtypes, shapes or names the kernel does not know.

    Paper:
        The low-rank term inside of the product is SVDQuant's idea (arXiv:2411.05007, section 4.3). Ours: the up projection is added in
        the epilogue on tensor cores; the down projection is the caller's, because it reads float inputs and the codes are made elsewhere.
    """
    out = launch.new((*codes.shape[:-1], weight.shape[0]), out_dtype, codes.device)
    run(
        rows_of(codes), weight, rows_of(out), input_scale, weight_scale, slot, bias, activation,
        input_zero_point, weight_sums, down, up,
    )  # fmt: skip
    return out
