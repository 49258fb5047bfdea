"""Codes as bits: exactly ``bits`` per code, little-endian, low bits first (so two 4-bit codes share a byte, low nibble first)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant._errors import CheckpointError


def packed_width(count: int, bits: int) -> int:
    """Bytes that a row of ``count`` codes takes."""
    return math.ceil(count * bits / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``[rows, count]`` (uint8, below ``2**bits``) into ``[rows, ceil(count * bits / 8)]`` uint8; rows start on a byte."""
    if bits == 8:
        return codes.contiguous()
    if bits == 4:
        even = F.pad(codes, (0, codes.shape[1] % 2))
        return even[:, ::2] | (even[:, 1::2] << 4)
    flat = (codes[..., None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    stream = flat.flatten(1)
    stream = F.pad(stream, (0, -stream.shape[1] % 8)).reshape(codes.shape[0], packed_width(codes.shape[1], bits), 8)
    return (stream << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`pack`: ``[rows, count]`` uint8.

    Raises:
        CheckpointError: if the bytes of a row do not match ``count`` codes.
    """
    if packed.shape[1] != packed_width(count, bits):
        raise CheckpointError(f"{count} codes of {bits} bits take {packed_width(count, bits)} bytes a row, got {packed.shape[1]}")
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :count]
    stream = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    stream = stream.flatten(1)[:, : count * bits].reshape(packed.shape[0], count, bits)
    return (stream << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(-1, dtype=torch.uint8)
