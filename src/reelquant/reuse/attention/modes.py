"""The table of modes, and modes from the words of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from reelquant._errors import RecipeError, nearest
from reelquant.reuse.attention.halves import Halves
from reelquant.reuse.attention.mode import Mode
from reelquant.reuse.attention.share import Share
from reelquant.reuse.attention.sparse import Sparse
from reelquant.reuse.attention.window import Window

MODES: dict[str, type[Mode]] = {"share": Share, "window": Window, "halves": Halves, "sparse": Sparse}
COMPUTED = "computed"  # the word for none of them


def parse_mode(where: str, words: Mapping[str, Any]) -> Mode | None:
    """The mode of ``{"mode": "window", "window": 0.5}``; None for ``{"mode": "computed"}``.

    Raises:
        RecipeError: naming the place and what is wrong.
    """
    name, options = words.get("mode"), {key: value for key, value in words.items() if key != "mode"}
    if name == COMPUTED and not options:
        return None
    if not isinstance(name, str) or name not in MODES:
        raise RecipeError(f"{where}: there is no mode {name!r} of attention; {nearest(str(name), [*MODES, COMPUTED])}")
    known = [field.name for field in dataclasses.fields(MODES[name])]  # type: ignore[arg-type]
    for key in options:
        if key not in known:
            raise RecipeError(f"{where}: mode '{name}' has no option '{key}'; {nearest(str(key), known) if known else 'it has none'}")
    try:
        return MODES[name](**options)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
