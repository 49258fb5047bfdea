"""Learned scales of inputs: codes of weights stay, and static ranges move until the output of a part is nearest to that in float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reelquant._errors import RecipeError
from reelquant.nn import QuantLayer
from reelquant.reconstruct.soft import Fixed, SoftLayer, SoftWeight
from reelquant.reconstruct.trained import Rated, Trained
from reelquant.stages import LayerWork


@dataclass(frozen=True)
class Lsq(Trained):
    """Learn the scales of static inputs by gradients through the rounding.

    ``input_rate`` is the learning rate here, ``follow`` says how the scales follow the denoising step, and ``gradient`` what moves them;
    see :class:`reelquant.reconstruct.trained.Trained`. Layers with other inputs stay as they are.

    Papers: LSQ (arXiv 1902.08153): ``gradient: step``. PAMS (arXiv 2011.04212): ``gradient: range``, a learned end of the range. TDQ
    (arXiv 2306.02316): ``follow: fitted``. Deviations: what is learned is the logarithm of a factor of the scale that calibration
    found, so Adam's step is a relative one and needs no scaling by the number of values; zero points stay. PAMS adds a loss on
    features, which is the loss itself here. TDQ's function has one hidden layer (theirs: four) and multiplies the scales of the steps
    (theirs: gives them); it is stored as these scales, as theirs is for a fixed sampler.
    """

    input_rate: float = 0.01
    name: ClassVar[str] = "lsq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.input_rate:
            raise RecipeError("lsq trains scales of inputs alone; write input_rate above 0")
        if self.drop:
            raise RecipeError(f"drop of lsq would hide the rounding that it learns, got {self.drop}; write drop in adaround instead")

    def weight_of(self, layer: QuantLayer, work: LayerWork, seed: int) -> SoftWeight:
        del seed
        return Fixed.of(layer, work)

    def rated(self, soft: Sequence[SoftLayer]) -> Sequence[Rated]:
        del soft
        return []
