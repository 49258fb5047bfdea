"""A product of rank one beside the quantized product, with a factor for every frame."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant._errors import RecipeError
from reelquant.branches.branch import Branch, Inner, TensorSpec
from reelquant.clock import Moment
from reelquant.kernels import FRAMES, Arrangement, Window
from reelquant.stages import LayerWork, StageSite

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class FrameRankOne(Branch):
    """Compute a layer as ``Q(x) Q(W)^T + m_i (x a) b^T``, with a factor ``m_i`` for every frame ``i``.

    ``b`` starts at zero, so nothing changes until a reconstruction with ``branch_rate`` trains it. Where the frames of an input are is what
    calibration saw (:attr:`reelquant.observe.FrameEnergy.place`); an input without frames has one factor.

    Attributes:
        axis, inner, frames: where the frames are (:class:`reelquant.kernels.Arrangement`) and how many; found by the stage.

    Tensors: ``frame_down`` ``[1, channels, *kernel]``, ``frame_up`` ``[out, 1]``, ``frame_factor`` ``[frames]``. Clips of other lengths get
    the mean factor.

    Paper: Q-VDiT (arXiv 2505.22167), token-aware quantization estimator. Deviations: the factors of frames are learned, from 1 (theirs:
    computed in every call, from the cosine between a frame and its rounded self over the frame's share of magnitude); the product reads
    the input before it is rounded; layers of UNets and convolutions have one too.
    """

    axis: int = 0
    inner: bool = True
    frames: int = 1
    exports: ClassVar[str | None] = "a product whose factor differs from frame to frame is not a weight"
    statistics: ClassVar[frozenset[str]] = frozenset({"frames"})
    learns: ClassVar[tuple[str, ...]] = ("frame_down", "frame_up", "frame_factor")

    def __post_init__(self) -> None:
        if self.axis not in range(4) or not 1 <= self.frames <= FRAMES:
            raise RecipeError(f"frame_rank_one finds axis and frames itself; axis is 0 to 3 and frames 1 to {FRAMES}, got {self}")

    def supports(self, site: StageSite) -> str | None:
        if any(isinstance(stage, FrameRankOne) for stage in site.before):
            return "it has a branch of this kind already"
        return None

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {
            "frame_down": TensorSpec((1, *shape[1:]), DTYPE),
            "frame_up": TensorSpec((shape[0], 1), DTYPE),
            "frame_factor": TensorSpec((self.frames,), torch.float32),
        }

    def split(self, layer: LayerWork) -> LayerWork:
        seen = None if layer.statistics is None else layer.statistics.get("frames")
        found = None if seen is None else seen.place
        own = self if found is None else replace(self, axis=found[0].axis, inner=found[0].inner, frames=found[1])
        shape = tuple(layer.weight.shape)
        down = torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(0)) / math.prod(shape[1:]) ** 0.5
        tensors = {"frame_down": down.to(DTYPE), "frame_up": torch.zeros(shape[0], 1, dtype=DTYPE), "frame_factor": torch.ones(own.frames)}
        tensors = {name: value.to(layer.weight.device) for name, value in tensors.items()}
        return layer.with_branch(own, tensors, layer.target)

    def run(self, inner: Inner, x: Tensor, moment: Moment, tensors: Mapping[str, Tensor], window: Window | None) -> Tensor:
        del moment
        down, up, factor = (tensors[name].to(x.dtype) for name in self.learns)
        if window is None:
            part = F.linear(F.linear(x, down), up)
        else:
            part = window.convolve(F.pad(x, window.padding) if any(window.padding) else x, down) * up.view(-1, *[1] * len(window.stride))
        arrangement = Arrangement(self.axis, self.inner)
        known = self.frames > 1 and arrangement.fits(part, self.frames)
        return inner(x) + part * (arrangement.spread(factor, part) if known else factor.mean())

    def weight(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor | None:
        if self.frames > 1:
            return None
        return (tensors["frame_factor"] * tensors["frame_up"].float() @ tensors["frame_down"].float().flatten(1)).view(shape)
