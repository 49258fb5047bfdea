"""A recipe with one rule for every format of an allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from reelquant._errors import RecipeError
from reelquant.formats import Int, parse_format
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


def with_steps(base: str | Mapping[str, Any] | Recipe, entries: Sequence[Mapping[str, Any]]) -> Recipe:
    """A recipe with bits of inputs or of weights that change over the steps.

    Args:
        base: the recipe to change; it has to round what gets the bits to integers, weights to more of them.
        entries: of ``step_bits``, as :meth:`reelquant.allocate.StepPlan.entries` gives them for a part; those of both parts in a row.

    Raises:
        RecipeError: if the base has no such inputs or weights.
    """
    recipe = load_recipe(base if isinstance(base, str | Recipe) else dict(base))
    if recipe.defaults.input is None and any("inputs" in one for one in entries):
        raise RecipeError(
            f"recipe '{recipe.name}' leaves inputs float, so they have no bits to divide; name one that rounds them: minmax-w6a6"
        )
    most = max((max(one["weights"]) for one in entries if "weights" in one), default=0)
    if most > _integer_bits(recipe.defaults.weight.format):
        raise RecipeError(
            f"recipe '{recipe.name}' stores weights as {recipe.defaults.weight.format}, and a step is to read {most} bits of them: "
            "name one that stores integers of as many bits, as minmax-w8a8 does"
        )
    every = {key: value for one in entries if "on" not in one for key, value in one.items()}
    apart = [dict(one) for one in entries if "on" in one]
    return load_recipe(recipe, {"step_bits": [every, *apart] if apart else every, "name": f"{recipe.name}-steps"})


def _integer_bits(name: str | Sequence[str]) -> int:
    fmt = parse_format(name) if isinstance(name, str) else None
    return fmt.bits if isinstance(fmt, Int) else 0
