"""What a process holds before it holds any model: Python, the libraries, and code that is read or made with the first call."""

from __future__ import annotations

import psutil
import torch
import torch.nn.functional as F
from torch import nn

from reelquant.formats import Granularity, Int, QuantSpec
from reelquant.planning.layers import quantized_layer
from reelquant.stages import Specs

SMALL = Specs(QuantSpec(Int(8), Granularity("channel")), QuantSpec(Int(8), Granularity("token", axis=-1), dynamic=True))


@torch.no_grad()
def process_bytes(dtype: torch.dtype, *, quantized: bool) -> int:
    """Resident memory of this process once operators of all kinds have run; of a CPU.

    Args:
        dtype: of the float parts.
        quantized: with the kernels of quantized layers, and the compiler that makes their loops.
    """
    x = torch.randn(2, 64, 64).to(dtype)
    heads = x.view(2, 64, 4, 16).transpose(1, 2)
    made = F.linear(F.layer_norm(F.gelu(x), (64,)), x[0]).float().softmax(-1)
    made = made.sum() + F.scaled_dot_product_attention(heads, heads, heads).float().sum()
    made += F.conv3d(x.view(1, 8, 4, 16, 16), x.new_ones(8, 8, 3, 3, 3)).float().sum()
    if quantized:
        made += quantized_layer(nn.Linear(64, 64, device="meta"), SMALL, dtype, "cpu")(x).float().sum()
    assert made.numel() == 1
    return psutil.Process().memory_info().rss
