"""Spread outliers over all channels of their token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reelquant._errors import RecipeError
from reelquant.kernels import Mix, Rotation, Scaling, block_size
from reelquant.stages import GroupView, Rewrite, StageSite
from reelquant.transforms.transform import Transform


@dataclass(frozen=True)
class Rotate(Transform):
    """Multiply the channels by an orthonormal Hadamard matrix, in the input at run time and in the weight once.

    Products of gates are almost sparse: a few tokens reach far beyond the others in a few channels, and a static grid either clips them or
    wastes its levels. After the rotation every channel of such a token carries a share of the outlier.

    Static inputs have the ranges that calibration saw of the rotated input. A rotation that follows other rewrites, has signs or smaller
    blocks takes them from sampled rows (1024 of every input), so give such inputs ranges at run time (``dynamic: true``).

    Attributes:
        least: rotate a group only where the expected noise falls by this many dB, because a rotation costs run time. Expected is
            the noise of a uniform grid that every channel fills, ``sum_c range_c^2 |W_c|^2``.
        always: rotate every group, whatever noise is expected; then no calibration is needed where inputs have ranges at run time.
        signs: turn the signs of some channels first, drawn with ``seed``: the plain matrix maps a channel mean that all channels share
            to one channel, and a random one to all.
        block: width of the blocks, a power of two; 0 for the largest that divides the channels. Rotations inside of the groups that
            share a scale cost less.

    Paper: QuaRot (arXiv 2404.00456), online Hadamard transforms; ViDiT-Q (arXiv 2406.02540) for video. Deviations: never folded into
    neighbouring weights; blocks of the largest power of two that divides the width; no random signs by default; only where it pays.
    """

    least: float = 0.0
    always: bool = False
    signs: bool = False
    seed: int = 0
    block: int = 0
    statistics: ClassVar[frozenset[str]] = frozenset({"rotated"})
    fills: ClassVar[frozenset[str]] = frozenset({"columns"})

    def __post_init__(self) -> None:
        if self.block < 0 or self.block & (self.block - 1):
            raise RecipeError(f"block is a power of two, or 0 for the largest that divides the channels; got {self.block}")

    @property
    def needs_data(self) -> bool:
        return not self.always

    def needs(self, site: StageSite) -> frozenset[str]:
        seen = site.specs.input is not None and self.observed(site)  # an input that stays float is not rotated
        return self.statistics if seen else frozenset()

    def supports(self, site: StageSite) -> str | None:
        spec = site.specs.input
        if spec is None or spec.dynamic or self.observed(site):
            return None
        if spec.slots != "shared" or spec.granularity.kind != "tensor":
            return (
                "a rotation after other rewrites, in blocks or with signs takes ranges from samples, per tensor with shared slots, got "
                f"{spec}; put 'transform: rotate' first, or set dynamic: true"
            )
        return None

    def observed(self, site: StageSite) -> bool:
        """Whether this is the rotation that calibration can observe: of the raw input, in the largest blocks."""
        plain = not self.signs and self._block(site.layer.shape[1]) == 0
        return plain and not any("rewrite" in stage.hooks() for stage in site.before)

    def _block(self, channels: int) -> int:
        largest = block_size(channels)
        return 0 if not self.block or self.block >= largest else self.block

    def plan(self, group: GroupView) -> Rewrite:
        if not group.rounded:
            return Rewrite()
        rewrite = Rewrite(mixes=self._mixes(group))
        if self.always:
            return rewrite
        if group.rotated is None and group.rows is None:
            return Rewrite()
        after = group.rewritten(rewrite)
        before = (group.low, group.high) if group.rotated is not None and rewrite.rotated else group.sampled_ends()
        quieter = _noise(*before, group.weights) / _noise(after.low, after.high, after.weights).clamp(min=TINY)
        return rewrite if float(10 * torch.log10(quieter)) >= self.least else Rewrite()

    def _mixes(self, group: GroupView) -> tuple[Mix, ...]:
        rotation = Rotation(self._block(group.channels))
        if not self.signs:
            return (rotation,)
        drawn = torch.randint(2, (group.channels,), generator=torch.Generator().manual_seed(self.seed))
        return Scaling((2.0 * drawn - 1).to(group.low.device)), rotation


TINY = torch.finfo(torch.float32).tiny


def _noise(low: Tensor, high: Tensor, weights: Sequence[Tensor]) -> Tensor:
    width = high.amax(0) - low.amin(0)
    power = torch.stack([weight.movedim(1, 0).flatten(1).square().sum(1) for weight in weights]).sum(0)
    return (width.square() * power).sum()
