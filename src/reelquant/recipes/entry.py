"""One stage of a recipe, with all the parameters that the search may choose from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reelquant._errors import RecipeError
from reelquant.recipes.axes import AXES
from reelquant.recipes.construct import combinations, construct, look_up
from reelquant.stages import HOOKS, Stage


@dataclass(frozen=True)
class Entry:
    """One line of a recipe that does something.

    Attributes:
        position: its place among all lines.
        axis: the key that names it.
        name: of the stage, in the table of its axis.
        label: what error messages call it.
        on: the layers it touches.
        options: the parameters of each alternative.
        alternatives: the stage with each of them; more than one is a choice of the search.
    """

    position: int
    axis: str
    name: str
    label: str
    on: str
    options: tuple[Mapping[str, Any], ...]
    alternatives: tuple[Stage, ...]

    @property
    def stage(self) -> Stage:
        """The first alternative, which stands for all where parameters do not matter."""
        return self.alternatives[0]

    def acts(self, hook: str) -> bool:
        """Whether the stage takes part in a hook of :data:`reelquant.stages.HOOKS`."""
        return hook in self.stage.hooks()


def make_entry(position: int, axis: str, name: str, options: Mapping[str, Any], on: str | None, label: str) -> Entry:
    """An entry with every alternative built, so that a wrong parameter is found when the recipe is read.

    Raises:
        RecipeError: for an unknown name, a wrong parameter, or an empty choice.
    """
    noun, members = AXES[axis].noun, AXES[axis].members
    member = look_up(noun, name, members)
    if on is not None and not member.takes_on:
        raise RecipeError(f"{noun} '{name}' acts on the whole denoiser; drop its 'on: {on}'")
    chosen = combinations(member, options)
    if not chosen:
        raise RecipeError("an empty list leaves nothing to choose from")
    if len(chosen) > 1 and not _searchable(member):
        raise RecipeError(f"parameters of {noun} '{name}' cannot be a choice of the search; give one value each")
    stages = tuple(construct(noun, name, members, one) for one in chosen)
    return Entry(position, axis, name, label, member.default_on if on is None else on, tuple(chosen), stages)


def _searchable(member: type[Stage]) -> bool:
    """Whether trials can tell alternatives apart: only stages of groups and layers act in a trial, on one float model."""
    hooks = member.hooks()
    return "before_observing" not in hooks and any(HOOKS[hook].scope in ("group", "layer") for hook in hooks)
