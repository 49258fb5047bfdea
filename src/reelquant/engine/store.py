"""Where float tensors come from and where quantized layers are until a run ends: the interface, and the member for memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

from torch import nn

from reelquant.engine.build import Built, BuiltGroup, Context, build_group
from reelquant.engine.choice import Choice
from reelquant.engine.plan import Plan
from reelquant.nn import KernelFacts, get_module, kernels_of, widened_layer
from reelquant.sites import Group

T = TypeVar("T")


class Store(Protocol):
    """Tensors of one component.

    Attributes:
        keeper: keeps statistics; None for memory.
        device: type of device where the sampler runs; None for the one that the component lies on.
    """

    keeper: Any
    device: str | None

    def check_weights(self, plan: Plan) -> None:
        """Refuse broken weights before anything is sampled.

        Raises:
            CalibrationError: naming the tensor and its layer.
        """
        ...

    def float_layer(self, name: str) -> nn.Module:
        """A float layer with its tensors in memory."""
        ...

    def copy(self, name: str) -> nn.Module:
        """A copy of a part of the model as it is now, its tensors in memory."""
        ...

    def running(self) -> AbstractContextManager[None]:
        """Inside, the denoiser can be called."""
        ...

    def begun(self, phase: str, run: Callable[[], T], *content: Any) -> Callable[[], T]:
        """Sample, or as much of it as has to be done now; the answer, called later, gives the result.

        Args:
            phase: what is sampled for.
            run: samples; it may be called more than once, and once more when the result is asked for.
            content: what else decides the result.
        """
        ...

    def each(self, phase: str, scores: Sequence[Callable[[], float]]) -> list[float]:
        """Scores that do not depend on each other, in order; processes may share them."""
        ...

    def observed(self) -> None:
        """Calibration is over."""
        ...

    def score(self, key: Any, sample: Callable[[], float]) -> float:
        """The score of a trial; a store may remember it from an earlier run."""
        ...

    def group(self, context: Context, group: Group, choice: Choice) -> BuiltGroup:
        """The replacements of a group, built if the store does not have them."""
        ...

    def improved(self, built: BuiltGroup, name: str, one: Built, key: Any) -> None:
        """Take a better version of one layer into a group that is not in the model at the moment."""
        ...

    def known(self, key: Any, groups: Sequence[BuiltGroup]) -> Any:
        """What an earlier run remembered of a block under this key, or None. Its better layers are put into ``groups`` again."""
        ...

    def remember(self, key: Any, value: Any) -> None:
        """Remember JSON data of a block under this key for a run that resumes this one."""
        ...

    def installed(self, built: BuiltGroup) -> None:
        """The layers of a group have been put into the model."""
        ...

    def removed(self) -> None:
        """The model is float again."""
        ...

    def drafts_done(self) -> None:
        """Trials are over; drafts may go."""
        ...

    def kernels(self) -> KernelFacts:
        """What computes the quantized layers that are in the model."""
        ...


class Memory:
    """A component that is in memory."""

    keeper: Any = None
    device: str | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._drafts: dict[tuple[str, str], BuiltGroup] = {}

    def check_weights(self, plan: Plan) -> None:
        """They were looked at before the plan was made."""

    def float_layer(self, name: str) -> nn.Module:
        return widened_layer(get_module(self.model, name))

    def copy(self, name: str) -> nn.Module:
        return copy.deepcopy(get_module(self.model, name))

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begun(self, phase: str, run: Callable[[], T], *content: Any) -> Callable[[], T]:
        result = run()
        return lambda: result

    def each(self, phase: str, scores: Sequence[Callable[[], float]]) -> list[float]:
        return [score() for score in scores]

    def observed(self) -> None:
        """Statistics stay in memory."""

    def score(self, key: Any, sample: Callable[[], float]) -> float:
        return sample()

    def group(self, context: Context, group: Group, choice: Choice) -> BuiltGroup:
        if not context.draft:
            return build_group(context, group, choice)
        rows = [context.plan.layers[name] for name in group.layers if context.plan.layers[name].skipped is None]
        key = (group.name, choice.digest(rows))
        if key not in self._drafts:
            self._drafts[key] = build_group(context, group, choice)
        return self._drafts[key]

    def improved(self, built: BuiltGroup, name: str, one: Built, key: Any) -> None:
        built.layers[name] = one.layer
        built.records = [one.record if one.record and record.name == name else record for record in built.records]

    def known(self, key: Any, groups: Sequence[BuiltGroup]) -> Any:
        return None

    def remember(self, key: Any, value: Any) -> None:
        """A run in memory is not resumed."""

    def installed(self, built: BuiltGroup) -> None:
        """Layers are where they belong."""

    def removed(self) -> None:
        """Float layers are back."""

    def drafts_done(self) -> None:
        self._drafts.clear()

    def kernels(self) -> KernelFacts:
        return kernels_of(self.model)
