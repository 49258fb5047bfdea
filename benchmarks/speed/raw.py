"""oneDNN's own quantized operators as torch carries them: the fastest int8 products there are without a line of our code.

Activations are uint8 with a real zero point: with int8 ones ``qlinear_pointwise`` silently takes a reference kernel, thousands of times
slower, and the convolution refuses them. Weights are int8 per output channel; the answer is in the float numbers of the machine. Without
VNNI sums of full-range codes saturate: fast and wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reelquant.kernels import native_float

ZERO_POINT, INPUT_SCALE, WEIGHT_SCALE = 128, 0.02, 0.01


def _per_channel(channels: int) -> tuple[Tensor, Tensor]:
    return torch.full((channels,), WEIGHT_SCALE), torch.zeros(channels, dtype=torch.long)


def linear(codes: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = INPUT_SCALE) -> Callable[[], Tensor]:
    """``[m, k]`` uint8 times ``[n, k]`` int8 to floats ``[m, n]``, the weight repacked beforehand."""
    scales, zeros = _per_channel(weight.shape[0])
    packed = torch.ops.onednn.qlinear_prepack(weight, list(codes.shape))

    def work() -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            codes, scale, ZERO_POINT, packed, scales, zeros, bias, 1.0, 0, native_float(), "none", [], ""
        )

    return work


def random_linear(m: int, k: int, n: int) -> Callable[[], Tensor]:
    """A product of random codes."""
    return linear(torch.randint(0, 256, (m, k), dtype=torch.uint8), torch.randint(-127, 128, (n, k), dtype=torch.int8))


def convolution(
    codes: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: Sequence[int], padding: Sequence[int], scale: float = INPUT_SCALE
) -> Callable[[], Tensor]:
    """A 2-D or 3-D convolution of uint8 codes with int8 weights to floats, both channels-last, the weight repacked beforehand."""
    spatial = codes.ndim - 2
    scales, zeros = _per_channel(weight.shape[0])
    ones = [1] * spatial
    packed = torch.ops.onednn.qconv_prepack(weight, scales, scale, ZERO_POINT, list(stride), list(padding), ones, 1, list(codes.shape))
    codes = codes.contiguous(memory_format=torch.channels_last if spatial == 2 else torch.channels_last_3d)

    def work() -> Tensor:
        return torch.ops.onednn.qconv_pointwise(
            codes, scale, ZERO_POINT, packed, scales, zeros, bias, list(stride), list(padding), ones, 1, 1.0, 0, native_float(),
            "none", [], "",
        )  # fmt: skip

    return work
