"""Attention whose query-key product is made of 8-bit integers, tile by tile, so that no score leaves the chip.

    keys     = k - mean over tokens of k                       # adds q . mean to all scores of a query: softmax does not see it
    scores   = (codes(q) . codes(keys)) * scale_q * scale_k    # one scale per token, int32 sums
    output   = softmax(scores) . v                             # 16-bit floats, or e4m3 with a scale per channel of v

Launches per call: the mean of the keys, their codes, the attention; with ``float8_values`` also the maxima and codes of the values.
Queries are rounded inside of the attention kernel, which reads each of them once anyway.

Paper:
    SageAttention (arXiv:2410.02367, sections 4.2 to 4.4), and for e4m3 values SageAttention2 (arXiv:2411.10958). Ours: a scale per
    token on both sides (theirs: per block, or per group of registers), because the scale of a query costs nothing (it multiplies
    inside of the exponential's own multiply-add) and that of a key one multiplication per score; float32 sums of P . V (theirs: float16
    for 16-bit values); no per-query correction of the log-sum-exp, which is not returned; P is scaled by 448 in the exponent.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from reelquant.kernels.attention_quant import key_bias, over_keys
from reelquant.kernels.cuda import launch
from reelquant.kernels.cuda.epilogue import to_codes, to_int8
from reelquant.kernels.cuda.launch import FP8, Tile, check_fp8, require

WIDEST_HEAD = 256
KEY_TILE = 64  # tokens per program of the two small kernels
PADDING = 16  # bytes: rows of transposed values start where 16-byte loads may

TILES: list[Tile] = [
    ({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)
    for m, n, warps, stages in [
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 3), (32, 32, 2, 2),
    ]
]  # fmt: skip
SMALL = {"BLOCK_M": 32, "BLOCK_N": 32}


@triton.jit
def _quantize_keys(
    k, mean, codes, scales, tokens, heads, width, batch_stride, head_stride, token_stride, channel_stride,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """int8 codes ``[batch, heads, tokens, width]`` of ``k - mean``, and a scale per token."""
    tiles = tl.cdiv(tokens, BLOCK)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    token, channel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (token < tokens)[:, None] & (channel < width)[None, :]
    source = k + head // heads * batch_stride + head % heads * head_stride
    value = tl.load(source + token.to(tl.int64)[:, None] * token_stride + channel[None, :] * channel_stride, mask=inside, other=0.0)
    center = tl.load(mean + head * width + channel, mask=channel < width, other=0.0)
    value = tl.where(inside, value.to(tl.float32) - center[None, :], 0.0)
    largest = tl.maximum(tl.max(tl.abs(value), 1), 1e-30)
    row = head * tokens + token
    tl.store(scales + row, largest / 127.0, mask=token < tokens)
    tl.store(codes + row[:, None] * width + channel[None, :], to_int8(value * (127.0 / largest)[:, None]), mask=inside)


@triton.jit
def _quantize_values(
    v, largest, codes, tokens, padded, heads, width, batch_stride, head_stride, token_stride, channel_stride,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """e4m3 codes ``[batch, heads, width, padded]``: Hopper's float8 products want the summed dimension, here tokens, contiguous."""
    tiles = tl.cdiv(padded, BLOCK)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    token, channel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (token < tokens)[:, None] & (channel < width)[None, :]
    source = v + head // heads * batch_stride + head % heads * head_stride
    value = tl.load(source + token.to(tl.int64)[:, None] * token_stride + channel[None, :] * channel_stride, mask=inside, other=0.0)
    high = tl.maximum(tl.load(largest + head * width + channel, mask=channel < width, other=1.0), 1e-30)
    value = to_codes(value.to(tl.float32) * (448.0 / high)[None, :], codes.dtype.element_ty)
    target = codes + (head * width + channel[:, None]) * padded + token[None, :]
    tl.store(target, tl.trans(value), mask=(channel < width)[:, None] & (token < padded)[None, :])


@triton.jit
def _walk(
    queries, query_scale, sums, total, high, keys, key_scale, key_bias, values, value_token_stride, start, end, tokens, channel, width,
    MASKED: tl.constexpr, EVEN: tl.constexpr, FLOAT8: tl.constexpr, BLOCK_N: tl.constexpr, value_channel_stride,
):  # fmt: skip
    """Take the keys ``start .. end`` into the running softmax: weighted ``sums``, ``total`` weight and ``high``, the largest score."""
    # P lies in 0 .. 1; times 448 it uses all of e4m3. The factor is in sums and total alike and leaves with the division.
    HEADROOM = 8.807354922057604 if FLOAT8 else 0.0
    for first in range(start, end, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        there, here = token < tokens, channel < width
        at = token.to(tl.int64)
        if MASKED or not EVEN:
            k = tl.load(keys + at[None, :] * width + channel[:, None], mask=there[None, :] & here[:, None], other=0)
            scale = tl.load(key_scale + token, mask=there, other=0.0)
        else:
            k, scale = tl.load(keys + at[None, :] * width + channel[:, None]), tl.load(key_scale + token)
        scores = tl.dot(queries, k, out_dtype=tl.int32).to(tl.float32) * scale[None, :]
        if MASKED:
            scores = tl.where(there[None, :], scores, float("-inf"))
        if key_bias is not None:
            scores = scores * query_scale[:, None] + tl.load(key_bias + token, mask=there, other=0.0)[None, :]
            higher = tl.maximum(high, tl.max(scores, 1))
            weights = tl.math.exp2(scores - (higher - HEADROOM)[:, None])
        else:
            higher = tl.maximum(high, tl.max(scores, 1) * query_scale)
            weights = tl.math.exp2(scores * query_scale[:, None] - (higher - HEADROOM)[:, None])
        decay = tl.math.exp2(high - higher)
        total = total * decay + tl.sum(weights, 1)
        sums *= decay[:, None]
        if FLOAT8:
            address = values + channel[:, None] * value_channel_stride + at[None, :]
            if MASKED or not EVEN:
                v = tl.load(address, mask=there[None, :] & here[:, None], other=0.0)
            else:
                v = tl.load(address)
            sums = tl.dot(weights.to(tl.float8e4nv), tl.trans(v), sums, max_num_imprecise_acc=BLOCK_N)
        else:
            address = values + at[:, None] * value_token_stride + channel[None, :] * value_channel_stride
            if MASKED or not EVEN:
                v = tl.load(address, mask=there[:, None] & here[None, :], other=0.0)
            else:
                v = tl.load(address)
            sums = tl.dot(weights.to(v.dtype), v, sums)
        high = higher
    return sums, total, high


@launch.tuned(TILES, SMALL, key=["size", "key_size", "width"])
@triton.jit
def _attend(
    q, keys, key_scale, key_bias, v, value_largest, out, factor, query_tokens, tokens, size, key_size, heads, shared, width,
    q_batch, q_head, q_token, q_channel, v_batch, v_head, v_token, v_channel, out_batch, out_head, out_token,
    bias_batch, bias_head,
    EVEN: tl.constexpr, FLOAT8: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(query_tokens, BLOCK_M)
    both = (tl.program_id(0) // tiles).to(tl.int64)  # neighbouring programs read the same keys
    batch, head = both // heads, both % heads
    row, channel = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    inside = (row < query_tokens)[:, None] & (channel < width)[None, :]
    source = q + batch * q_batch + head * q_head + row.to(tl.int64)[:, None] * q_token + channel[None, :] * q_channel
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(value), 1), 1e-30)
    queries = to_int8(value * (127.0 / largest)[:, None])
    query_scale = largest * factor  # factor = attention scale * log2(e) / 127: exp2 is the hardware's exponential
    group = batch * (heads // shared) + head // shared  # query heads that share keys and values lie next to each other
    keys += group * tokens * width
    key_scale += group * tokens
    v += batch * v_batch + head // shared * v_head
    start = float("-inf")
    if key_bias is not None:
        key_bias += batch * bias_batch + head * bias_head
        start = -1e30  # finite: a tile of keys may be masked completely, and infinity minus infinity is NaN
    sums = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    total, high = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), start, tl.float32)
    whole = tokens // BLOCK_N * BLOCK_N
    sums, total, high = _walk(
        queries, query_scale, sums, total, high, keys, key_scale, key_bias, v, v_token, 0, whole, tokens, channel, width,
        False, EVEN, FLOAT8, BLOCK_N, v_channel,
    )  # fmt: skip
    if whole < tokens:
        sums, total, high = _walk(
            queries, query_scale, sums, total, high, keys, key_scale, key_bias, v, v_token, whole, tokens, tokens, channel, width,
            True, EVEN, FLOAT8, BLOCK_N, v_channel,
        )  # fmt: skip
    sums *= (1.0 / total)[:, None]
    if FLOAT8:
        sums *= tl.maximum(tl.load(value_largest + group * width + channel, mask=channel < width, other=0.0), 1e-30)[None, :] / 448.0
    target = out + batch * out_batch + head * out_head + row.to(tl.int64)[:, None] * out_token + channel[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=inside)


def _key_codes(k: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes ``[batch, heads, tokens, width]`` and scales ``[batch, heads, tokens]`` of the centered keys."""
    batch, heads, tokens, width = k.shape
    codes = launch.new(k.shape, torch.int8, k.device)
    scales = launch.new(k.shape[:3], torch.float32, k.device)
    mean = k.mean(2, dtype=torch.float32)
    _quantize_keys[(batch * heads * launch.tiles(tokens, KEY_TILE),)](
        k, mean, codes, scales, tokens, heads, width, *k.stride(), KEY_TILE, block, num_warps=4
    )
    return codes, scales


def _value_codes(v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes ``[batch, heads, width, padded tokens]`` and the largest magnitude of every channel ``[batch, heads, width]``."""
    batch, heads, tokens, width = v.shape
    padded = launch.tiles(tokens, PADDING) * PADDING
    codes = launch.new((batch, heads, width, padded), FP8, v.device)
    largest = torch.linalg.vector_norm(v, math.inf, 2, dtype=torch.float32)
    _quantize_values[(batch * heads * launch.tiles(padded, KEY_TILE),)](
        v, largest, codes, tokens, padded, heads, width, *v.stride(), KEY_TILE, block, num_warps=4
    )
    return codes, largest


def _check(q: Tensor, k: Tensor, v: Tensor, float8_values: bool) -> None:
    require(
        q.ndim == 4 and k.shape == v.shape and k.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
        and (q.shape[1] % k.shape[1] == 0 if k.shape[1] else q.shape[1] == 0),
        lambda: "attention takes q [batch, heads, tokens, width] and k, v of one shape, whose heads divide those of q; "
        f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}",
    )  # fmt: skip
    require(
        q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16),
        lambda: f"attention takes bfloat16 or float16, alike for q, k and v; got {q.dtype}, {k.dtype}, {v.dtype}",
    )
    require(0 < q.shape[3] <= WIDEST_HEAD, lambda: f"heads of width {q.shape[3]}: the kernel holds 1 to {WIDEST_HEAD} channels")
    if float8_values:
        check_fp8(FP8, q.device)


def _fake(q: Tensor, **_: Any) -> Tensor:
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


@launch.operation(_fake)
def attention_codes(q: Tensor, k: Tensor, v: Tensor, scale: float, float8_values: bool, bias: Tensor | None = None) -> Tensor:
    """What :func:`attention_8bit` computes; arguments are checked there."""
    (batch, heads, query_tokens, width), tokens = q.shape, k.shape[2]
    out = launch.new((batch, query_tokens, heads, width), q.dtype, q.device).transpose(1, 2)
    if out.numel() == 0:
        return out
    if tokens == 0:
        return out.zero_()
    block = max(32, launch.size_class(width))  # the shortest int8 product of the tensor cores
    keys, key_scale = _key_codes(k, block)
    values, largest = _value_codes(v, block) if float8_values else (v, None)
    if bias is not None:  # exp2 is the hardware's exponential
        bias = (bias * math.log2(math.e)).contiguous()
    places = (
        (0, 0) if bias is None else [0 if size == 1 else stride for size, stride in zip(bias.shape[:2], bias.stride()[:2], strict=True)]
    )
    strides = (*values.stride()[:2], 1, values.stride(2)) if float8_values else values.stride()
    _attend[lambda tile: (batch * heads * launch.tiles(query_tokens, tile["BLOCK_M"]),)](
        q, keys, key_scale, bias, values, largest, out, scale * math.log2(math.e) / 127, query_tokens, tokens,
        launch.size_class(query_tokens), launch.size_class(tokens), heads, heads // k.shape[1], width,
        *q.stride(), *strides, *out.stride()[:3], *places, width == block, float8_values, block,
    )  # fmt: skip
    return out


def attention_8bit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    float8_values: bool = False,
    exact: bool = False,
) -> Tensor:
    """``softmax(q k^T * scale) v`` with int8 scores.

    Args:
        q: ``[batch, heads, query tokens, width]`` bfloat16 or float16, any strides.
        k, v: ``[batch, key heads, tokens, width]``, same dtype; key heads divide the heads of q.
        scale: None for ``1 / sqrt(width)``.
        mask: None, or one over keys, ``[1 or batch, 1 or heads, 1, tokens]``: bool, or floats that are added to the scores; callers with
            others use ``F.scaled_dot_product_attention``.
        float8_values: multiply by the values in e4m3 (compute capability 8.9 or later) instead of in the dtype of q.
        exact: compute this call with stock float attention instead, for denoising steps that a recipe protects.

            A decision of the host, not a table read in the kernel: a kernel with both paths would hold the registers of the larger one
            and would round keys in vain. It costs no synchronization, because the clock knows its timestep on the host since the tick.

    Returns:
        ``[batch, heads, query tokens, width]`` in the dtype of q; outside of ``exact`` calls a view of ``[batch, tokens, heads, width]``
        memory, so that flattening the heads is free.

    Raises:
        UnsupportedError: with a mask over pairs of tokens, or on dtypes and shapes the kernel does not know.
    """
    require(
        mask is None or over_keys(mask, q, k),
        lambda: "attention with 8-bit scores takes masks over keys [1 or batch, 1 or heads, 1, tokens], not "
        f"{mask is not None and tuple(mask.shape)}; use torch's scaled_dot_product_attention for this call",
    )  # fmt: skip
    _check(q, k, v, float8_values and not exact)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if exact:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return attention_codes(q, k, v, scale, float8_values, key_bias(mask))
