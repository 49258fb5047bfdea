"""The served folder: what lies in it, and the one place that decides whether a path may be opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from reelquant._errors import CheckpointError, RecipeError, nearest
from reelquant.recipes.text import names, parent_of
from reelquant.serve.files import read_object

BUNDLED = ("tiny-dit", "tiny-unet")  # as in models.pipelines, which imports torch
STATE = ".reelquant"  # of the page, inside of the folder: jobs, comparisons
DEPTH, ENTRIES = 4, 20_000  # folders below each other, and entries in all, that are looked through
INDEX, REPORT, PAGE, CONFIG, QUANTIZATION = "model_index.json", "report.json", "report.html", "config.json", "quantization_config"
YAML, RECIPE_FOLDERS = (".yaml", ".yml"), ("", "recipes")


@dataclass(frozen=True)
class Model:
    """A pipeline that can be chosen.

    Attributes:
        name: bundled name, or ``./`` and the path within the folder.
        quantized: whether a component is stored quantized.
        recipe: that made it, if its report says so.
        source: name of the float pipeline it was made from, if that can be chosen too.
    """

    name: str
    quantized: bool = False
    recipe: str = ""
    source: str = ""

    @property
    def label(self) -> str:
        """The name for a list."""
        if self.name in BUNDLED:
            return f"{self.name} (bundled)"
        return f"{self.name[2:]} ({self.recipe or 'quantized'})" if self.quantized else self.name[2:]


class Folder:
    """Files below one folder. Everything that the page reads or writes goes through :meth:`inside` or :meth:`new`.

    Args:
        root: the folder.

    Raises:
        CheckpointError: if there is no folder.
    """

    def __init__(self, root: str | Path) -> None:
        path = Path(root).expanduser()
        if not path.is_dir():
            raise CheckpointError(f"no folder at '{root}'; name one that holds pipelines, or make it first")
        self.root = path.resolve()

    def own(self, name: str) -> Path:
        """The place of one of the page's own folders, which may not exist yet.

        Raises:
            CheckpointError: if a link stands in its place: the page does not write through links.
        """
        path = self.root / STATE / name
        if path.resolve() != path:
            raise CheckpointError(f"'{path}' is, or lies behind, a link, and the page does not write through links; remove it")
        return path

    def inside(self, name: str) -> Path:
        """The path of something in the folder, all links followed.

        Args:
            name: relative to the folder.

        Raises:
            CheckpointError: if it is absolute, leads out of the folder, or is not there.
        """
        words = PurePosixPath(name)
        if not name or "\0" in name or words.is_absolute() or ".." in words.parts:
            raise CheckpointError(f"'{name:.200}' is not a path within the served folder; give one relative to it, without '..'")
        try:
            path = (self.root / name).resolve()
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"'{name:.200}' cannot be followed ({error}); remove the link") from None
        if not path.is_relative_to(self.root):
            raise CheckpointError(
                f"'{name:.200}' is a link that leads out of the served folder; copy the files into it, or serve a folder above"
            )
        if not os.path.lexists(path):
            raise CheckpointError(f"nothing at '{name:.200}' in the served folder; refresh the page")
        return path

    def tree(self, name: str) -> Path:
        """:meth:`inside`, for a folder that a job will read: no link anywhere below may lead out either.

        Python files in the folders of components are refused, too: they are classes that some versions of diffusers load.
        """
        path = self.inside(name)
        for parent, folders, files in os.walk(path):
            for one in (*folders, *files):
                if one.endswith(".py") and Path(parent) != path:
                    place = (Path(parent) / one).relative_to(self.root)
                    raise CheckpointError(f"'{place}' is Python code, and the page runs none; use the command line if you trust it")
                if (link := Path(parent) / one).is_symlink() and not link.resolve().is_relative_to(self.root):
                    raise CheckpointError(
                        f"'{link.relative_to(self.root)}' is a link that leads out of the served folder; replace it by what it names"
                    )
        return path

    def new(self, name: str, *, again: bool = False) -> str:
        """The name of a folder that may be made, relative to this one.

        Args:
            name: for it.
            again: it may be there already, left by a job that did not end.

        Raises:
            CheckpointError: if it leads elsewhere, is hidden, or exists.
        """
        words = PurePosixPath(name.strip())
        if not words.parts or words.is_absolute() or not name.isprintable() or any(one.startswith(".") for one in words.parts):
            raise CheckpointError(
                f"'{name:.200}' does not name a new folder within the served one; give a name like 'tiny-dit-w8a16', without '..'"
            )
        path = self.root / words
        if not path.parent.resolve().is_relative_to(self.root):
            raise CheckpointError(f"'{words.parent}' is a link that leads out of the served folder; choose another place")
        if path.is_symlink() or (os.path.lexists(path) and not again):
            raise CheckpointError(f"'{words}' already exists in the served folder; choose another name")
        return str(words)

    def free(self, name: str) -> str:
        """The name, or the next one with a number that is not taken."""
        for number in range(1, 1000):
            one = name if number == 1 else f"{name}-{number}"
            if not any(os.path.lexists(self.root / end) for end in (one, f"{one}.partial")):
                return one
        raise CheckpointError(f"'{name}' and 999 more names are taken; choose another name")

    # -------------------------------------------------------------------------------------------------------- what is here

    def models(self) -> list[Model]:
        """The bundled pipelines, and every pipeline in the folder."""
        folders = [path for path in self._folders() if (path / INDEX).is_file()]
        places = {str(path): f"./{path.relative_to(self.root)}" for path in folders}
        return [*(Model(name) for name in BUNDLED), *(self._model(path, places) for path in folders)]

    def model(self, name: str, *, quantized: bool | None = None) -> Model:
        """One of :meth:`models` by its name, with its files checked.

        Args:
            name: of the model.
            quantized: whether it must be, or must not be.

        Raises:
            CheckpointError: if it is not among them, or links in it lead out of the folder.
        """
        if name not in BUNDLED:
            self.tree(name)
        found = {one.name: one for one in self.models() if quantized in (None, one.quantized)}
        if name not in found:
            kind = {None: "", True: "quantized ", False: "float "}[quantized]
            raise CheckpointError(f"no {kind}pipeline '{name:.200}' in the served folder; {nearest(name, found)}")
        return found[name]

    def evaluations(self) -> list[str]:
        """The folders that hold a report of an evaluation, newest first."""
        found = [path for path in self._folders() if (path / PAGE).is_file() and (path / REPORT).is_file()]
        return [str(path.relative_to(self.root)) for path in sorted(found, key=lambda path: -(path / REPORT).stat().st_mtime)]

    def recipes(self) -> list[str]:
        """Names of the library's recipes, and recipe files at the top of the folder or in its folder ``recipes``."""
        places = [place for one in RECIPE_FOLDERS if (place := self.root / one).is_dir() and not place.is_symlink()]
        files = sorted(file for place in places for file in place.iterdir() if file.suffix in YAML and file.is_file())
        return [*names(), *(f"./{file.relative_to(self.root)}" for file in files if not file.is_symlink())]

    def recipe(self, name: str) -> str:
        """The name of a recipe, if neither it nor a recipe that it extends is a file outside of the folder.

        Raises:
            RecipeError: if it is unknown.
            CheckpointError: if a file lies elsewhere.
        """
        chosen, known = name, self.recipes()
        if name not in known:
            raise RecipeError(f"no recipe '{name:.200}' in the library or the served folder; {nearest(name, known)}")
        seen, place = list[Path](), self.root / name
        while str(name) not in names():
            if not place.resolve().is_relative_to(self.root):
                raise CheckpointError(f"'{seen[-1].name if seen else name}' extends '{name:.200}', which is outside of the served folder")
            if place in seen:
                raise RecipeError(f"recipes extend each other in a circle, by way of '{place.name}'")
            seen.append(place)
            extends = parent_of(place)
            if extends is None:
                break
            name, place = extends, place.parent / extends
        return chosen

    def _folders(self) -> Iterator[Path]:
        """Folders to look into, links not followed. What lies inside of a pipeline or an evaluation is not looked at."""
        level, seen = [self.root], 0
        for _ in range(DEPTH + 1):
            below: list[Path] = []
            for folder in level:
                yield folder
                if folder != self.root and ((folder / INDEX).is_file() or (folder / PAGE).is_file()):
                    continue
                inner = [one for one in _entries(folder) if one.is_dir(follow_symlinks=False) and not one.name.startswith(".")]
                below += sorted(folder / one.name for one in inner if not one.name.endswith(".partial"))
                seen += len(inner)
                if seen > ENTRIES:
                    return
            level = below

    def _model(self, path: Path, places: dict[str, str]) -> Model:
        parts = [path / one.name / CONFIG for one in _entries(path) if one.is_dir()]
        quantized = any(QUANTIZATION in self._object(file) for file in parts)
        report = self._object(path / REPORT) if quantized else {}
        source = str(report.get("source") or "")
        found = source if source in BUNDLED else places.get(source, "")
        return Model(places[str(path)], quantized, _text(report.get("recipe")), found)

    def _object(self, file: Path) -> dict[str, Any]:
        """The object in a JSON file; empty also if a link leads out of the folder. Caches of hubs have links within it."""
        real = file.resolve()
        return read_object(real) if real.is_relative_to(self.root) else {}


def _entries(folder: Path) -> list[Any]:
    """What lies in a folder; nothing, if it may not be read."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []


def _text(value: Any) -> str:
    return value[:80] if isinstance(value, str) else ""
