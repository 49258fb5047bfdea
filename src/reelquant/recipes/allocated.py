"""A recipe with one rule for every format of an allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from reelquant._errors import RecipeError
from reelquant.recipes.recipe import Recipe, load_recipe


def allocated(base: str | Mapping[str, Any] | Recipe, formats: Mapping[str, str], skip: Sequence[str] = (), name: str = "") -> Recipe:
    """A recipe that gives the layers of one denoiser their weight formats, and does everything else as another recipe does.

    Ranges of weights stay those of the base; steps of it that choose formats themselves are dropped, as formats are chosen now.

    Args:
        base: the recipe to change.
        formats: layer -> ``FORMAT/GRANULARITY``, as :func:`reelquant.allocate.allocate` gives them for a component.
        skip: names of layers that stay float.
        name: of the new recipe; by default that of the base with ``-allocated``.

    Raises:
        RecipeError: if the base cannot be read, or a format is not known.
    """
    recipe = load_recipe(base if isinstance(base, str | Recipe) else dict(base))
    data = recipe.model_dump(mode="json", exclude_unset=True)
    own = data["defaults"]["weight"]
    rules = [*data.get("rules", ())]
    by_format: dict[str, list[str]] = {}
    for layer, written in formats.items():
        by_format.setdefault(written, []).append(layer)
    for written, layers in by_format.items():
        fmt, _, grain = written.partition("/")
        weight = own | {"format": fmt, "granularity": grain}
        rules.append({"on": " | ".join(layers), "skip": False, "weight": weight})
    if skip:
        rules.append({"on": " | ".join(skip), "skip": True, "because": "the allocation leaves it float"})
    steps = [step for step in data.get("steps", ()) if "allocate" not in step]
    made = {**data, "name": name or f"{recipe.name}-allocated", "rules": rules, "steps": steps}
    return load_recipe({key: value for key, value in made.items() if key not in ("summary", "ours", "paper")})


def recipe_text(recipe: Recipe) -> str:
    """YAML that ``--recipe`` reads."""
    data = recipe.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(data, sort_keys=False, width=120, allow_unicode=True)


def with_steps(base: str | Mapping[str, Any] | Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with other bits of inputs, and more of them at some steps.

    Args:
        base: the recipe to change; it has to round inputs.
        changes: as :meth:`reelquant.allocate.StepPlan.overrides` gives them.

    Raises:
        RecipeError: if the base leaves inputs float.
    """
    recipe = load_recipe(base if isinstance(base, str | Recipe) else dict(base))
    if recipe.defaults.input is None:
        raise RecipeError(
            f"recipe '{recipe.name}' leaves inputs float, so they have no bits to divide; name one that rounds them: minmax-w6a6"
        )
    return load_recipe(recipe, {**changes, "name": f"{recipe.name}-steps"})
