"""The base class of stages that change what a denoiser computes, and the record of what is installed on a model."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

from torch import nn

from reelquant._errors import RecipeError
from reelquant.sites import DenoiserMap
from reelquant.stages import ModelWork, Stage

ATTRIBUTE = "_reelquant_reuse"


class Installed(Protocol):
    """A reuse that acts on a model."""

    def remove(self) -> None:
        """Leave the model as it was."""
        ...

    def reset(self) -> None:
        """Start over: nothing is reused from earlier calls, and counts are zero."""
        ...

    def counts(self) -> dict[str, int]:
        """How much was computed, and what earlier results stood for, in the stage's ``unit``: ``computed`` and ``reused``."""
        ...

    def by_step(self) -> dict[int, tuple[int, int]]:
        """The same by the number of the step: computed, reused."""
        ...

    @property
    def parts(self) -> list[str]:
        """Module paths of what is computed or reused."""
        ...


@runtime_checkable
class CountsCells(Protocol):
    """A reuse whose parts are not computed at the same steps, and which counts each."""

    def by_cell(self) -> dict[str, dict[int, tuple[int, int]]]:
        """By part and the number of the step: computed, reused. A step that a part does not name was computed."""
        ...


class Reuse(Stage):
    """Installed on the float model before calibration observes it; stored with the model, and installed again when it is opened.

    A member keeps no state in itself: its fields are parameters, and :meth:`install` gives an object that holds the state.

    A denoiser has one reuse at most: a part that one leaves uncomputed gives the other nothing to keep, and the counts of both would
    describe calls that never came.

    Attributes:
        always: parameters with which everything is computed; results are then those without the reuse, bit for bit.
        unit: what is counted, in the plural, for reports.
        things: what the parts are, in the plural, for reports.
    """

    always: ClassVar[Mapping[str, Any]]
    unit: ClassVar[str] = "calls"
    things: ClassVar[str] = "blocks"
    samples: ClassVar[bool] = False
    exclusive: ClassVar[bool] = True
    default_on: ClassVar[str] = "*"
    takes_on: ClassVar[bool] = False

    @abstractmethod
    def facts(self, work: ModelWork) -> dict[str, Any]:
        """Plain data that :meth:`install` needs and discovery knows: module paths, names of arguments.

        Raises:
            UnsupportedError: if the denoiser does not have what the reuse needs.
        """

    @abstractmethod
    def install(self, model: nn.Module, facts: Mapping[str, Any]) -> Installed:
        """Act on a model from its next call on."""

    @property
    def remembers(self) -> int:
        """How many results of each part are kept at a time."""
        return 1

    def widest(self, work: ModelWork) -> tuple[Reuse, dict[str, Any]]:
        """A reuse that needs no data and keeps as much as this one at most will, and its facts: for plans."""
        return self, self.facts(work)

    def loaded(self, name: str, model: nn.Module, map_: DenoiserMap) -> None:
        put(model, name, self, self.facts(cast(ModelWork, Loaded(model, type(model).__name__, map_))))

    def before_observing(self, work: ModelWork) -> None:
        put(work.denoiser, work.name_of(self), self, self.facts(work))
        work.undo(lambda: remove_reuse(work.denoiser))

    def before_check(self, work: ModelWork) -> None:
        for one in installed_reuse(work.denoiser).values():
            one.installed.reset()

    def after_check(self, work: ModelWork) -> None:
        name = work.name_of(self)
        work.report.reuse[name] = installed_reuse(work.denoiser)[name].installed.counts()


class Loaded(NamedTuple):
    """What :meth:`Reuse.facts` may ask for where nothing is sampled."""

    denoiser: nn.Module
    component: str
    map: DenoiserMap


class Acting(NamedTuple):
    """A reuse on a model: what acts, and what it was made of."""

    installed: Installed
    stage: Reuse
    facts: dict[str, Any]


def installed_reuse(model: nn.Module) -> dict[str, Acting]:
    """What is installed on a model, by name."""
    return getattr(model, ATTRIBUTE, {})


def stored_reuse(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint stores: name -> options and facts, as plain data."""
    return {name: {"options": dataclasses.asdict(one.stage), "facts": one.facts} for name, one in installed_reuse(model).items()}


def remove_reuse(model: nn.Module) -> None:
    """Remove everything that is installed on a model."""
    for one in installed_reuse(model).values():
        one.installed.remove()
    vars(model).pop(ATTRIBUTE, None)


@contextmanager
def all_computed(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is reused. Afterwards the same is installed again, with nothing to reuse from before."""
    before = installed_reuse(model)
    remove_reuse(model)
    try:
        yield
    finally:
        for name, one in before.items():
            put(model, name, one.stage, one.facts)


def put(model: nn.Module, name: str, stage: Reuse, facts: Mapping[str, Any]) -> None:
    """Install a reuse on a model.

    Raises:
        RecipeError: if the model has one.
    """
    if here := next(iter(installed_reuse(model)), None):
        raise RecipeError(f"reuse '{name}' cannot be installed on {type(model).__name__}: '{here}' is there already; keep one")
    acting = Acting(stage.install(model, facts), stage, dict(facts))
    object.__setattr__(model, ATTRIBUTE, {name: acting})
