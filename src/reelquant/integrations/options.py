"""What users of other quantizers expect to be able to say, told as changes of a recipe: keep these modules, that format there, groups of n."""

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
_PREFIXES = ("re:", "role:", "class:", "maybe:")


def check(
    recipe: Recipe, keep: Sequence[str] | None, formats: Mapping[str, Sequence[str]] | None, group_size: int | None
) -> None:  # fmt: skip
    """Whether the options make sense for some model.

    Raises:
        RecipeError: naming the option, the value and what would work.
    """
    for option, words in (("modules_to_not_convert", keep), *((f"modules_dtype_dict['{name}']", words) for name, words in (formats or {}).items())):
        if words is not None and (isinstance(words, str) or not all(isinstance(word, str) and word for word in words)):
            raise RecipeError(f"{option} is a list of module names or patterns, got {words!r}")
    for name in formats or {}:
        parse_format(name)
    if group_size is not None and (not isinstance(group_size, int) or isinstance(group_size, bool) or (group_size < 1 and group_size != -1)):
        raise RecipeError(f"group_size is a number of weights (32, 64, 128 ...) or -1 for one scale per output channel, got {group_size!r}")


def with_options(
    recipe: Recipe, model: nn.Module, layers: Iterable[Layer], keep: Sequence[str] | None = None,
    formats: Mapping[str, Sequence[str]] | None = None, group_size: int | None = None,
) -> Recipe:  # fmt: skip
    """The recipe with the options of :class:`~reelquant.integrations.config.ReelQuantConfig` written into it.

    Rules of options come last, so they win over the recipe's; ``keep`` wins over ``formats``.

    Raises:
        SiteError: if a name is no part of the model; the message gives the nearest one.
    """
    known, data = list(layers), recipe.model_dump(mode="json", exclude_unset=True)
    if group_size is not None:
        _regroup(data, group_size)
    rules = []
    for name, words in (formats or {}).items():
        weight = {"format": name, **(GROUPED if parse_format(name).bits < FEW_BITS else BY_CHANNEL)}
        rules += [{"on": on, "keep": False, "weight": _grouped(weight, group_size)} for on in _patterns(words, "modules_dtype_dict", model, known)]
    rules += [{"on": on, "keep": True, "because": "modules_to_not_convert"} for on in _patterns(keep or (), "modules_to_not_convert", model, known)]
    return load_recipe(data | {"rules": [*data.get("rules", ()), *rules]}) if rules or group_size is not None else recipe


def _patterns(words: Sequence[str], option: str, model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Patterns of the words that name layers; those that name other parts of the model (norms, embeddings) are float anyway."""
    patterns = {word: _pattern(word) for word in words}
    for word, pattern in patterns.items():
        if not any(matches(pattern, layer) for layer in layers) and not word.startswith(("role:", "class:", "maybe:")):
            _check_known(word, option, model)
    return [pattern for pattern in patterns.values() if any(matches(pattern, layer) for layer in layers)]


def _pattern(word: str) -> str:
    """A plain path stands for itself wherever it occurs, and for what lies below it."""
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
    """Give every grouped weight of a recipe, and those of its defaults, groups of this size."""
    data["defaults"] = data["defaults"] | {"weight": _grouped(data["defaults"]["weight"], size)}
    data["rules"] = [
        rule | {"weight": _grouped(rule["weight"], size)} if str((rule.get("weight") or {}).get("granularity", "")).startswith("group") else rule
        for rule in data.get("rules", ())
    ]


def _grouped(weight: dict[str, Any], size: int | None) -> dict[str, Any]:
    return weight if size is None else weight | {"granularity": "channel" if size == -1 else f"group-{size}"}
