"""Convolutions of 8-bit codes in two and three dimensions as one matrix product, whose left side is gathered and never stored.

The sum runs over kernel positions and channels. Inputs are channels-last, so a step of the sum reads runs of channels; the weight is
repacked once (:func:`repack_convolution`) so that its rows lie in the same order. A 2-D convolution is a 3-D one of one frame.

Places outside of the input hold the code of zero. With a shift per channel that code differs from channel to channel, and with static
scales per step from step to step: :func:`padding_codes` makes the table once, and the kernel puts it where the input ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reelquant.kernels.cuda import launch
from reelquant.kernels.cuda.epilogue import ACTIVATION_KINDS, emit, place, scaled
from reelquant.kernels.cuda.gemm import DEEPEST, check_affine, check_input_scale, check_output
from reelquant.kernels.cuda.launch import FP8, Tile, check_fp8, check_vector, choose, require, slots_of

DEPTH_TILES = (128, 64, 32)  # channels per step: the first that divides them, else the last that is not far too long

TILES: list[Tile] = [
    ({"BLOCK_M": m, "BLOCK_N": n, "GROUP": 8}, warps, stages)
    for m, n, warps, stages in [
        (128, 256, 8, 3), (256, 128, 8, 3), (128, 128, 8, 3), (128, 128, 4, 3), (128, 64, 4, 4), (64, 64, 4, 4), (128, 32, 4, 4),
    ]
]  # fmt: skip
SMALL = {"BLOCK_M": 32, "BLOCK_N": 16, "GROUP": 2}


@launch.tuned(TILES, SMALL, key=["size", "columns", "depth", "steps"])
@triton.jit
def _convolve(
    codes, weight, out, rows, columns, depth, size, frames, height, width, out_frames, out_height, out_width, kernel_height, kernel_width,
    steps, stride_t, stride_h, stride_w, pad_t, pad_h, pad_w, dilation_t, dilation_h, dilation_w,
    batch_stride, channel_stride, frame_stride, row_stride, pixel_stride, weight_stride,
    input_scale, input_zero_point, slot, slots, weight_scale, weight_sums, bias, padding,
    ACTIVATION: tl.constexpr, PER_SAMPLE: tl.constexpr, PER_CHANNEL: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = place(rows, columns, BLOCK_M, BLOCK_N, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    row, column, k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    pixel = row % rows  # rows past the end repeat earlier ones; they are never stored
    left = pixel % out_width * stride_w - pad_w
    top = pixel // out_width % out_height * stride_h - pad_h
    first = pixel // (out_width * out_height) % out_frames * stride_t - pad_t
    source = codes + (pixel // (out_width * out_height * out_frames)).to(tl.int64) * batch_stride
    right = weight + (column % columns).to(tl.int64)[None, :] * weight_stride + k[:, None]
    if padding is not None and slot is not None:
        padding += tl.minimum(tl.load(slot), slots - 1) * depth
    KIND: tl.constexpr = weight.dtype.element_ty
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if KIND == tl.int8 else tl.float32)
    blocks = tl.cdiv(depth, BLOCK_K)
    for step in range(steps):  # one loop over kernel positions and channels keeps one software pipeline full
        position, channel = step // blocks, step % blocks * BLOCK_K
        x = left + position % kernel_width * dilation_w
        y = top + position // kernel_width % kernel_height * dilation_h
        t = first + position // (kernel_width * kernel_height) * dilation_t
        at = source + t.to(tl.int64) * frame_stride + y * row_stride + x * pixel_stride
        here = (k < depth - channel)[None, :]
        w = tl.load(right + position * depth + channel) if EVEN else tl.load(
            right + position * depth + channel, mask=(k < depth - channel)[:, None], other=0.0
        )  # fmt: skip
        address = at[:, None] + (channel + k)[None, :] * channel_stride
        if PADDED:
            inside = (t >= 0) & (t < frames) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            tile = tl.load(address, mask=inside[:, None] & here, other=0.0)
            if padding is not None:
                zero = tl.load(padding + channel + k, mask=k < depth - channel, other=0.0)
                tile = tl.where(inside[:, None], tile, zero[None, :])
        elif EVEN:
            tile = tl.load(address)
        else:
            tile = tl.load(address, mask=here, other=0.0)
        if KIND == tl.int8:
            product = tl.dot(tile, w, product, out_dtype=tl.int32)
        else:
            product = tl.dot(tile, w, product, max_num_imprecise_acc=BLOCK_K)
    value = scaled(
        product, row, column, rows, columns, input_scale, input_zero_point, slot, slots, weight_scale, weight_sums, PER_SAMPLE, PER_CHANNEL
    )
    if bias is not None:
        value += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    value = emit(value, ACTIVATION, out.dtype.element_ty)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], value, mask=inside)


def repack_convolution(weight: Tensor) -> Tensor:
    """Codes ``[out, in, (frames,) height, width]`` as ``[out, frames, height, width, in]``; made once per layer, in the same bytes."""
    return (weight.unsqueeze(2) if weight.ndim == 4 else weight).permute(0, 2, 3, 4, 1).contiguous()


def padding_codes(
    input_scale: Tensor,
    channels: int,
    shift: Tensor | None = None,
    pre_scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
    lowest: float = -128.0,
    highest: float = 127.0,
) -> Tensor:
    """What zero becomes in every channel and step: ``[slots, channels]`` codes, rounded as the quantizing kernel rounds.

    Args:
        input_scale, zero_point: ``[slots, 1]``.
        channels: of the input.
        shift, pre_scale: ``[channels]`` or None, the input's transform.
        dtype: of the codes; with a zero point int8 ``q - 128``.
        lowest, highest: as in :func:`reelquant.kernels.cuda.quantize.quantize_static`.
    """
    value = torch.zeros(channels, device=input_scale.device) if shift is None else -shift.float()
    unit = value * (1 / (input_scale if pre_scale is None else input_scale * pre_scale.float()))
    unit = unit if zero_point is None else unit + (zero_point - 128)
    return (unit.round().clamp(lowest, highest) if dtype == torch.int8 else unit.clamp(-448, 448)).to(dtype)


def _three(values: Sequence[int], ndim: int, fill: int) -> list[int]:
    """Settings of the spatial axes for three of them."""
    require(len(values) == ndim - 2, lambda: f"a convolution over {ndim - 2} axes has as many strides, paddings, dilations; got {values}")
    return [fill] * (5 - ndim) + list(values)


def out_shape(sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Any:
    """Frames, height and width of the output; at least 0."""
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    return [max((n + 2 * p - span) // s + 1, 0) for n, p, span, s in zip(sizes, padding, spans, stride, strict=True)]


def _check(codes: Tensor, weight: Tensor, pad: Sequence[int], zeros: Tensor | None, slots: int) -> None:
    require(
        codes.ndim in (4, 5) and weight.ndim == 5 and weight.is_contiguous() and weight.shape[4] == codes.shape[1],
        lambda: (
            "a convolution takes codes [batch, in, (frames,) height, width] and the weight of repack_convolution, "
            f"[out, frames, height, width, in] contiguous; got {tuple(codes.shape)} and {tuple(weight.shape)}"
        ),
    )
    require(
        codes.dtype == weight.dtype and codes.dtype in (torch.int8, FP8),
        lambda: f"codes and weight are both int8 (affine inputs as q - 128) or both float8_e4m3fn; got {codes.dtype}, {weight.dtype}",
    )
    require(
        weight[0].numel() <= DEEPEST if len(weight) else True,
        lambda: f"{weight[0].numel()} terms per output could overflow the int32 sums; the kernel takes at most {DEEPEST}",
    )
    require(codes.ndim == 5 or weight.shape[1] == 1, lambda: f"a 4-D input meets a kernel of {weight.shape[1]} frames")
    if zeros is not None and any(pad):
        require(
            zeros.dtype == codes.dtype and tuple(zeros.shape) == (slots, codes.shape[1]) and zeros.is_contiguous(),
            lambda: f"pad_codes are {codes.dtype} [{slots}, {codes.shape[1]}], contiguous; got {zeros.dtype} {tuple(zeros.shape)}",
        )
    check_fp8(codes.dtype, codes.device)


def _fake(
    codes: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], out_dtype: torch.dtype, **_: Any
) -> Tensor:
    flat = codes.ndim == 4
    sizes = out_shape(codes.shape[2:], weight.shape[2:4] if flat else weight.shape[1:4], stride, padding, dilation)
    return codes.new_empty((codes.shape[0], *sizes, weight.shape[0]), dtype=out_dtype).movedim(-1, 1)


@launch.operation(_fake)
def convolution_8bit(
    codes: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    slot: Tensor | None = None,
    bias: Tensor | None = None,
    pad_codes: Tensor | None = None,
    activation: str = "none",
    input_zero_point: Tensor | None = None,
    weight_sums: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``activation(convolution(dequantize(codes), dequantize(weight)) + bias)``.

    Args:
        codes: ``[batch, in, height, width]`` or ``[batch, in, frames, height, width]``, int8 or float8_e4m3fn; any strides, fast if
            channels-last.
        weight: what :func:`repack_convolution` returns.
        input_scale: float32 table ``[slots, 1]``, or ``[batch]`` with one scale per sample.
        weight_scale: ``[out]`` or ``[1]``.
        stride, padding, dilation: one number per spatial axis.
        slot: 0-d int64 on the same device, for all tables.
        bias: ``[out]`` or None.
        pad_codes: ``[slots, in]``, what :func:`padding_codes` returns; None where zero has the code 0, and with scales per sample.
        activation: ``none | gelu | gelu_tanh | silu``.
        input_zero_point, weight_sums: of affine inputs, whose codes are int8 ``q - 128``; as in
            :func:`reelquant.kernels.cuda.gemm.linear_8bit`.
        out_dtype: as there.

    Returns:
        ``[batch, out, (frames,) height, width]``, channels-last in memory.

    Raises:
        UnsupportedError: on dtypes, shapes or names the kernel does not know.
    """
    flat = codes.ndim == 4
    per_sample = check_input_scale(input_scale, slot, codes.shape[0])
    require(not per_sample or pad_codes is None, lambda: "with scales per sample zero has no code of its own; pad the input before")
    _check(codes, weight, padding, pad_codes, input_scale.shape[0])
    check_affine(input_zero_point, weight_sums, slot, weight.shape[0], codes.dtype)
    require(
        input_zero_point is None or pad_codes is not None or not any(padding),
        lambda: "affine inputs have no code 0 for zero: a padded convolution needs pad_codes; padding_codes makes them",
    )
    check_vector(weight_scale, weight.shape[0] if weight_scale.numel() != 1 else 1, "weight_scale")
    check_vector(bias, weight.shape[0], "bias")
    check_output(out_dtype)
    kind = choose(ACTIVATION_KINDS, activation, "activation")
    strides, pads, dilations = _three(stride, codes.ndim, 1), _three(padding, codes.ndim, 0), _three(dilation, codes.ndim, 1)
    x, kernel = codes.unsqueeze(2) if flat else codes, weight.shape[1:4]
    sizes = out_shape(x.shape[2:], kernel, strides, pads, dilations)
    out = launch.new((x.shape[0], *sizes, weight.shape[0]), out_dtype, codes.device)
    slots = slots_of(None if per_sample else input_scale, input_zero_point)
    if out.numel():
        input_scale = input_scale.repeat_interleave(math.prod(sizes)) if per_sample else input_scale  # a scale for every output
        depth, rows = x.shape[1], x.shape[0] * math.prod(sizes)
        tile = next((tile for tile in DEPTH_TILES if depth % tile == 0), 128 if depth > 128 else 64 if depth > 32 else 32)
        tile = 32 if launch.INTERPRETED else tile
        _convolve[lambda tiles: (launch.tiles(rows, tiles["BLOCK_M"]) * launch.tiles(weight.shape[0], tiles["BLOCK_N"]),)](
            x, weight, out, rows, weight.shape[0], depth, launch.size_class(rows), *x.shape[2:], *sizes, *kernel[1:],
            math.prod(kernel) * launch.tiles(depth, tile), *strides, *pads, *dilations, *x.stride(), math.prod(weight.shape[1:]),
            input_scale, input_zero_point, slot, slots, weight_scale, weight_sums, bias,
            pad_codes if any(pads) else None,
            kind, per_sample, weight_scale.numel() > 1, any(pads), depth % tile == 0, tile,
        )  # fmt: skip
    return (out.squeeze(1) if flat else out).movedim(-1, 1)
