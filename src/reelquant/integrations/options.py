"""What users of other quantizers expect to be able to say, as changes of a recipe: skip these modules, that format there, groups of n."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from reelquant._errors import RecipeError, SiteError, nearest
from reelquant.formats import parse_format
from reelquant.recipes.recipe import Recipe, load_recipe
from reelquant.sites import Layer, matches

FEW_BITS = 6  # below, a scale per output channel is not enough and the best range is not the widest
GROUPED: dict[str, Any] = {"granularity": "group-64", "range": {"name": "mse", "candidates": 16, "smallest": 0.7}}
BY_CHANNEL: dict[str, Any] = {"granularity": "channel"}
SKIPPED = "modules_to_not_convert"  # the reason for layers that the user names there
_PREFIXES = ("re:", "role:", "class:", "maybe:")


def check(skip: Sequence[str] | None, formats: Mapping[str, Sequence[str]] | None, group_size: int | None) -> None:
    """Whether the options make sense for some model.

    Raises:
        RecipeError: naming the option, the value and what would work.
    """
    if formats is not None and not isinstance(formats, Mapping):
        raise RecipeError(f"modules_dtype_dict maps number formats to lists of modules, {{'int8': ['*.to_q']}}, got {formats!r}")
    _check_words("modules_to_not_convert", skip or ())
    for name, words in (formats or {}).items():
        parse_format(name)
        _check_words(f"modules_dtype_dict['{name}']", words)
    if group_size is not None and (type(group_size) is not int or (group_size < 1 and group_size != -1)):
        raise RecipeError(f"group_size is a number of weights (32, 64, 128 ...) or -1 for one scale per output channel, got {group_size!r}")


def _check_words(option: str, words: Any) -> None:
    if isinstance(words, str) or not isinstance(words, Iterable) or not all(isinstance(word, str) and word for word in words):
        raise RecipeError(f"{option} is a list of module names or patterns, got {words!r}")


def with_options(
    recipe: Recipe,
    model: nn.Module,
    layers: Iterable[Layer],
    skip: Sequence[str] | None = None,
    formats: Mapping[str, Sequence[str]] | None = None,
    group_size: int | None = None,
) -> Recipe:
    """The recipe with the options of :class:`~reelquant.integrations.config.ReelQuantConfig` written into it.

    Rules of options come last, so they win over the recipe's; ``skip`` wins over ``formats``.

    Raises:
        SiteError: if the model has no part of that name; the message gives the nearest one.
    """
    if not skip and not formats and group_size is None:
        return recipe
    known, data = list(layers), recipe.model_dump(mode="json", exclude_unset=True)
    if group_size is not None:
        _regroup(data, group_size)
    rules = list(data.get("rules", ()))
    for name, words in (formats or {}).items():
        weight = {"format": name, **(GROUPED if parse_format(name).bits < FEW_BITS else BY_CHANNEL)}
        weight = weight if group_size is None else _grouped(weight, group_size)
        rules += [{"on": on, "skip": False, "weight": weight} for on in _patterns(words, "modules_dtype_dict", model, known)]
    for on in _patterns(skip or (), "modules_to_not_convert", model, known):
        rules.append({"on": on, "skip": True, "because": SKIPPED})
    return load_recipe(data | {"rules": rules})


def _patterns(words: Sequence[str], option: str, model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Patterns of the words that name layers; those that name other parts of the model (norms, embeddings) are float anyway."""
    patterns = {word: pattern_of(word) for word in words}
    for word, pattern in patterns.items():
        if not any(matches(pattern, layer) for layer in layers) and not word.startswith(("role:", "class:", "maybe:")):
            _check_known(word, option, model)
    return [pattern for pattern in patterns.values() if any(matches(pattern, layer) for layer in layers)]


def pattern_of(word: str) -> str:
    """The pattern of a module name. A plain path matches wherever it occurs, and everything below it."""
    if word.startswith("maybe:"):
        return pattern_of(word.removeprefix("maybe:"))
    if word.lstrip("! ").startswith(_PREFIXES) or any(mark in word for mark in "*?[|&!"):
        return word
    return rf"re:(.*\.)?{re.escape(word)}(\..*)?"


def _check_known(word: str, option: str, model: nn.Module) -> None:
    paths = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
    if any(f".{word}." in f".{path}." for path in paths):
        return
    tails = {".".join(path.split(".")[start:]) for path in paths for start in range(path.count(".") + 1)}
    raise SiteError(f"{option} names '{word}', which matches nothing in {type(model).__name__}; {nearest(word, sorted(tails))}")


def _regroup(data: dict[str, Any], size: int) -> None:
    """Give the weights of a recipe's defaults, and those of rules that are grouped, groups of this size."""
    data["defaults"]["weight"] = _grouped(data["defaults"]["weight"], size)
    for rule in data.get("rules", ()):
        if (rule.get("weight") or {}).get("granularity", "").startswith("group"):
            rule["weight"] = _grouped(rule["weight"], size)


def _grouped(weight: dict[str, Any], size: int) -> dict[str, Any]:
    return weight | {"granularity": "channel" if size == -1 else f"group-{size}"}
