"""Members of tables from the words of a recipe: names, parameters, and choices among parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from reelquant._errors import RecipeError, nearest
from reelquant.recipes.bounds import CHOICES


def construct(noun: str, name: str, table: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """A member of a table with these parameters.

    Raises:
        RecipeError: for an unknown name or parameter, with the nearest valid one; for a value of the wrong kind.
    """
    member = look_up(noun, name, table)
    known = {field.name: field for field in dataclasses.fields(member)}
    for key, value in options.items():
        if key not in known:
            where = nearest(key, known) if set(known) - _SHARED else "it has none"
            raise RecipeError(f"{noun} '{name}' has no parameter '{key}'; {where}")
        if not _same_kind(value, known[key]):
            raise RecipeError(f"{key} of {noun} '{name}' is like {known[key].default!r} in kind, got {value!r}")
        if isinstance(value, int) and abs(value) > MOST:
            raise RecipeError(f"{key} of {noun} '{name}' is at most {MOST}, got {value}")
    return member(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})


MOST = 1_000_000  # of any whole number among parameters: more candidates, calls or rounds than anybody waits for
_SHARED = {"correct_bias"}  # parameters that every member of an axis has


def look_up(noun: str, name: str, table: Mapping[str, Any]) -> Any:
    """The class of this name.

    Raises:
        RecipeError: with the nearest name.
    """
    if not isinstance(name, str) or name not in table:
        raise RecipeError(f"unknown {noun} '{name}'; {nearest(str(name), table)}")
    return table[name]


def combinations(member: Any, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the parameters that are given as lists; one element if there is nothing to choose.

    A list for a parameter that takes several values is one value, and a list of lists is a choice.
    """
    several = {field.name for field in dataclasses.fields(member) if "tuple" in str(field.type)}
    combined: list[dict[str, Any]] = [{}]
    for key, value in options.items():
        if isinstance(value, list) and len(combined) * len(value) > CHOICES:
            raise RecipeError(f"the list of {len(value)} values for '{key}' makes more than {CHOICES} combinations; give fewer")
        choice = isinstance(value, list) and (key not in several or any(isinstance(one, list) for one in value))
        values = value if choice else [value]
        combined = [{**partial, key: one} for partial in combined for one in values]
    return combined


_ITEMS: dict[str, type | tuple[type, ...]] = {
    "float": (int, float),
    "int": int,
    "str": str,
    "Mapping": dict,
}  # of parameters that take several values


def _same_kind(value: Any, field: dataclasses.Field[Any]) -> bool:
    """Numbers for numbers, words for words; a default of None stands for a number that may be missing."""
    default = field.default
    if isinstance(value, list | tuple):
        kind = next((kind for word, kind in _ITEMS.items() if f"tuple[{word}" in str(field.type)), None)
        return kind is not None and all(isinstance(one, kind) and not isinstance(one, bool) for one in value)
    if default is None or (isinstance(default, float) and not isinstance(value, str)):
        return value is default or (isinstance(value, int | float) and not isinstance(value, bool))
    return type(value) is type(default)
