"""At which denoising steps a part is computed."""

from __future__ import annotations

from dataclasses import dataclass

from reelquant._errors import RecipeError

TOLERANCE = 2**-11  # relative: a pipeline may hand timesteps over in half precision


@dataclass(frozen=True)
class Schedule:
    """Steps are named by their timesteps, or counted from the start of a trajectory.

    A denoiser does not know how many steps a sampler makes. So a schedule in timesteps serves every number of them: a part is computed at
    the first step that reaches the next of these timesteps.

    Attributes:
        every: the part is computed at every n-th step; 1 computes it always.
        first: so many steps at the start are computed in any case.
        at: timesteps at which the part is computed, falling, in the unit that the denoiser is called with; they take the place of
            ``every``.

    Raises:
        RecipeError: for counts below 1, and timesteps that do not fall.
    """

    every: int = 2
    first: int = 1
    at: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.every < 1 or self.first < 1:
            raise RecipeError(f"'every' and 'first' of a reuse are steps, 1 or more, got {self.every} and {self.first}")
        if any(later >= earlier for earlier, later in zip(self.at, self.at[1:], strict=False)):
            raise RecipeError(f"'at' of a reuse lists timesteps from the largest to the smallest, each once, got {list(self.at)}")

    def computes(self, step: int, timestep: float = 0.0, before: float | None = None) -> bool:
        """Whether a step is computed in any case.

        Args:
            step: its number, counted from 0.
            timestep: its timestep.
            before: that of the step before; None for the first.
        """
        if step < self.first or (before is None and self.at):
            return True
        if not self.at:
            return (step - self.first + 1) % self.every == 0
        assert before is not None
        return any(_above(before, one) and not _above(timestep, one) for one in self.at)


def _above(timestep: float, other: float) -> bool:
    return timestep > other + TOLERANCE * abs(other)
