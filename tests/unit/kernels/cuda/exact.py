"""What 8-bit products and activations give in float64, and how far a kernel may be from that."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant.kernels.cuda.launch import FP8

ACTIVATE = {"none": lambda x: x, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def codes(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """Random codes over the whole range."""
    if dtype == FP8:
        return (torch.randn(shape) * 3).to(FP8).to(DEVICE)
    low = 0 if dtype == torch.uint8 else -128
    return torch.randint(low, low + 256, shape, dtype=dtype).to(DEVICE)


def exact(x: Tensor, weight: Tensor, input_scale: Tensor | float, weight_scale: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """The output in float64, and the sum of the magnitudes of all its terms, to which float32 sums are relative."""
    dense = lambda t: t.cpu().to(torch.float64)  # noqa: E731
    values, kernel = dense(x), dense(weight)
    values = (values - rest.get("zero", 0.0)) * (dense(input_scale)[:, None] if isinstance(input_scale, Tensor) else input_scale)
    kernel = kernel * dense(weight_scale).reshape(-1, 1)
    out, size = values @ kernel.T, values.abs() @ kernel.abs().T
    if (bias := rest.get("bias")) is not None:
        out, size = out + dense(bias), size + dense(bias).abs()
    if (down := rest.get("down")) is not None:
        out, size = out + dense(down) @ dense(rest["up"]).T, size + dense(down).abs() @ dense(rest["up"]).abs().T
    return ACTIVATE[rest.get("activation", "none")](out), size


def assert_close(out: Tensor, expected: Tensor, size: Tensor) -> None:
    """Half a unit in the last place of the output, plus float32 arithmetic on the terms (2^-20: some roundings and sums).

    The integer sum is exact; of float8 products, partial sums of one instruction are kept to 14 bits on Hopper, hence 2^-13 there.
    """
    assert out.shape == expected.shape
    error = (out.cpu().double() - expected).abs()
    bound = expected.abs() * ROUNDING[out.dtype] + size * 2**-20 + 1e-30 + (6e-8 if out.dtype == torch.float16 else 0)
    assert not out.isnan().any() and not (error > bound).any(), f"worst ratio {float((error / bound).max())}"
