"""What a way not to compute attention is, and what it sees of a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from reelquant._errors import RecipeError
from reelquant.nn import AttentionCall


@dataclass(eq=False)
class Place:
    """One call of attention, and what is kept of the same call at earlier steps.

    Attributes:
        call: its tensors.
        computes: computes attention.
        kept: of the trajectory: what modes kept of computed steps, by their names and the call.
        given: of the trajectory: what modes gave last, by their names and the site, with the number of the step.
        name: the row of the site, and the number of the call among those that the site makes in one call of the denoiser.
        half: the number of the denoiser's call within its step.
        step: the number of the step.
        twice: whether the denoiser computes both halves of guidance in this call.
        timestep: of the step.
        multiplied: multiplications of attention so far.
        done: names of what was kept here.
    """

    call: AttentionCall
    computes: Callable[[AttentionCall], Tensor]
    kept: MutableMapping[Hashable, Any]
    given: MutableMapping[Hashable, Any]
    name: tuple[int, int] = (0, 0)
    half: int = 0
    step: int = 0
    twice: bool = False
    timestep: float = 0.0
    multiplied: int = 0
    done: set[Hashable] = field(default_factory=set)

    def compute(self, call: AttentionCall) -> Tensor:
        """Attention of this call, or of a part of it."""
        self.multiplied += call.multiplications
        return self.computes(call)

    def keep(self, name: Hashable, make: Callable[[], Any]) -> None:
        """Keep something for the same call at later steps; what several modes keep under one name is made once."""
        if name not in self.done:
            self.done.add(name)
            self.kept["kept", name, self.name, self.half] = make()

    def recall(self, name: Hashable) -> Any:
        """What was kept last under this name; None for nothing."""
        return self.kept.get(("kept", name, self.name, self.half))

    def give(self, name: Hashable, state: Any) -> None:
        """Leave something for the same call of the other half of guidance, at this step."""
        self.given["given", name, self.name] = self.step, state

    def take(self, name: Hashable) -> Any:
        """What was left for this call; None for nothing."""
        step, state = self.given.get(("given", name, self.name), (None, None))
        return state if step == self.step else None

    def fits(self, output: Any) -> bool:
        """Whether a tensor may stand for the output of this call."""
        query, value = self.call.query, self.call.value
        if not isinstance(output, Tensor) or (output.dtype, output.device) != (query.dtype, query.device):
            return False
        return output.shape == (*query.shape[:3], value.shape[3])


class Mode(ABC):
    """A way not to compute all of attention. Members are frozen dataclasses; their fields are the options that recipes write.

    A member keeps nothing in itself: a place remembers for it, under its own value as the name.
    """

    @property
    def lasting(self) -> bool:
        """Whether it needs something of every computed step, not of the last one alone."""
        return False

    @abstractmethod
    def attend(self, place: Place) -> Tensor | None:
        """What stands for the output of a call, or None where the mode cannot give it: the call is then computed."""

    def keep(self, place: Place, output: Tensor) -> None:
        """Keep what :meth:`attend` needs at later steps of a call that was computed."""
        del place, output


def check_share(mode: str, name: str, value: float) -> None:
    """Refuse shares outside of (0, 1].

    Raises:
        RecipeError: naming the option.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise RecipeError(f"'{name}' of attention's mode '{mode}' is a share in (0, 1], got {value!r}")
