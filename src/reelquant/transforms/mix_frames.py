"""Mix the frames of an input, so that what they have in common gets many bits and how they differ gets few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from reelquant._errors import RecipeError
from reelquant.kernels import Arrangement, FrameBands
from reelquant.stages import LayerWork, Stage, StageSite

FEWEST, WIDEST = 2, 8


@dataclass(frozen=True)
class MixFrames(Stage):
    """Compute a layer as ``y = T' (Q(T x) W' ) + b``: an orthonormal mix ``T`` of frames before it, its opposite behind it.

    A linear layer, or a convolution that does not slide over frames, treats all frames alike, so it commutes with any mix of them. ``T`` is
    the Haar transform: one mean of all frames, and differences of neighbours, of pairs of neighbours, and so on. Bands get bits by their
    size: each bit goes where it lowers the summed squared error of rounding most, until ``bits`` are spent on average. Without that nothing
    would be gained: an orthonormal mix alone moves size from band to band and leaves the sum of errors as it is.

    Where the frames of an input are is found by trying every axis (:class:`reelquant.observe.FrameEnergy`); the place with the least
    error is taken, and no mix at all where all of them have more than rounding with ``bits`` frame by frame. A layer gets inputs that are
    rounded to fewer bits first and to those of its rule then, 8 as a rule, so integer kernels take them; fewer bits are simulated.

    Attributes:
        bits: of inputs, on average over the bands.
        least: the error has to be lower by this share.

    Paper: ResQ (arXiv 2308.09511): few bits for what frames differ by, beside a key frame of more bits. Deviations: an orthonormal mix of
    all frames of a clip in the place of differences to a key frame, which add up their errors; no state from clip to clip; bits by
    measured size (theirs: two widths); scales of each position, found at run time.
    """

    bits: float = 4.0
    least: float = 0.1
    statistics: ClassVar[frozenset[str]] = frozenset({"frames"})
    untrainable: ClassVar[str | None] = "whose frames are mixed"

    def __post_init__(self) -> None:
        if not FEWEST <= self.bits <= WIDEST:
            raise RecipeError(f"mix_frames spends {FEWEST} to {WIDEST} bits on average, got {self.bits}")
        if not 0 <= self.least < 1:
            raise RecipeError(f"least of mix_frames is a share in [0, 1), got {self.least}")

    def supports(self, site: StageSite) -> str | None:
        spec = site.specs.input
        if spec is None or not spec.dynamic or spec.granularity.kind != "token" or spec.format.name != "int8":
            return f"mix_frames rounds to int8 per token, found at run time, in the end; write input: {NUMBERS}, got {spec}"
        if any(isinstance(stage, MixFrames) for stage in site.before):
            return "mix_frames stands before it already; keep one"
        return None

    def split(self, layer: LayerWork) -> LayerWork:
        seen = None if layer.statistics is None else layer.statistics.get("frames")
        return replace(layer, bands=self.choose([] if seen is None else seen.energies))

    def choose(self, energies: Sequence[tuple[Arrangement, Tensor]]) -> FrameBands:
        """The arrangement with the least error, and the bits of its bands.

        Args:
            energies: see :attr:`reelquant.observe.FrameEnergy.energies`.
        """
        best, least = FrameBands(Arrangement(0, True), (round(self.bits),)), float("inf")
        for arrangement, row in energies:
            bits = allotted(row[1:].tolist(), self.bits)
            found = sum(_error(size, own) for size, own in zip(row[1:].tolist(), bits, strict=True)) / len(bits)
            if found < min(least, (1 - self.least) * _error(float(row[0]), round(self.bits))):
                best, least = FrameBands(arrangement, tuple(bits)), found
        return best


NUMBERS = "{format: int8, granularity: token, dynamic: true}"


def _error(size: float, bits: int) -> float:
    """Of rounding to symmetric integers, up to a factor that all bits share."""
    return size / (2 ** (bits - 1) - 1) ** 2


def allotted(sizes: Sequence[float], bits: float) -> list[int]:
    """Bits of every band, by its mean square: each goes where it lowers the error most."""
    found = [FEWEST] * len(sizes)
    for _ in range(int((bits - FEWEST) * len(sizes) + 1e-9)):
        open_ = [place for place, own in enumerate(found) if own < WIDEST]
        if open_:
            found[max(open_, key=lambda place: _error(sizes[place], found[place]) - _error(sizes[place], found[place] + 1))] += 1
    return found
