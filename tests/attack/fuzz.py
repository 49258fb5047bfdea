"""Recipes with values replaced, removed, added and renamed, and with letters changed; a seed gives the same one every time."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from reelquant import ReelQuantError
from reelquant.discover import discover
from reelquant.engine.plan import make_plan
from reelquant.recipes.recipe import load_recipe, names
from reelquant.recipes.text import read_text
from reelquant.sites import DenoiserMap
from tests.tiny.configs import TINY

Target = tuple[DenoiserMap, nn.Module]


JUNK: list[Any] = [
    None, True, -1, 0, 1, 10**9, 10**18, 10**400, -(10**18), 0.5, -0.5, 1e308, float("nan"), float("inf"), "", " ", "x" * 5000, "\x00",
    "\x1b[31m", "[bold]", "<script>", "int8", "int4", "group-64", "group-0", "group-1000000000000000000", "frame-1000000000", "token",
    "sample",
    "per_step", "role:main", "role:foo", "re:(a+)+b", "re:[", "re:" + "(" * 400,
    "!" * 3000, "a|", "&", "*" * 500, "maybe:*", "../../etc/passwd",
    [], [[]], [None], ["int8", "int4"], [1, 2, 3], list(range(2000)), {}, {"name": "mse"}, {"name": "mse", "candidates": 10**9},
    {"name": "percentile", "percentile": float("nan")}, {"a": {"b": {"c": 1}}}, [0.5] * 11, {1: 2}, "2020-01-01", "on", "yes", "null",
]  # fmt: skip


def target() -> Target:
    """What recipes are planned for."""
    model = TINY["WanTransformer3DModel"]()
    return discover(model), model


def places(node: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [here, *(place for key in keys for place in places(node[key], (*here, key)))]


def mutated(data: Any, dice: random.Random) -> Any:
    """One to three values replaced, removed, added or renamed."""
    data = copy.deepcopy(data)
    for _ in range(dice.randint(1, 3)):
        place = dice.choice(places(data)[1:] or [()])
        if not place:
            return dice.choice(JUNK)
        node = data
        for key in place[:-1]:
            node = node[key]
        how = dice.random()
        if how < 0.6:
            node[place[-1]] = copy.deepcopy(dice.choice(JUNK))
        elif how < 0.75:
            del node[place[-1]]
        elif isinstance(node, dict):
            node[dice.choice(["weight", "format", "on", "range", "transform", "solve", "x", 3, "cap", "extends"])] = dice.choice(JUNK)
        else:
            node.append(copy.deepcopy(dice.choice(node)))
    return data


def fuzzed(seed: int, folder: Path) -> Any:
    """A recipe: a mapping, or a file in ``folder``."""
    dice = random.Random(seed)
    data = mutated(read_text(dice.choice(names())), dice)
    if seed % 2 and isinstance(data, dict):
        return data
    text = yaml.safe_dump(data, sort_keys=False)
    if seed % 4 == 0:
        letters = list(text)
        for _ in range(dice.randint(1, 4)):
            letters[dice.randrange(len(letters))] = dice.choice("{}[]&*!|>%@`:,-?#'\"\n\t\x00aé")
        text = "".join(letters)
    file = folder / "recipe.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    return file


def planned(source: Any, target: Target) -> str:
    """``planned``, or the error; anything but a ReelQuantError passes through."""
    try:
        make_plan(load_recipe(source), *target)
    except ReelQuantError as error:
        return f"{type(error).__name__}: {error}"
    return "planned"
