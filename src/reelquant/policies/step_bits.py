"""Bits that change over the denoising steps: those of inputs, and those at which stored weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from reelquant._errors import CalibrationError, RecipeError
from reelquant.clock import FEWEST, MOST, OWN, Widths
from reelquant.formats import Int, MiniFloat, NumberFormat, QuantSpec
from reelquant.stages import ModelWork, Stage


@dataclass(frozen=True)
class StepBits(Stage):
    """Bits for every denoising step, from one set of stored weights and scales.

    Inputs that are rounded to integers are rounded to so many bits at a step, over the range that is stored, or that is found at run
    time. Weights are stored once, in the bits that the recipe gives them, and are read in fewer bits at a step
    (:meth:`reelquant.kernels.PackedWeight.narrowed`); those with as few or fewer bits stay as they are. Small floats with scales that are
    found at run time become integers where a step has more bits than they have. Other formats are the same at all steps.

    Papers: MaGNeTS (arXiv 2502.00382) computes early steps with a smaller part of one nested network; Double Rounding (arXiv 2502.01101)
    reads fewer bits from one stored code. Deviation: what is nested here are bits, which needs no training, and which step gets which
    is measured (:func:`reelquant.allocate.allocate_steps`).

    Attributes:
        inputs: bits of inputs, one number for each step of the sampler that calibrates, from 2 to 8; none: those of the recipe.
        weights: bits of weights likewise.
    """

    inputs: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    key: ClassVar[str | None] = "step_bits"
    default_on: ClassVar[str] = "*"
    takes_on: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.inputs and not self.weights:
            raise RecipeError("step_bits says nothing: give inputs: [8, 6, 6, ...] or weights: [...], a number for each step")
        for name, bits in (("inputs", self.inputs), ("weights", self.weights)):
            if wrong := [one for one in bits if not FEWEST <= one <= MOST]:
                raise RecipeError(f"step_bits.{name} are whole numbers from {FEWEST} to {MOST}, got {wrong[0]}")

    @classmethod
    def parse_key(cls, value: Any) -> Mapping[str, Any] | None:
        return super().parse_key({"inputs": value} if isinstance(value, list | tuple) else value)

    def before_choosing(self, work: ModelWork) -> None:
        if work.clock is None:
            raise CalibrationError(f"step_bits follow the timestep, and '{work.component}' is called without one; drop step_bits")
        pairs = zip(*(self._of_slots(name, work) for name in ("inputs", "weights")), strict=True)
        work.clock.change_bits([Widths(*pair) for pair in pairs])
        for name, some in _unmoved(self, work).items():
            work.warnings.append(f"step_bits.{name} change nothing: {some}")

    def after_installing(self, work: ModelWork) -> None:
        assert work.clock is not None
        work.report.step_bits = {
            name: [getattr(one, name) for one in work.clock.widths] for name in ("inputs", "weights") if getattr(self, name)
        }

    def _of_slots(self, name: str, work: ModelWork) -> list[int]:
        """Bits of every slot of the denoiser; of two experts, each has a part of the sampler's steps."""
        bits: Sequence[int] = getattr(self, name) or (OWN,) * len(work.sampled)
        if len(bits) != len(work.sampled):
            raise RecipeError(
                f"step_bits.{name} has {len(bits)} numbers, and the sampler that calibrates takes {len(work.sampled)} steps: give one for "
                f"each, or calibrate with {len(bits)} steps"
            )
        by_time = dict(zip(work.sampled, bits, strict=True))
        return [by_time[time] for time in work.timesteps]


def _unmoved(stage: StepBits, work: ModelWork) -> dict[str, str]:
    """What a recipe gives bits to that no layer has, and why."""
    inputs = [spec.input for spec in work.specs.values() if spec.input is not None]
    weights = [spec.weight.format for spec in work.specs.values()]
    found = {}
    if stage.inputs and not any(_moves(spec, max(stage.inputs)) for spec in inputs):
        found["inputs"] = "no input is rounded to integers, or to small floats of fewer bits with scales found at run time"
    if stage.weights and not any(_bits(fmt) > min(stage.weights) for fmt in weights):
        found["weights"] = f"no integer weight has more than {min(stage.weights)} bits"
    return found


def _moves(spec: QuantSpec, most: int) -> bool:
    """Whether inputs of this specification have other bits at some step; see :meth:`reelquant.kernels.InputQuant.with_bits`."""
    return isinstance(spec.format, Int) or (isinstance(spec.format, MiniFloat) and spec.dynamic and spec.format.bits < most)


def _bits(fmt: NumberFormat) -> int:
    return fmt.bits if isinstance(fmt, Int) else 0
