"""Gated activations in one pass: both halves of a row are read, one of them is activated, their product is written."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reelquant.kernels.cpu import loops
from reelquant.kernels.cpu.options import compiled
from reelquant.kernels.cpu.powers import ACTIVATION_CODES, activate


def refuses(x: Tensor) -> str | None:
    """Why torch should compute this, or None."""
    return None if x.dtype in (torch.float32, torch.bfloat16) else f"{x.dtype} is not read by loops"


def gate(x: Tensor, activation: str, first: bool) -> Tensor:
    """``activation(a) * b``, or ``a * activation(b)`` if not ``first``, of the halves a, b of the last axis; computed in float32.

    Args:
        x: ``[..., 2 * channels]`` float32 or bfloat16.

    Returns:
        ``[..., channels]`` in the dtype of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(len(rows), x.shape[-1] // 2, dtype=x.dtype)
    loops.spread(gate_rows, len(rows), rows.numel(), loops.view(rows), ACTIVATION_CODES[activation], first, loops.view(out))
    return out.view(*x.shape[:-1], -1)


@compiled(**loops.EXACT)
def gate_rows(start, stop, x, which, first, out):  # type: ignore[no-untyped-def]
    """:func:`gate` of rows ``[rows, 2 * channels]``."""
    channels = out.shape[1]
    a, b = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for i in range(start, stop):
        loops.read(x[i, :channels], a)
        loops.read(x[i, channels:], b)
        activate(a if first else b, which)
        for j in range(channels):
            a[j] *= b[j]
        loops.write(a, out[i])
