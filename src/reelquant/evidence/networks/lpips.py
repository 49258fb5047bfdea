"""LPIPS: how different two pictures look, by the features of a network that knows pictures.

Definition: LPIPS v0.1, ``lin`` heads, on AlexNet (what papers report) or VGG16. Features of five layers are normalized
over channels, their squared differences weighted by the heads, averaged over places and summed over layers: 0 for equal
pictures, about 0.7 for unlike ones.

Preprocessing: [0, 1] to [-1, 1], then the fixed shift and scale of the original. Nothing is resized and nothing
rounded.

Paper:
    Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, 2018, equation 1.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant._errors import MeasurementError, UnsupportedError, nearest

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10


class _Layer(NamedTuple):
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0  # kernel of the max pool before the convolution, of stride 2; 0 for none
    kept: bool = True  # its activations are compared


_ALEX = (_Layer(64, 11, 4, 2), _Layer(192, 5, 1, 2, pool=3), _Layer(384, pool=3), _Layer(256), _Layer(256))
_VGG = (
    _Layer(64, kept=False),
    _Layer(64),
    _Layer(128, pool=2, kept=False),
    _Layer(128),
    _Layer(256, pool=2, kept=False),
    _Layer(256, kept=False),
    _Layer(256),
    _Layer(512, pool=2, kept=False),
    _Layer(512, kept=False),
    _Layer(512),
    _Layer(512, pool=2, kept=False),
    _Layer(512, kept=False),
    _Layer(512),
)
# network: its name in the weights file, its layers, the smallest side from which every layer is defined
BACKBONES = {"alex": ("AlexNet_0", _ALEX, 31), "vgg": ("VGG16_0", _VGG, 16)}


class _Convolution(nn.Module):
    def __init__(self, inputs: int, layer: _Layer) -> None:
        super().__init__()
        self.layer = layer
        self.kernel = nn.Parameter(torch.empty(layer.outputs, inputs, layer.kernel, layer.kernel))
        self.bias = nn.Parameter(torch.empty(layer.outputs))

    def forward(self, maps: Tensor) -> Tensor:
        if self.layer.pool:
            maps = F.max_pool2d(maps, self.layer.pool, 2)
        return F.relu(F.conv2d(maps, self.kernel, self.bias, self.layer.stride, self.layer.padding))


class LPIPS(nn.Module):
    """LPIPS v0.1, inference only; build it with ``weights.load("lpips-alex", folder)`` or ``"lpips-vgg"``.

    Args:
        network: ``"alex"`` or ``"vgg"``.
    """

    def __init__(self, network: Literal["alex", "vgg"] = "alex") -> None:
        super().__init__()
        if network not in BACKBONES:
            raise MeasurementError(f"LPIPS has no backbone '{network}'; {nearest(network, BACKBONES)}")
        self.network = network
        self.backbone, layers, self.minimum = BACKBONES[network]
        inputs = (3, *(layer.outputs for layer in layers))
        self.convolutions = nn.ModuleList(_Convolution(n, layer) for n, layer in zip(inputs, layers, strict=False))
        self.heads = nn.ParameterList(torch.empty(1, layer.outputs, 1, 1) for layer in layers if layer.kept)

    def key(self, name: str) -> str:
        """The name in the weights file (Flax's path) of an entry of the state dict."""
        part, index, *leaf = name.split(".")
        return f"{self.backbone}.Conv_{index}.{leaf[0]}" if part == "convolutions" else f"NetLinLayer_{index}.Conv_0.kernel"

    def _directions(self, pictures: Tensor) -> list[Tensor]:
        """The activations of the kept layers, of length 1 at every place."""
        shift, scale = (torch.tensor(values, dtype=pictures.dtype, device=pictures.device).view(3, 1, 1) for values in (SHIFT, SCALE))
        maps = (pictures * 2 - 1 - shift) / scale
        directions = []
        for convolution in self.convolutions:
            maps = convolution(maps)
            if convolution.layer.kept:
                directions.append(maps / (maps.norm(dim=1, keepdim=True) + EPSILON))
        return directions

    def forward(self, reference: Tensor, test: Tensor) -> Tensor:
        """The distance of every picture from its reference, unitless, differentiable.

        Args:
            reference: ``[n, 3, h, w]`` in [0, 1].
            test: the same shape.

        Returns:
            ``[n]``.

        Raises:
            UnsupportedError: if the pictures are smaller than the network can look at: 31 pixels a side for AlexNet, 16
                for VGG16.
            MeasurementError: if the shapes differ or are not ``[n, 3, height, width]``.
        """
        if reference.shape != test.shape or reference.ndim != 4 or reference.shape[1] != 3:
            raise MeasurementError(
                f"LPIPS compares pictures [n, 3, h, w] of one shape, got {tuple(reference.shape)} and "
                f"{tuple(test.shape)}; resize one of them"
            )
        if min(reference.shape[-2:]) < self.minimum:
            others = [f"'{name}' (from {side})" for name, (_, _, side) in BACKBONES.items() if side < self.minimum]
            raise UnsupportedError(
                f"LPIPS on '{self.network}' of pictures of {reference.shape[-2]}x{reference.shape[-1]} pixels: a pool runs out of places"
                f" below {self.minimum} pixels a side; give larger pictures{f', or use {others[0]}' if others else ''}"
            )
        like = self.heads[0]
        total = reference.new_zeros(len(reference), dtype=like.dtype, device=like.device)
        for head, a, b in zip(
            self.heads,
            self._directions(reference.to(like)),
            self._directions(test.to(like)),
            strict=True,
        ):
            total = total + F.conv2d((a - b).square(), head).mean((1, 2, 3))
        return total

    @torch.no_grad()
    def distances(self, reference: Tensor, test: Tensor, batch: int = 16) -> Tensor:
        """:meth:`forward` without gradients, ``batch`` pictures at a time, on the CPU: ``[n]`` float32."""
        if reference.shape != test.shape:
            raise MeasurementError(
                f"LPIPS compares pictures of one shape, got {tuple(reference.shape)} and {tuple(test.shape)}; resize one of them"
            )
        parts = [self(a, b).float().cpu() for a, b in zip(reference.split(batch), test.split(batch), strict=True) if len(a)]
        return torch.cat(parts) if parts else torch.zeros(0)
