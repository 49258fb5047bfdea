"""Which float pipeline a quantized one was made from: its report says so, and evaluation falls back on that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reelquant._errors import CheckpointError
from reelquant.models.blank import QUANTIZATION, read_config, read_json
from reelquant.models.manifest import REPORT
from reelquant.models.pipelines import BUNDLED, bundled_path, locate, stored_file
from reelquant.models.single_file import SingleFile, file_of, single_file

SOURCE = "source"  # the key of report.json
HELP = "name the float pipeline: reference='...' (--reference ...)"


def written_down(model: str | Path) -> str:
    """The place of a pipeline as reports have it: a bundled name, the absolute path of a folder, a hub id, ``FILE@PIPELINE``."""
    if (single := single_file(model)) is not None:
        return str(SingleFile(single.file.resolve(), written_down(single.rest), single.component))
    path = Path(model)
    if str(model) in BUNDLED or not path.is_dir():
        return str(model)
    return next((name for name in BUNDLED if path.samefile(bundled_path(name))), str(path.resolve()))


def origin_of(pipe: Any) -> str:
    """The float pipeline that a pipeline in memory is, or was quantized from; empty if that is not known."""
    place = str(getattr(pipe, "config", {}).get("_name_or_path") or "")
    whole = _of_place(place)
    for name, part in getattr(pipe, "components", {}).items() if whole else ():
        if file := file_of(part):
            whole = str(SingleFile(file, whole, name))
    return whole


def _of_place(place: str) -> str:
    if not place or not Path(place).is_dir():
        return place if place.count("/") == 1 and not place.startswith(("/", ".")) else ""  # a hub id, or a folder that is gone
    return recorded(place) or ("" if holds_quantized(Path(place)) else written_down(place))


def float_original(model: Any) -> str:
    """The float pipeline that a quantized one was made from.

    Args:
        model: bundled name, folder, hub id, or a pipeline in memory.

    Raises:
        CheckpointError: if nothing says so, or if it is not there any more.
    """
    name = str(model) if isinstance(model, str | Path) else type(model).__name__
    found = recorded(model) if isinstance(model, str | Path) else origin_of(model)
    if not found:
        raise CheckpointError(f"nothing says what '{name}' was quantized from (no '{SOURCE}' in a {REPORT}); {HELP}")
    if not _still_there(found):
        raise CheckpointError(f"the float pipeline that '{name}' was quantized from is not at '{found}' any more; {HELP}")
    return found


def _still_there(place: str) -> bool:
    if (single := single_file(place)) is not None:
        return single.file.is_file() and _still_there(single.rest)
    return not Path(place).is_absolute() or Path(place).is_dir()


def means_something_elsewhere(place: str) -> bool:
    """Whether a place holds no path of this machine: it is a hub id or a bundled name."""
    return bool(place) and single_file(place) is None and not Path(place).is_absolute()


def recorded(model: str | Path) -> str:
    """What the report beside a pipeline says; empty if there is none, or if it says nothing."""
    file = stored_file(locate(model), REPORT)
    source = None if file is None else read_json(file).get(SOURCE)
    return source if isinstance(source, str) else ""


def holds_quantized(folder: Path) -> bool:
    """Whether a component of the pipeline in a folder is stored quantized."""
    return folder.is_dir() and any(QUANTIZATION in read_config(part) for part in folder.iterdir() if part.is_dir())
