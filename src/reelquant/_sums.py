"""SHA-256 sums of files: of pieces that several threads hash at once, and lists of sums that grow beside the files they are of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

PIECE = 64 * 2**20  # bytes of a file that one sum is of; pieces of a file are hashed in parallel
_READ = 2**20  # bytes in memory per thread
THREADS = 8  # more do not help: a disk delivers less than as many processors hash

Stamp = tuple[int, int]  # size and time of change in ns


def sums_of(file: Path, piece: int = PIECE) -> list[str]:
    """The SHA-256 sum of every piece of a file, in order; one sum for an empty file.

    Raises:
        OSError: if it cannot be read.
    """
    count = max(-(-file.stat().st_size // piece), 1)
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        one = partial(_sum, handle, piece)
        if count == 1:
            return [one(0)]
        with ThreadPoolExecutor(min(count, os.cpu_count() or 1, THREADS)) as pool:
            return list(pool.map(one, range(count)))
    finally:
        os.close(handle)


def _sum(handle: int, piece: int, number: int) -> str:
    found, place, end = hashlib.sha256(), number * piece, (number + 1) * piece
    while content := os.pread(handle, min(_READ, end - place), place):
        found.update(content)
        place += len(content)
    return found.hexdigest()


def whole_sum(file: Path) -> str:
    """The SHA-256 sum of a file, as ``sha256sum`` prints it."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def stamp_of(file: Path) -> Stamp:
    """What changes when a file is written."""
    state = file.stat()
    return state.st_size, state.st_mtime_ns


class Sealed:
    """Files of one folder that are written with their sums, so that a later run knows a damaged one from a good one.

    ``SHA256SUMS`` in the folder has a line per file that was written, in the form of ``sha256sum``. A line is appended before the file gets
    its name: a run that is killed leaves a line too much at most, and a file is good if any of its lines fits.
    """

    LIST = "SHA256SUMS"
    _known: ClassVar[dict[Path, Stamp]] = {}  # files that this process has found good, as they were then

    def __init__(self, folder: Path, list_at: Path | None = None) -> None:
        self.folder, self.list = folder, list_at or folder / self.LIST

    def write(self, name: str, write: Callable[[Path], object]) -> Path:
        """Write a file that is complete, and in the list, whenever it is there, also if the process is killed.

        Args:
            name: of the file in the folder.
            write: writes it to the path that it is given: a hidden file that ends as ``name`` does.
        """
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{UNFINISHED}{file.name}")
        write(temporary)
        self.seal(name, whole_sum(temporary))
        temporary.replace(file)
        self._known[file] = stamp_of(file)
        return file

    def seal(self, name: str, found: str) -> None:
        """Append a line to the list."""
        self.list.parent.mkdir(parents=True, exist_ok=True)
        with self.list.open("a", encoding="utf-8") as opened:
            opened.write(f"{found}  {name}\n")

    def good(self, name: str) -> bool:
        """Whether a file is there and is what was written."""
        file = self.folder / name
        if not file.is_file():
            return False
        if self._known.get(file) == stamp_of(file):
            return True
        if whole_sum(file) not in self._sums(name):
            return False
        self._known[file] = stamp_of(file)
        return True

    def lost(self, name: str) -> bool:
        """Whether a file was written, or is there, and is not what was written. In folders without a list every file is taken as it is."""
        return self.list.is_file() and not self.good(name) and ((self.folder / name).exists() or bool(self._sums(name)))

    def _sums(self, name: str) -> set[str]:
        lines = self.list.read_text(encoding="utf-8", errors="replace").splitlines() if self.list.is_file() else []
        return {line[:64] for line in lines if line[66:] == name}


UNFINISHED = "writing-"
"""In the hidden name of a file that is being written: what a killed run leaves."""
OWN = "sha256"  # key of a JSON document that holds the sum of all the others


def json_sum(content: Mapping[str, Any]) -> str:
    """The SHA-256 sum of a JSON document without its own key :data:`OWN`, whatever its layout and order."""
    rest = {key: value for key, value in content.items() if key != OWN}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_summed(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON document with the sum of its content."""
    Path(path).write_text(summed_text(content), encoding="utf-8")


def summed_text(content: Mapping[str, Any]) -> str:
    """A JSON document with the sum of its content."""
    data = json.loads(json.dumps(content))  # keys are strings from now on
    return json.dumps(data | {OWN: json_sum(data)}, indent=2, sort_keys=True) + "\n"
