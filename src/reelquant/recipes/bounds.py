"""What a recipe may hold, however it was written: plain data of a size that people write. All else is refused before work begins."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

from reelquant._errors import RecipeError

BYTES = 1_000_000  # of a file
VALUES = 20_000  # after aliases are written out
DEPTH = 30
TEXT = 10_000  # letters of one text
NUMBER = 10**12
CHOICES = 1_000  # alternatives of a recipe, all combinations counted


def plain(data: Any, where: str) -> Any:
    """A copy of data that is mappings by words, lists, texts, finite numbers, booleans and nothing; whole numbers as keys become words.

    Raises:
        RecipeError: for anything else, and beyond the limits of this module.
    """
    left = [VALUES]

    def copied(value: Any, place: str, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0 or depth > DEPTH:
            raise RecipeError(f"{where}: more than {VALUES} values, or nested more than {DEPTH} deep; a recipe is shorter")
        if isinstance(value, Mapping):
            return {_key(key, where, place): copied(one, f"{place}.{key}"[-80:], depth + 1) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [copied(one, f"{place}.{i}"[-80:], depth + 1) for i, one in enumerate(value)]
        return _scalar(value, where, place)

    return copied(data, "", 0)


def _key(key: Any, where: str, place: str) -> str:
    if isinstance(key, int) and not isinstance(key, bool) and abs(key) <= NUMBER:
        return str(key)
    if not isinstance(key, str) or len(key) > TEXT:
        raise RecipeError(f"{where}: the keys of '{place.strip('.')}' are words, got {short(key)}")
    return key


def _scalar(value: Any, where: str, place: str) -> Any:
    good = value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) <= TEXT)
    if isinstance(value, int | float) and not good:
        good = abs(value) <= NUMBER  # false for NaN
    if not good:
        kind = "a date; quote it" if isinstance(value, date) else f"{short(value)}: numbers are finite and at most {NUMBER:.0e}"
        raise RecipeError(f"{where}: '{place.strip('.')}' is {kind}, texts have at most {TEXT} letters")
    return str(value) if isinstance(value, str) else value


def short(value: Any) -> str:
    """A value in a message; Python refuses to print the longest integers."""
    try:
        return f"{value!r:.60}"
    except ValueError:
        return f"a {type(value).__name__} of many digits"
