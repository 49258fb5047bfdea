"""What the processor's integer products can hold."""

from __future__ import annotations

import functools

import torch

PAIRS = 32767
"""Without VNNI, two products of bytes are added in 16 bits that saturate (vpmaddubsw); OpenVINO's kernels then give wrong sums."""


@functools.cache
def integers_saturate() -> bool:
    """Whether pairs of 8-bit products are added in 16 bits on this processor."""
    return not torch.cpu._is_vnni_supported()
