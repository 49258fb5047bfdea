"""I3D, the network whose features FVD is measured on.

Definition: Inception-I3D, RGB stream, trained on Kinetics-400 (the module ``deepmind/i3d-kinetics-400/1`` of TF Hub);
the feature of a clip is its 400 class logits, averaged over time, before the softmax.

Preprocessing: frames are rounded to 8 bits, each is resized to 224x224 (bilinear, half-pixel centres, no antialiasing)
and scaled to [-1, 1]. Ours against theirs: this is PyTorch's bilinear resize, as in the ports that most papers use
(StyleGAN-V, VideoGPT); the original script of Unterthiner et al. resizes with TensorFlow 1's ``resize_bilinear``, whose
sampling points lie up to half a pixel aside. StyleGAN-V says the same of itself ("up to the upsampling operation").
Pictures that are 224x224 already are the same under all three.

Paper:
    Carreira and Zisserman, Quo Vadis, Action Recognition?, 2017, figure 3.
    Unterthiner et al., Towards Accurate Generative Models of Video, 2018, section 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant._errors import MeasurementError, UnsupportedError

RESOLUTION = 224
FEATURES = 400
MIN_FRAMES = 9  # time is halved three times, rounding up, and the last average spans 2 moments: ceil(9 / 8) = 2
EPSILON = 1e-3

_WIDE, _DEEP, _LAST = (
    ((1, 3, 3), (1, 2, 2)),
    ((3, 3, 3), (2, 2, 2)),
    ((2, 2, 2), (2, 2, 2)),
)  # pools: kernel, stride in (time, h, w)
# inputs, and outputs of the branches: 1x1 | 1x1 then 3x3 | 1x1 then 3x3 | pool then 1x1
_MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "MaxPool3d_4a_3x3": _DEEP,
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "MaxPool3d_5a_2x2": _LAST,
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}
_KEYS = {
    "kernel": "params.{}.Conv_0.kernel",
    "bias": "params.{}.Conv_0.bias",
    "beta": "params.{}.BatchNorm_0.bias",
    "mean": "batch_stats.{}.BatchNorm_0.mean",
    "var": "batch_stats.{}.BatchNorm_0.var",
}


def _pad_same(maps: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """TensorFlow's SAME: what is odd goes behind. Zeros also do for the max pools, for they follow a ReLU."""
    sides: list[int] = []
    for size, k, s in zip(maps.shape[:1:-1], reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(maps, sides) if any(sides) else maps


class _Pool(nn.Module):
    def __init__(self, kernel: tuple[int, ...], stride: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, maps: Tensor) -> Tensor:
        return F.max_pool3d(_pad_same(maps, self.kernel, self.stride), self.kernel, self.stride)


class _Unit(nn.Module):
    """Convolution, batch normalization without a scale, ReLU; the normalization is folded into the convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.size, self.stride = (kernel,) * 3, (stride,) * 3
        self.kernel = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel, kernel))
        self.beta = nn.Parameter(torch.empty(outputs))
        self.mean = nn.Parameter(torch.empty(outputs, 1, 1, 1, 1))
        self.var = nn.Parameter(torch.empty(outputs, 1, 1, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        scale = (self.var + EPSILON).rsqrt()
        bias = self.beta - (self.mean * scale).flatten()
        maps = _pad_same(maps, self.size, self.stride)
        return F.relu_(F.conv3d(maps, self.kernel * scale, bias, self.stride))


class _Mixed(nn.Module):
    def __init__(
        self,
        inputs: int,
        one: int,
        reduce_a: int,
        three_a: int,
        reduce_b: int,
        three_b: int,
        pooled: int,
    ) -> None:
        super().__init__()
        units = {
            "Branch_0/Conv3d_0a_1x1": _Unit(inputs, one, 1),
            "Branch_1/Conv3d_0a_1x1": _Unit(inputs, reduce_a, 1),
            "Branch_1/Conv3d_0b_3x3": _Unit(reduce_a, three_a, 3),
            "Branch_2/Conv3d_0a_1x1": _Unit(inputs, reduce_b, 1),
            "Branch_2/Conv3d_0b_3x3": _Unit(reduce_b, three_b, 3),
            "Branch_3/Conv3d_0b_1x1": _Unit(inputs, pooled, 1),
        }
        for name, unit in units.items():
            self.add_module(name, unit)

    def forward(self, maps: Tensor) -> Tensor:
        one, reduce_a, three_a, reduce_b, three_b, pooled = self.children()
        wide = F.max_pool3d(maps, 3, 1, 1)
        return torch.cat([one(maps), three_a(reduce_a(maps)), three_b(reduce_b(maps)), pooled(wide)], 1)


class _Logits(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(FEATURES, inputs, 1, 1, 1))
        self.bias = nn.Parameter(torch.empty(FEATURES))

    def forward(self, maps: Tensor) -> Tensor:
        pooled = F.avg_pool3d(maps, (2, 7, 7), stride=1)
        return F.linear(pooled.mean((2, 3, 4)), self.kernel.flatten(1), self.bias)


def _layers() -> dict[str, nn.Module]:
    stem = {
        "Conv3d_1a_7x7": _Unit(3, 64, 7, 2),
        "MaxPool3d_2a_3x3": _Pool(*_WIDE),
        "Conv3d_2b_1x1": _Unit(64, 64, 1),
        "Conv3d_2c_3x3": _Unit(64, 192, 3),
        "MaxPool3d_3a_3x3": _Pool(*_WIDE),
    }
    mixed = {name: _Mixed(*row) if name.startswith("Mixed") else _Pool(*row) for name, row in _MIXED.items()}
    return {**stem, **mixed, "Logits/Conv3d_0c_1x1": _Logits(1024)}


class I3D(nn.Module):
    """Inception-I3D for Kinetics-400, inference only; build it with ``weights.load("i3d", folder)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(_layers())

    @staticmethod
    def key(name: str) -> str:
        """The name in the weights file (Flax's path) of an entry of the state dict."""
        unit, leaf = name.removeprefix("layers.").rsplit(".", 1)
        return _KEYS[leaf].format(unit)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits averaged over time.

        Args:
            inputs: ``[n, 3, frames, 224, 224]`` in [-1, 1].

        Returns:
            ``[n, 400]``.
        """
        maps = inputs
        for layer in self.layers.values():
            maps = layer(maps)
        return maps

    @torch.no_grad()
    def features(self, clips: Tensor, batch: int = 4) -> Tensor:
        """What FVD compares, for clips of any picture size.

        Args:
            clips: ``[n, frames, 3, h, w]`` in [0, 1], on any device, at least :data:`MIN_FRAMES` frames.
            batch: clips in memory at their full 224x224 at a time; no influence on the answer.

        Returns:
            ``[n, 400]`` float32 on the CPU.

        Raises:
            UnsupportedError: if the clips are too short.
            MeasurementError: if the shape is another.
        """
        if clips.ndim != 5 or clips.shape[2] != 3:
            raise MeasurementError(
                f"I3D looks at clips [n, frames, 3, h, w], got {tuple(clips.shape)}; add the axis of clips with clip[None]"
            )
        if clips.shape[1] < MIN_FRAMES:
            raise UnsupportedError(
                f"I3D features (FVD) of clips of {clips.shape[1]} frames: the network halves time three times and averages over 2 moments,"
                f" so it is defined from {MIN_FRAMES} frames on; give longer clips, or use a metric that looks at single frames (FID)"
            )
        like = next(self.parameters())
        layout = torch.channels_last_3d if like.device.type == "cpu" else torch.contiguous_format  # a tenth less time on the CPU
        parts = [self(prepare(part.to(like)).contiguous(memory_format=layout)).float().cpu() for part in clips.split(batch) if len(part)]
        return torch.cat(parts) if parts else torch.zeros(0, FEATURES)


def prepare(clips: Tensor) -> Tensor:
    """``[n, frames, 3, h, w]`` in [0, 1] to the input of :meth:`I3D.forward`: 8 bits, 224x224, [-1, 1], channels first."""
    n = len(clips)
    frames = (clips.flatten(0, 1) * 255).round().clamp(0, 255)
    if frames.shape[-2:] != (RESOLUTION, RESOLUTION):
        frames = F.interpolate(frames, (RESOLUTION, RESOLUTION), mode="bilinear", align_corners=False)
    return (frames * (2 / 255) - 1).unflatten(0, (n, -1)).transpose(1, 2)
