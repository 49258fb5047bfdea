"""Our own recipes, and what each of their parts brings: the recipe, the recipe without one part, and today's QVD recipe of the same bits.

Run it from the repository root::

    python -m benchmarks.reel --pipeline tiny-dit --clips 64 --output benchmarks/results --only reel-w6a6
    python -m benchmarks.reel --pipeline tiny-dit --clips 32 --output benchmarks/results

:mod:`benchmarks.beside` says how. The table is ``reel-PIPELINE.md``.
"""

from __future__ import annotations

from typing import Any

from benchmarks.beside import Rows, main
from reelquant.recipes.recipe import load_recipe

SOLVED = "role:main | role:temporal | role:prompt"
GPTQ = {"solve": "gptq", "correct_bias": True, "on": SOLVED}
SKIP = {"on": "role:entry | role:exit", "skip": True, "because": "first and last layer stay float"}


def without(parent: str, part: str, **changes: Any) -> dict[str, Any]:
    """A recipe with other keys."""
    return {"extends": parent, "name": f"{parent} without {part}"} | changes


def steps_of(parent: str) -> list[dict[str, Any]]:
    """The steps of a recipe, as they are written."""
    return [step.model_dump(exclude_none=True) for step in load_recipe(parent).steps]


def lacking(parent: str, mechanism: str) -> dict[str, Any]:
    """A recipe without the steps that name a mechanism."""
    steps = [step for step in steps_of(parent) if mechanism not in step.values()]
    return without(parent, mechanism, steps=steps)


def nearest(parent: str) -> dict[str, Any]:
    """A recipe whose codes are rounded to nearest."""
    steps = [step | {"solve": "nearest"} if step.get("solve") == "gptq" else step for step in steps_of(parent)]
    return without(parent, "gptq", steps=steps)


def rows_of(parent: str, rival: str, inputs: dict[str, Any], parts: list[str]) -> dict[str, tuple[Any, str]]:
    """The recipe beside its rival, and what its parts bring; ``inputs`` are the plainer numbers that its inputs are held against."""
    return {
        parent: (parent, rival),
        **{f"{parent}, no {part}": (lacking(parent, part), parent) for part in parts},
        f"{parent}, no gptq": (nearest(parent), parent),
        f"{parent}, plainer inputs": (without(parent, "its inputs", defaults={"input": inputs}), parent),
        f"{parent}, no exceptions": (without(parent, "exceptions", rules=[SKIP]), parent),
    }


ROWS: Rows = {
    "qvd-w6a6": ("qvd-w6a6", ""),
    **rows_of("reel-w6a6", "qvd-w6a6", {"granularity": "tensor"}, ["rotate"]),
    "qvd-w4a8": ("qvd-w4a8", ""),
    **rows_of("reel-w4a8", "qvd-w4a8", {"granularity": "tensor"}, ["rotate", "milp"]),
    "svdquant-w4a4": ("svdquant-w4a4", ""),
    **rows_of("reel-w4a4", "svdquant-w4a4", {"format": "int4"}, ["rotate", "lowrank"]),
}


if __name__ == "__main__":
    main(ROWS, "reel", __doc__)
