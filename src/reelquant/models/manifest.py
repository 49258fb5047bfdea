"""``reelquant-checksums.json`` beside ``model_index.json``: sums of every byte that reelquant wrote, checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from reelquant._errors import CheckpointError
from reelquant._sums import OWN, PIECE, Stamp, json_sum, stamp_of, sums_of
from reelquant.models.blank import read_json

MANIFEST = "reelquant-checksums.json"
REPORT = "report.json"  # has a sum of its own content: it holds timings, and all other bytes are the same for the same model
CARD = "README.md"  # is there to be edited
FORMAT = 1
LOADED = (".safetensors", ".json", ".bin", ".txt", ".model")  # what libraries look for in the folder of a component
RENEW = "if you changed it on purpose, `reelquant verify FOLDER --renew` takes the files as they are"

_checked: dict[tuple[Path, tuple[str, ...]], Stamp] = {}  # files that this process has read and found good, as they were then


def write_manifest(folder: Path) -> None:
    """Write the sums of all files of a folder, but of its report and its model card. Nothing else may be written to it afterwards.

    Raises:
        OSError: if a file cannot be read, or the disk is full.
    """
    files = {name: {"bytes": file.stat().st_size, "sha256": sums_of(file)} for name, file in _files(folder).items()}
    content = {"format": FORMAT, "piece": PIECE, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content | {OWN: json_sum(content)}, indent=1) + "\n", encoding="utf-8")


def _files(folder: Path) -> dict[str, Path]:
    """What a manifest is about, by the path in the folder."""
    found = (file for file in sorted(folder.rglob("*")) if file.is_file())
    names = {file.relative_to(folder).as_posix(): file for file in found}
    hidden = (name for name in names if any(part.startswith(".") for part in PurePosixPath(name).parts))
    return {name: names[name] for name in sorted(names.keys() - {MANIFEST, REPORT, CARD, *hidden})}


def check_manifest(folder: Path, component: str | None = None) -> bool:
    """Read every file that the manifest of a folder lists, and compare it with its sum.

    Args:
        folder: of a pipeline.
        component: check the files of this component only.

    Returns:
        Whether there is a manifest; folders of other programs and of older versions have none.

    Raises:
        CheckpointError: naming the first file that is missing, added, or has other bytes than were written.
    """
    if not (folder / MANIFEST).is_file():
        return False
    piece, files = _read(folder / MANIFEST)
    chosen = {name: one for name, one in files.items() if component is None or name.startswith(f"{component}/")}
    for name, (size, sums) in chosen.items():
        _check(folder / name, size, sums, piece)
    _refuse_added(folder, files, {name.partition("/")[0] for name in chosen if "/" in name})
    return True


def check_files(files: Iterable[str | Path]) -> bool:
    """Check the component that these weight files are of, if the folder of its pipeline has a manifest.

    Returns:
        Whether the manifest lists all of them.

    Raises:
        CheckpointError: as :func:`check_manifest`.
    """
    paths = [Path(file) for file in files]
    if not paths or len({path.parent for path in paths}) > 1:
        return False
    component = paths[0].parent
    if not check_manifest(component.parent, component.name):
        return False
    listed = _read(component.parent / MANIFEST)[1]
    return all(f"{component.name}/{path.name}" in listed for path in paths)


def summed(folder: Path) -> tuple[int, int]:
    """How many files a manifest lists, and their bytes; zeros without one."""
    files = _read(folder / MANIFEST)[1] if (folder / MANIFEST).is_file() else {}
    return len(files), sum(size for size, _ in files.values())


def _read(file: Path) -> tuple[int, dict[str, tuple[int, tuple[str, ...]]]]:
    content = read_json(file)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"'{file}' has format {content.get('format')!r:.40}, this reelquant reads {FORMAT}: upgrade reelquant")
    piece, files = content.get("piece"), content.get("files")
    if content.get(OWN) != json_sum(content) or not isinstance(piece, int) or piece < 2**16 or not isinstance(files, dict):
        raise CheckpointError(f"'{file}' is damaged: its own sum differs; download or save the folder again")
    return piece, {name: _entry(file, name, one) for name, one in files.items()}


def _entry(file: Path, name: str, one: Any) -> tuple[int, tuple[str, ...]]:
    path, given = PurePosixPath(name), one if isinstance(one, Mapping) else {}
    size, sums = given.get("bytes"), given.get("sha256")
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name
    if not (inside and isinstance(size, int) and isinstance(sums, list) and all(isinstance(word, str) for word in sums)):
        raise CheckpointError(
            f"'{file}' is damaged: what it says of {name!r:.80} is not a size and sums; download or save the folder again"
        )
    return size, tuple(sums)


def _check(file: Path, size: int, sums: tuple[str, ...], piece: int) -> None:
    try:
        stamp = stamp_of(file)
        if _checked.get((file, sums)) == stamp:
            return
        if stamp[0] != size:
            raise CheckpointError(f"'{file}' has {stamp[0]} bytes, {size} were written; download or save it again; {RENEW}")
        found = sums_of(file, piece)
    except CheckpointError:
        raise
    except OSError as error:
        words = f"'{file}' cannot be read ({error.strerror}), and {MANIFEST} lists it; download or save it again; {RENEW}"
        raise CheckpointError(words) from None
    wrong = [number for number, pair in enumerate(zip(found, sums, strict=False)) if pair[0] != pair[1]]
    if wrong or len(found) != len(sums):
        where = f", in its bytes from {wrong[0] * piece}" if wrong and len(found) > 1 else ""
        raise CheckpointError(f"'{file}' is not what was written: its SHA-256 sum differs{where}; download or save it again; {RENEW}")
    _checked[file, sums] = stamp


def _refuse_added(folder: Path, files: Iterable[str], components: Iterable[str]) -> None:
    """A file more in the folder of a component may be loaded instead of the right one."""
    known = set(files)
    for component in components:
        for file in sorted((folder / component).rglob("*")):
            name = file.relative_to(folder).as_posix()
            if file.suffix in LOADED and name not in known and not file.name.startswith("."):
                raise CheckpointError(f"'{file}' was added after the folder was written; move it elsewhere; {RENEW}")
