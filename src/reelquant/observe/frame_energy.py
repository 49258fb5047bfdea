"""How the size of an input spreads over bands of frames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from reelquant.kernels.frame_bands import FRAMES, Arrangement, haar
from reelquant.observe.call import Call
from reelquant.observe.statistic import FLOAT, Statistic, Watched


@dataclass(eq=False)
class FrameEnergy(Statistic):
    """Mean squares of the largest magnitude of a position, as it is and in every band of mixed frames, for every place frames may be at.

    Only the first run of the sampler is looked at.

    Attributes:
        channel_axis: of the input.
        convolves: whether the reader is a convolution, which mixes the frames of all axes but the first one itself.
    """

    channel_axis: int
    convolves: bool
    _sums: Tensor | None = None  # [arrangements, 1 + frames] float64
    _places: Tensor | None = None  # [arrangements, 2] axis and inner
    _looks: int = 0

    @classmethod
    def for_input(cls, of: Watched) -> Self | None:
        """Of any input; one without frames adds nothing."""
        return cls(of.channel_axis, bool(of.geometry.kernel))

    def look(self, x: Tensor, call: Call) -> dict[str, Tensor]:
        if call.part or call.probe or not 1 < call.frames <= FRAMES:
            return {}
        x, found, places = x.detach().float(), [], []
        plain = self._size(x).mean().view(1)
        for arrangement in self._arrangements(x, call.frames):
            bands = self._size(arrangement.mixed(x, haar(call.frames)))
            parted = bands.unflatten(arrangement.axis, (-1, call.frames) if arrangement.inner else (call.frames, -1))
            found.append(torch.cat([plain, parted.movedim(arrangement.axis + arrangement.inner, 0).flatten(1).mean(1)]))
            places.append([arrangement.axis, int(arrangement.inner)])
        return {"sums": torch.stack(found).double(), "places": torch.tensor(places)} if found else {}

    def _arrangements(self, x: Tensor, frames: int) -> Iterator[Arrangement]:
        for axis in range(1 if self.convolves else x.ndim - 1):
            count, rest = divmod(x.shape[axis], frames)
            if not rest:
                yield from (Arrangement(axis, inner) for inner in ((True,) if count == 1 else (True, False)))

    def _size(self, x: Tensor) -> Tensor:
        return x.abs().amax(self.channel_axis, keepdim=True).square()

    def absorb(self, seen: Mapping[str, Tensor], call: Call) -> None:
        """Add one look; one of clips of another length is left out."""
        if self._sums is None:
            self._sums, self._places = torch.zeros_like(seen["sums"]), seen["places"].clone()
        if self._sums.shape == seen["sums"].shape:
            self._sums += seen["sums"]
            self._looks += 1

    @property
    def energies(self) -> list[tuple[Arrangement, Tensor]]:
        """Every arrangement with its mean squares ``[1 + frames]``: of the input as it is, then of each band."""
        if self._sums is None or self._places is None:
            return []
        rows = (self._sums / self._looks).float()
        return [(Arrangement(axis, bool(inner)), row) for (axis, inner), row in zip(self._places.tolist(), rows, strict=True)]

    @property
    def place(self) -> tuple[Arrangement, int] | None:
        """Where frames have most in common, and how many there are; None if the input has none."""
        known = [(float(row[2:].mean() / row[1:].mean()), place, arrangement) for place, (arrangement, row) in enumerate(self.energies)]
        found = min(known, default=None, key=lambda one: one[:2])
        return None if found is None else (found[2], len(self.energies[0][1]) - 1)

    @property
    def state(self) -> dict[str, Tensor]:
        """Everything that was absorbed; empty before the first look."""
        if self._sums is None or self._places is None:
            return {}
        return {"sums": self._sums, "places": self._places, "looks": torch.tensor(self._looks)}

    @state.setter
    def state(self, known: Mapping[str, Tensor]) -> None:
        self._sums, self._places = known.get("sums"), known.get("places")
        self._looks = int(known["looks"]) if known else 0

    def log_bytes(self, calls: int) -> int:
        """A few numbers for each call."""
        return FLOAT * calls * FRAMES

    def memory_bytes(self) -> int:
        """A few numbers."""
        return FLOAT * FRAMES

    def serves(self, of: Watched) -> bool:
        """The same mean squares serve every wish for them."""
        return True
