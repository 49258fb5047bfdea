"""What earlier steps gave stands for the output of this one: the last of them, or a polynomial through the last ones.

Papers: attention sharing across timesteps of DiTFastAttn (arXiv 2406.08552). Ours shares the output of
``scaled_dot_product_attention``; theirs that of the attention layer, so that its projections are not computed either. A polynomial is
TaylorSeer's forecast (arXiv 2503.06923), which has it for whole blocks; see :class:`reelquant.reuse.history.History`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reelquant._errors import RecipeError
from reelquant.reuse.attention.mode import Mode, Place
from reelquant.reuse.history import History, check_order


@dataclass(frozen=True)
class Share(Mode):
    """Nothing is computed. Copies are kept and given: a model may write into what attention gives.

    Attributes:
        order: 0 repeats the last output; 1 and 2 are a line and a parabola through the last two and three, in the timestep.
        fitted: weights of the last outputs, oldest first, instead of those of the polynomial.
    """

    order: int = 0
    fitted: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_order(self.order)
        if self.fitted and len(self.fitted) > self.order + 1:
            raise RecipeError(f"attention's mode 'share' of order {self.order} has up to {self.order + 1} weights, got {list(self.fitted)}")

    @property
    def lasting(self) -> bool:
        return self.order > 0

    def attend(self, place: Place) -> Tensor | None:
        history: History | None = place.recall(self._name)
        return history.at(place.timestep, self.fitted)[0].clone() if history is not None and place.fits(history.last[0]) else None

    def keep(self, place: Place, output: Tensor) -> None:
        place.keep(self._name, lambda: self._with(place, output))

    @property
    def _name(self) -> tuple[str, int]:
        return "share", self.order

    def _with(self, place: Place, output: Tensor) -> History:
        """The outputs that were kept, and this one."""
        history: History | None = place.recall(self._name)
        if history is None or not place.fits(history.last[0]):
            history = History(self.order)
        history.keep(place.timestep, [output.clone()])
        return history
