"""The InceptionV3 that FID and KID are measured on.

Definition: the graph ``inception-2015-12-05`` of TensorFlow, output ``pool_3``: 2048 numbers a picture. It is not
torchvision's network: average pools leave the padding out, and the last block pools by the maximum.

Preprocessing: 8 bits, resized to 299x299 by TensorFlow 1's ``ResizeBilinear`` (sampling points ``i * size / 299``, no
half-pixel shift, no antialiasing), then ``(x - 128) / 128``: what the graph itself does, and what NVIDIA's export of it
does by ``grid_sample``.

Paper:
    Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2015.
    Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017, section 4 (FID).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant._errors import MeasurementError

RESOLUTION = 299
FEATURES = 2048
EPSILON = 1e-3

_Kernel = int | tuple[int, int]


class _Unit(nn.Module):
    """Convolution, batch normalization without a scale, ReLU; the normalization is folded into the convolution."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: _Kernel = 1,
        stride: int = 1,
        padding: _Kernel | None = None,
    ) -> None:
        super().__init__()
        high, wide = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        self.stride = stride
        self.padding = (high // 2, wide // 2) if padding is None else padding
        self.weight = nn.Parameter(torch.empty(outputs, inputs, high, wide))
        self.beta = nn.Parameter(torch.empty(outputs))
        self.mean = nn.Parameter(torch.empty(outputs))
        self.var = nn.Parameter(torch.empty(outputs))

    def forward(self, maps: Tensor) -> Tensor:
        scale = (self.var + EPSILON).rsqrt()
        weight = self.weight * scale[:, None, None, None]
        return F.relu_(F.conv2d(maps, weight, self.beta - self.mean * scale, self.stride, self.padding))


def _average() -> nn.Module:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


def _halve() -> nn.Module:
    return nn.MaxPool2d(3, 2)


def _tower(inputs: int, units: Sequence[tuple[int, _Kernel]], last_stride: int = 1) -> nn.Sequential:
    """Units one after the other, named ``conv``, ``conv_1``, ...; a last stride of 2 goes without padding."""
    tower = nn.Sequential()
    for i, (outputs, kernel) in enumerate(units):
        halves = last_stride == 2 and i == len(units) - 1
        tower.add_module(
            f"conv_{i}" if i else "conv",
            _Unit(inputs, outputs, kernel, 2, 0) if halves else _Unit(inputs, outputs, kernel),
        )
        inputs = outputs
    return tower


def _pooled(inputs: int, outputs: int) -> nn.Sequential:
    tower = nn.Sequential()
    tower.add_module("pool", _average())
    tower.add_module("conv", _Unit(inputs, outputs))
    return tower


class _Mixed(nn.Module):
    """Branches over the same maps, joined in the order given."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([branch(maps) for branch in self.children()], 1)


def _mixed_35(inputs: int, pooled: int) -> nn.Module:
    return _Mixed(
        conv=_Unit(inputs, 64),
        tower=_tower(inputs, [(48, 1), (64, 5)]),
        tower_1=_tower(inputs, [(64, 1), (96, 3), (96, 3)]),
        tower_2=_pooled(inputs, pooled),
    )


def _mixed_17(middle: int) -> nn.Module:
    return _Mixed(
        conv=_Unit(768, 192),
        tower=_tower(768, [(middle, 1), (middle, (1, 7)), (192, (7, 1))]),
        tower_1=_tower(768, [(middle, 1), (middle, (7, 1)), (middle, (1, 7)), (middle, (7, 1)), (192, (1, 7))]),
        tower_2=_pooled(768, 192),
    )


class _Mixed8(nn.Module):
    """The blocks at 8x8, whose towers part at their ends."""

    def __init__(self, inputs: int, pool: nn.Module) -> None:
        super().__init__()
        self.conv = _Unit(inputs, 320)
        self.tower_conv = _Unit(inputs, 384)
        self.tower_mixed_conv = _Unit(384, 384, (1, 3))
        self.tower_mixed_conv_1 = _Unit(384, 384, (3, 1))
        self.tower_1_conv = _Unit(inputs, 448)
        self.tower_1_conv_1 = _Unit(448, 384, 3)
        self.tower_1_mixed_conv = _Unit(384, 384, (1, 3))
        self.tower_1_mixed_conv_1 = _Unit(384, 384, (3, 1))
        self.pool = pool
        self.tower_2_conv = _Unit(inputs, 192)

    def forward(self, maps: Tensor) -> Tensor:
        a = self.tower_conv(maps)
        b = self.tower_1_conv_1(self.tower_1_conv(maps))
        branches = [
            self.conv(maps),
            self.tower_mixed_conv(a),
            self.tower_mixed_conv_1(a),
            self.tower_1_mixed_conv(b),
            self.tower_1_mixed_conv_1(b),
            self.tower_2_conv(self.pool(maps)),
        ]
        return torch.cat(branches, 1)


def _layers() -> dict[str, nn.Module]:
    return {
        "conv": _Unit(3, 32, 3, 2, 0),
        "conv_1": _Unit(32, 32, 3, 1, 0),
        "conv_2": _Unit(32, 64, 3),
        "pool0": _halve(),
        "conv_3": _Unit(64, 80),
        "conv_4": _Unit(80, 192, 3, 1, 0),
        "pool1": _halve(),
        "mixed": _mixed_35(192, 32),
        "mixed_1": _mixed_35(256, 64),
        "mixed_2": _mixed_35(288, 64),
        "mixed_3": _Mixed(
            conv=_Unit(288, 384, 3, 2, 0),
            tower=_tower(288, [(64, 1), (96, 3), (96, 3)], 2),
            pool=_halve(),
        ),
        "mixed_4": _mixed_17(128),
        "mixed_5": _mixed_17(160),
        "mixed_6": _mixed_17(160),
        "mixed_7": _mixed_17(192),
        "mixed_8": _Mixed(
            tower=_tower(768, [(192, 1), (320, 3)], 2),
            tower_1=_tower(768, [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)], 2),
            pool=_halve(),
        ),
        "mixed_9": _Mixed8(1280, _average()),
        "mixed_10": _Mixed8(2048, nn.MaxPool2d(3, 1, 1)),
    }


class Inception(nn.Module):
    """InceptionV3 as FID uses it, inference only; build it with ``weights.load("inception", folder)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for name, layer in _layers().items():
            self.layers.add_module(name, layer)

    @staticmethod
    def key(name: str) -> str:
        """The name in the weights file of an entry of the state dict."""
        return f"net.{name}"

    def forward(self, inputs: Tensor) -> Tensor:
        """``[n, 2048]`` of pictures ``[n, 3, 299, 299]``, scaled as :func:`prepare` does."""
        return self.layers(inputs).mean((2, 3))

    @torch.no_grad()
    def features(self, frames: Tensor, batch: int = 16) -> Tensor:
        """What FID and KID compare, for pictures of any size.

        Args:
            frames: ``[n, 3, h, w]`` in [0, 1], on any device.
            batch: pictures in memory at their full 299x299 at a time; no influence on the answer.

        Returns:
            ``[n, 2048]`` float32 on the CPU.

        Raises:
            MeasurementError: if the shape is another.
        """
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise MeasurementError(
                f"Inception looks at frames [n, 3, h, w], got {tuple(frames.shape)}; flatten clips first: clips.flatten(0, 1)"
            )
        like = next(self.parameters())
        last = torch.channels_last  # on one core 1.7 times as fast, measured side by side
        parts = [self(prepare(part.to(like)).contiguous(memory_format=last)).float().cpu() for part in frames.split(batch) if len(part)]
        return torch.cat(parts) if parts else torch.zeros(0, FEATURES)


def resize_tensorflow1(pictures: Tensor, size: int, axis: int) -> Tensor:
    """One axis resized linearly, sampled at ``i * old / size``: TensorFlow 1's ``half_pixel_centers=False``."""
    old = pictures.shape[axis]
    points = torch.arange(size, dtype=torch.float64, device=pictures.device) * old / size
    low = points.long()
    shape = [1] * pictures.ndim
    shape[axis] = size
    share = (points - low).to(pictures.dtype).view(shape)
    return torch.lerp(
        pictures.index_select(axis, low),
        pictures.index_select(axis, (low + 1).clamp(max=old - 1)),
        share,
    )


def prepare(frames: Tensor) -> Tensor:
    """``[n, 3, h, w]`` in [0, 1] to the input of :meth:`Inception.forward`: 8 bits, 299x299, ``(x - 128) / 128``."""
    frames = (frames * 255).round().clamp(0, 255)
    for axis in (2, 3):
        frames = resize_tensorflow1(frames, RESOLUTION, axis)
    return (frames - 128) / 128
