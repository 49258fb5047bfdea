"""Methods of others: modules that add members to the tables of this library when they are imported.

A package names its module as an entry point, and it is imported before the first recipe or stored pipeline is read::

    [project.entry-points."reelquant.plugins"]
    mine = "my_package.methods"

The command line takes modules and files by name: ``reelquant --plugin my_methods.py quantize ...``. A stored pipeline never makes anything
be imported: it names the module that it needs, and its reader decides.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

from reelquant._errors import UnsupportedError
from reelquant._remarks import remark

GROUP = "reelquant.plugins"
_OWN = __name__.partition(".")[0]
_named: list[str] = []  # what was asked for by name, for processes that this one starts
_state = {"installed": False}


def load_plugin(name: str) -> None:
    """Import a module by its name, or a file that ends in ``.py`` by its path; once.

    Raises:
        UnsupportedError: if there is no such module or file, or if it fails.
    """
    place = str(Path(name).resolve()) if name.endswith(".py") else name
    if place in _named:
        return
    try:
        _run_file(Path(place)) if name.endswith(".py") else importlib.import_module(name)
    except Exception as error:  # code of others fails in any way
        reason = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no reason given'}"
        raise UnsupportedError(
            f"plug-in '{name}' cannot be loaded ({reason:.300}); give the name of an installed module, or the path of a .py file"
        ) from error
    _named.append(place)


def _run_file(path: Path) -> None:
    """Run a file as a module that is called like it. Its classes then say where they come from."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if path.stem in sys.modules or spec is None or spec.loader is None:
        raise ImportError(f"a module called '{path.stem}' is imported already; rename the file")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise


def load_installed() -> None:
    """Import what installed packages name as entry points; once. One that fails is remarked and left out: it may be of no use here."""
    if _state["installed"]:
        return
    _state["installed"] = True  # before: a plug-in may read a recipe while it is imported
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            remark(f"plug-in '{point.name}' ({point.value}) cannot be loaded and is left out: {type(error).__name__}: {error!s:.200}")


def named() -> list[str]:
    """What :func:`load_plugin` has loaded, for processes that this one starts."""
    return list(_named)


def provider(member: Any) -> str:
    """The module that a member of a table comes from; empty for those of this library."""
    while isinstance(member, functools.partial):
        member = member.func
    module = str(getattr(member, "__module__", None) or "")
    return "" if module.partition(".")[0] == _OWN else module
