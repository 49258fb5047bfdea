"""The base class of stages that change what a denoiser computes, and the record of what is installed on a model."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

from torch import nn

from reelquant._errors import CheckpointError, RecipeError
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
        """How often a part was computed, and how often an earlier result stood for it: ``computed`` and ``reused``."""
        ...


class Reuse(Stage):
    """Installed on the float model before calibration observes it; stored with the model, and installed again when it is opened.

    A member keeps no state in itself: its fields are parameters, and :meth:`install` gives an object that holds the state.

    A denoiser has one reuse at most: a part that one leaves uncomputed gives the other nothing to keep, and the counts of both would
    describe calls that never came.

    Attributes:
        always: parameters with which everything is computed; results are then those without the reuse, bit for bit.
    """

    always: ClassVar[Mapping[str, Any]]
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

    def before_observing(self, work: ModelWork) -> None:
        facts = self.facts(work)
        _put(work.denoiser, self, facts)
        work.undo(lambda: remove_reuse(work.denoiser))

    def before_check(self, work: ModelWork) -> None:
        for installed, _ in installed_reuse(work.denoiser).values():
            installed.reset()

    def after_check(self, work: ModelWork) -> None:
        installed, _ = installed_reuse(work.denoiser)[_name(self)]
        work.report.reuse[_name(self)] = installed.counts()


def installed_reuse(model: nn.Module) -> dict[str, tuple[Installed, dict[str, Any]]]:
    """What is installed on a model: name -> (what acts, what a checkpoint stores about it)."""
    return getattr(model, ATTRIBUTE, {})


def stored_reuse(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint stores: name -> options and facts, as plain data."""
    return {name: data for name, (_, data) in installed_reuse(model).items()}


def install_stored(model: nn.Module, stored: Mapping[str, Any]) -> None:
    """Install what a checkpoint stores.

    Raises:
        CheckpointError: for a name or an option that this version does not know.
    """
    from reelquant.reuse import REUSES

    for name, data in stored.items():
        try:
            options = {key: tuple(value) if isinstance(value, list) else value for key, value in data["options"].items()}
            _put(model, REUSES[name](**options), data["facts"])
        except (KeyError, TypeError, RecipeError) as error:
            raise CheckpointError(
                f"quantization_config.reuse.{name} cannot be installed ({type(error).__name__}: {error}); import the package that "
                f"registers it before opening the pipeline, or upgrade reelquant (known here: {', '.join(REUSES)})"
            ) from None


def remove_reuse(model: nn.Module) -> None:
    """Remove everything that is installed on a model."""
    for installed, _ in installed_reuse(model).values():
        installed.remove()
    vars(model).pop(ATTRIBUTE, None)


@contextmanager
def all_computed(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is reused. Afterwards the same is installed again, with nothing to reuse from before."""
    stored = stored_reuse(model)
    remove_reuse(model)
    try:
        yield
    finally:
        install_stored(model, stored)


def _put(model: nn.Module, stage: Any, facts: Mapping[str, Any]) -> None:
    name = _name(stage)
    if here := next(iter(installed_reuse(model)), None):
        raise RecipeError(f"reuse '{name}' cannot be installed on {type(model).__name__}: '{here}' is there already; keep one")
    data = {"options": dataclasses.asdict(stage), "facts": dict(facts)}
    installed = stage.install(model, facts)
    object.__setattr__(model, ATTRIBUTE, {**installed_reuse(model), name: (installed, data)})


def _name(stage: Stage) -> str:
    from reelquant.reuse import REUSES

    return next(name for name, kind in REUSES.items() if type(stage) is kind)
