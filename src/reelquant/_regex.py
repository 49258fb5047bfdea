"""Regular expressions from recipes, which may come from anybody: those that can try too many ways are refused before they are used.

Python's ``re`` backtracks and cannot be stopped. So the number of ways in which a pattern may split a name is bounded from its parse tree:
every repetition counts for as many ways as a name has letters, alternatives add up, what follows each other multiplies.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from re import _constants as words  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

LETTERS = 1_000  # of a pattern
WAYS = 10**7  # of a pattern; a way takes some nanoseconds, and most end after a letter
NAME = 100  # letters of a name, about
NUMBER = 5  # digits of a number in a name, about
_REPEATS = (words.MAX_REPEAT, words.MIN_REPEAT, words.POSSESSIVE_REPEAT)
_DIGITS = [(words.IN, [(words.CATEGORY, words.CATEGORY_DIGIT)])]


@lru_cache(maxsize=1000)
def safe(text: str) -> re.Pattern[str]:
    """The compiled pattern.

    Raises:
        ValueError: if it is not a regular expression, or may backtrack for long; with the reason.
    """
    if len(text) > LETTERS:
        raise ValueError(f"cannot be used: it has {len(text)} letters, and a pattern has at most {LETTERS}")
    try:
        if _ways(parser.parse(text)) > WAYS:
            raise ValueError("cannot be used: it may try too many ways to match a name: use fewer repetitions, and none inside of another")
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    except (RecursionError, OverflowError):
        raise ValueError("cannot be used: it is nested too deeply, or counts too far") from None


def _ways(tree: Any) -> float:
    return math.prod(_of_part(kind, value) for kind, value in tree)


def _of_part(kind: Any, value: Any) -> float:
    if kind in _REPEATS:
        return _of_repeat(*value)
    if kind is words.BRANCH:
        return sum(_ways(one) for one in value[1])
    if kind in (words.SUBPATTERN, words.ASSERT, words.ASSERT_NOT):
        return _ways(value[-1])
    if kind is words.ATOMIC_GROUP:
        return _ways(value)
    if kind is words.GROUPREF_EXISTS:
        return sum(_ways(one) for one in value[1:] if one is not None)
    return 1


def _of_repeat(least: Any, most: Any, what: Any) -> float:
    inner = _ways(what)
    if most == 1:
        return inner + 1 - least
    if inner > 1:  # every round of the repetition has these ways
        return math.inf if most > NAME else inner**most * (1 + most - least)
    return min(float(most - least + 1), NUMBER if list(what) == _DIGITS else NAME)
