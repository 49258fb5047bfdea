"""Recipes as text: YAML, parents that a recipe extends, and dotted overrides."""

from __future__ import annotations

import copy
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from reelquant._errors import RecipeError, nearest
from reelquant.recipes.bounds import BYTES, DEPTH, VALUES, plain

EXTENDS = "extends"


class _Loader(yaml.SafeLoader):
    """YAML 1.2 booleans: only true and false, so that the key ``on`` stays a word."""


class _Bounded(_Loader):
    """Counts what aliases stand for: a few lines of them may mean more values than memory holds."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[int, int] = {}  # of finished nodes, by identity
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > 2 * DEPTH:  # values and what leads to them; the scanner takes long for thousands of levels
            raise yaml.YAMLError(f"it is nested more than {DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            raise yaml.YAMLError("an alias stands for something that it is itself a part of")
        if not alias:
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            flat = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
            self._sizes[id(node)] = 1 + sum(self._sizes[id(one)] for one in flat)
        if self._sizes[id(node)] > VALUES:
            raise yaml.YAMLError(f"it stands for more than {VALUES} values; a recipe is shorter")
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tTfF"))


def parse_value(text: str) -> Any:
    """One value as a recipe would read it: ``10``, ``true``, ``int4``, ``[0.5, 1.0]``, ``null``.

    Raises:
        RecipeError: if it is not YAML, or holds what recipes cannot hold.
    """
    return _load(text, f"'{text:.60}'")


def _load(text: str, where: str) -> Any:
    """Plain data of bounded size; whatever YAML's constructors raise is one error."""
    if len(text) > BYTES:
        raise RecipeError(f"{where} has {len(text)} letters; a recipe has at most {BYTES}")
    try:
        data = yaml.load(text, _Bounded)
    except RecursionError:
        raise RecipeError(f"{where} is not valid YAML: it is nested too deeply") from None
    except Exception as error:  # yaml.YAMLError; constructors of dates, integers and tagged values raise what they like
        raise RecipeError(f"{where} is not valid YAML: {' '.join(str(error).split()) or type(error).__name__:.300}") from None
    return plain(data, where)


def names() -> list[str]:
    """The recipes that come with the library."""
    files = resources.files("reelquant.recipes").joinpath("library").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_text(source: str | Path) -> dict[str, Any]:
    """The mapping in a recipe file or a recipe of the library, merged with the recipes it extends.

    Raises:
        RecipeError: if there is no such recipe, or it is not a mapping in YAML.
    """
    return extended(_parsed(source), _folder(source), (str(source),))


def parent_of(source: str | Path) -> str | None:
    """What the key ``extends`` of one recipe says, and nothing but that recipe is read: who offers files of others looks before it follows.

    Raises:
        RecipeError: if there is no such recipe, it is not a mapping in YAML, or it extends something that has no name.
    """
    data = _parsed(source)
    return _parent(data, str(source)) if EXTENDS in data else None


def _parent(data: dict[str, Any], where: str) -> str:
    parent = data[EXTENDS]
    if not isinstance(parent, str):
        raise RecipeError(f"{where}: 'extends' names one recipe or file, got {parent!r}")
    return parent


def extended(data: dict[str, Any], folder: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """A mapping merged with the recipe that its key ``extends`` names, and that one with its own parent.

    Args:
        folder: where file names of parents start.
        seen: the recipes on the way here.

    Raises:
        RecipeError: if recipes extend each other in a circle, or a change names an item that the parent does not have.
    """
    if EXTENDS not in data:
        return data
    rest = {key: value for key, value in data.items() if key != EXTENDS}
    parent = _parent(data, seen[-1])
    source = parent if parent in names() else folder / parent
    if str(source) in seen:
        raise RecipeError(f"recipes extend each other in a circle: {' -> '.join([*seen, str(source)])}")
    base = extended(_parsed(source), _folder(source), (*seen, str(source)))
    return merged(base, rest, seen[-1])


def merged(base: Any, change: Any, where: str) -> Any:
    """``base`` with ``change`` in it, key by key. A mapping over a list changes items by their number; other values replace.

    Raises:
        RecipeError: if a change names an item that is not in the list.
    """
    if isinstance(base, list) and isinstance(change, dict) and change:
        items = copy.deepcopy(base)
        for key, value in change.items():
            number = _index(items, str(key), f"{where}.{key}")
            items[number] = merged(items[number], value, f"{where}.{key}")
        return items
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return copy.deepcopy(change)
    union = {key: copy.deepcopy(value) for key, value in base.items()}
    return union | {key: merged(base[key], value, f"{where}.{key}") if key in base else value for key, value in change.items()}


def override(data: dict[str, Any], key: str, value: Any) -> None:
    """Set one value by its dotted key, ``rules.0.skip``, in place.

    Raises:
        RecipeError: if the key leads through a value that is not a mapping, or to an item that is not there.
    """
    node: Any = data
    *parents, last = key.split(".")
    for part in parents:
        node = node[_index(node, part, f"cannot set '{key}'")] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise RecipeError(f"cannot set '{key}': '{part}' is {node!r}, not a mapping")
    node[_index(node, last, f"cannot set '{key}'") if isinstance(node, list) else last] = value


def _index(node: list[Any], part: str, where: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        items = f"not one of the {len(node)} items (0 to {len(node) - 1})" if node else "not there: the list is empty"
        raise RecipeError(f"{where}: '{part}' is {items}")
    return int(part)


def _folder(source: str | Path) -> Path:
    return Path() if str(source) in names() else Path(source).parent


def _parsed(source: str | Path) -> dict[str, Any]:
    text = str(source)
    data = _load(_content(text), text)
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise RecipeError(f"{text} holds no recipe: expected a mapping with 'name' and 'defaults', got {kind}")
    return data


def _content(text: str) -> str:
    if text in names():
        return resources.files("reelquant.recipes").joinpath("library", f"{text}.yaml").read_text(encoding="utf-8")
    if Path(text).suffix not in (".yaml", ".yml", ".json"):
        raise RecipeError(f"no recipe is called '{text}'; {nearest(text, names())} (or give a .yaml file)")
    try:
        if not Path(text).is_file():
            raise RecipeError(f"recipe file '{text}' {'is not a plain file' if Path(text).exists() else 'does not exist'}")
        if (size := Path(text).stat().st_size) > BYTES:
            raise RecipeError(f"recipe file '{text}' has {size} bytes; a recipe has at most {BYTES}")
        return Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"cannot read the recipe file '{text:.200}': {error}") from None
