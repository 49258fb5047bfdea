"""Bits that change over the denoising steps: those of inputs, and those at which stored weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from reelquant._errors import CalibrationError, RecipeError, nearest
from reelquant.clock import FEWEST, MOST, Apart, Widths
from reelquant.formats import Int, MiniFloat, NumberFormat, QuantSpec
from reelquant.sites import select
from reelquant.stages import ModelWork, Stage

EVERY = "*"


class Part(NamedTuple):
    """What one entry of ``step_bits`` says.

    Attributes:
        on: pattern of the layers that it is for.
        inputs, weights: bits at every step of the sampler; none: those of an earlier entry, or as stored.
    """

    on: str = EVERY
    inputs: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepBits(Stage):
    """Bits for every denoising step, from one set of stored weights and scales, for all layers or for some.

    Inputs that are rounded to integers are rounded to so many bits at a step, over the range that is stored, or that is found at run
    time. Weights are stored once, in the bits that the recipe gives them, and are read in fewer bits at a step
    (:meth:`reelquant.kernels.PackedWeight.narrowed`); those with as few or fewer bits stay as they are. Small floats with scales that are
    found at run time become integers where a step has more bits than they have. Other formats are the same at all steps.

    Papers: MaGNeTS (arXiv 2502.00382) computes early steps with a smaller part of one nested network; Double Rounding (arXiv 2502.01101)
    reads fewer bits from one stored code. Deviation: what is nested here are bits, which needs no training, and which step and layer gets
    which is measured (:func:`reelquant.allocate.allocate_steps`).

    Attributes:
        inputs: bits of inputs, one number for each step of the sampler that calibrates, from 2 to 8; none: those of the recipe.
        weights: bits of weights likewise.
        entries: the long form instead: mappings with ``inputs``, ``weights`` and ``on``, a pattern of layers; without ``on`` for all. The
            last entry that matches a layer wins, for inputs and for weights.
    """

    inputs: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    entries: tuple[Mapping[str, Any], ...] = ()
    key: ClassVar[str | None] = "step_bits"
    default_on: ClassVar[str] = EVERY
    takes_on: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.entries and (self.inputs or self.weights):
            raise RecipeError("step_bits says its numbers twice: give inputs and weights, or entries")
        for part in self.parts:
            if not part.inputs and not part.weights:
                raise RecipeError("step_bits says nothing: give inputs: [8, 6, 6, ...] or weights: [...], a number for each step")
            for name in Widths._fields:
                if wrong := [one for one in getattr(part, name) if type(one) is not int or not FEWEST <= one <= MOST]:
                    raise RecipeError(f"step_bits.{name} are whole numbers from {FEWEST} to {MOST}, got {wrong[0]!r:.40}")

    @classmethod
    def parse_key(cls, value: Any) -> Mapping[str, Any] | None:
        several = isinstance(value, list | tuple)
        if several and value and all(isinstance(one, Mapping) for one in value):
            return {"entries": [dict(one) for one in value]}
        if isinstance(value, Mapping) and "on" in value:
            return {"entries": [dict(value)]}
        return super().parse_key({"inputs": value} if several else value)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All entries, in order.

        Raises:
            RecipeError: for a key that entries do not have.
        """
        return tuple(_part(one) for one in self.entries) if self.entries else (Part(EVERY, self.inputs, self.weights),)

    def before_choosing(self, work: ModelWork) -> None:
        if work.clock is None:
            raise CalibrationError(f"step_bits follow the timestep, and '{work.component}' is called without one; drop step_bits")
        said = [(_on(part, work), _of_slots(part, work)) for part in self.parts]
        own = {name: [bits for names, bits in said if name in names] for name in work.specs}
        others = _widths([bits for part, (_, bits) in zip(self.parts, said, strict=True) if part.on == EVERY])
        members: dict[tuple[Widths, ...], list[str]] = {}
        for name, parts in own.items():
            members.setdefault(_widths(parts), []).append(name)
        work.clock.change_bits(others, [Apart(tuple(names), widths) for widths, names in members.items() if widths != others])
        for name, some in _unmoved(own, work).items():
            work.warnings.append(f"step_bits.{name} change nothing: {some}")

    def after_installing(self, work: ModelWork) -> None:
        assert work.clock is not None
        given = [name for name in Widths._fields if any(getattr(part, name) for part in self.parts)]
        bits = _in_words(work.clock.widths, given)
        apart = [{"layers": list(group.layers), **_in_words(group.widths, given)} for group in work.clock.apart]
        work.report.step_bits = bits | ({"apart": apart} if apart else {})


def _part(entry: Mapping[str, Any]) -> Part:
    for key in entry:
        if key not in Part._fields:
            raise RecipeError(f"an entry of step_bits has no key '{key}'; {nearest(str(key), Part._fields)}")
    for name in Widths._fields:
        if not isinstance(entry.get(name, ()), list | tuple):
            raise RecipeError(f"step_bits.{name} is a list with a number for each step, got {entry[name]!r:.40}")
    if not isinstance(entry.get("on", EVERY), str):
        raise RecipeError(f"step_bits.on is a pattern of layers, got {entry['on']!r:.40}")
    return Part(entry.get("on", EVERY), tuple(entry.get("inputs", ())), tuple(entry.get("weights", ())))


Bits = dict[str, list[int]]  # of inputs and of weights at every slot, as far as an entry gives them


def _of_slots(part: Part, work: ModelWork) -> Bits:
    """Bits of every slot of the denoiser; of two experts, each has a part of the sampler's steps."""
    found: Bits = {}
    for name in Widths._fields:
        if not (bits := getattr(part, name)):
            continue
        if len(bits) != len(work.sampled):
            raise RecipeError(
                f"step_bits.{name} has {len(bits)} numbers, and the sampler that calibrates takes {len(work.sampled)} steps: give one for "
                f"each, or calibrate with {len(bits)} steps"
            )
        by_time = dict(zip(work.sampled, bits, strict=True))
        found[name] = [by_time[time] for time in work.timesteps]
    return found


def _on(part: Part, work: ModelWork) -> frozenset[str]:
    """The layers that an entry is for."""
    return frozenset(work.specs if part.on == EVERY else select(part.on, work.map.layers.values()))


def _widths(parts: Sequence[Bits]) -> tuple[Widths, ...]:
    """Bits of every slot by all the entries that match a layer, the last word first; none where all is as stored."""
    said = {name: numbers for part in parts for name, numbers in part.items()}
    steps = len(next(iter(said.values()), ()))
    return tuple(Widths(**{name: numbers[slot] for name, numbers in said.items()}) for slot in range(steps))


def _in_words(widths: Sequence[Widths], given: Sequence[str]) -> Bits:
    """Bits of every slot by the words of recipes; nothing where all is as stored."""
    return {name: [getattr(one, name) for one in widths] for name in given if widths}


def _unmoved(own: Mapping[str, Sequence[Bits]], work: ModelWork) -> dict[str, str]:
    """What a recipe gives bits to that no layer has, and why."""
    said = {name: {key: numbers for part in parts for key, numbers in part.items()} for name, parts in own.items()}
    rounded = [(work.specs[name].input, max(bits["inputs"])) for name, bits in said.items() if "inputs" in bits]
    read = [(_bits(work.specs[name].weight.format), min(bits["weights"])) for name, bits in said.items() if "weights" in bits]
    found = {}
    if rounded and not any(spec is not None and _moves(spec, most) for spec, most in rounded):
        found["inputs"] = "no input is rounded to integers, or to small floats of fewer bits with scales found at run time"
    if read and not any(stored > least for stored, least in read):
        found["weights"] = f"no integer weight has more than {min(least for _, least in read)} bits"
    return found


def _moves(spec: QuantSpec, most: int) -> bool:
    """Whether inputs of this specification have other bits at some step; see :meth:`reelquant.kernels.InputQuant.with_bits`."""
    return isinstance(spec.format, Int) or (isinstance(spec.format, MiniFloat) and spec.dynamic and spec.format.bits < most)


def _bits(fmt: NumberFormat) -> int:
    return fmt.bits if isinstance(fmt, Int) else 0
