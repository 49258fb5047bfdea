"""The input of a layer that reads the timestep only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from reelquant.observe.call import Call
from reelquant.observe.statistic import FLOAT, Statistic, Watched


@dataclass(eq=False)
class Features(Statistic):
    """The input of a temporal layer at every step: ``[steps, channels]``.

    Attributes:
        channels: of the input.
        steps: expected steps; memory doubles when more come.
        varies: True if rows differ within a call or between calls of one step, because the input depends on more than the timestep.
    """

    channels: int
    steps: int = 1
    varies: bool = False
    _rows: Tensor | None = None  # [steps, channels]
    _known: list[bool] = field(default_factory=list)

    @classmethod
    def for_input(cls, of: Watched) -> Self | None:
        """Features of a linear temporal layer."""
        if of.role != "temporal" or of.geometry.kernel:
            return None
        return cls(of.geometry.channels, max(of.steps, 1))

    def look(self, x: Tensor, call: Call) -> dict[str, Tensor]:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        return {"first": flat[0].clone(), "low": flat.amin(0), "high": flat.amax(0)}

    def absorb(self, seen: Mapping[str, Tensor], call: Call) -> None:
        """Keep the first row of a step and compare the others with it."""
        if call.step >= len(self._known):
            self._allocate(max(2 * len(self._known), self.steps, call.step + 1), seen["first"])
        assert self._rows is not None
        row = self._rows[call.step]
        if not self._known[call.step]:
            row.copy_(seen["first"])
            self._known[call.step] = True
        self.varies |= not all(torch.allclose(seen[end], row, rtol=1e-4, atol=1e-5) for end in ("low", "high"))

    def _allocate(self, steps: int, like: Tensor) -> None:
        known, old = self._rows, len(self._known)
        self._rows = like.new_zeros(steps, self.channels)
        if known is not None:
            self._rows[:old] = known
        self._known = self._known + [False] * (steps - old)

    @property
    def state(self) -> dict[str, Tensor]:
        """Everything that was absorbed; empty before the first look."""
        if self._rows is None:
            return {}
        return {"rows": self._rows, "known": torch.tensor(self._known), "varies": torch.tensor(self.varies)}

    @state.setter
    def state(self, known: Mapping[str, Tensor]) -> None:
        self._rows = known.get("rows")
        self._known, self.varies = (known["known"].tolist(), bool(known["varies"])) if known else ([], False)

    @property
    def features(self) -> Tensor:
        """``[steps, channels]``, of the steps that were seen."""
        assert self._rows is not None
        return self._rows[torch.tensor(self._known, device=self._rows.device)]

    def log_bytes(self, calls: int) -> int:
        """Three rows of every call."""
        return FLOAT * calls * 3 * self.channels

    def memory_bytes(self) -> int:
        """A row of every step."""
        return FLOAT * self.steps * self.channels

    def serves(self, of: Watched) -> bool:
        """Features serve every wish for them."""
        return True
