"""The folder of shared work: held by one run at a time, and what an earlier run left in it."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from reelquant._errors import RanksError
from reelquant._sums import Sealed
from reelquant.ranks.units import UNFINISHED

IDENTITY, LOCK = "work.json", "lock"


@contextmanager
def claimed(folder: Path, facts: Mapping[str, Any], *, force: bool = False) -> Iterator[None]:
    """Hold a folder for one piece of work, as long as the context lasts. Units that an earlier run of the same work finished stay.

    Args:
        folder: where the work lies; made if it is not there.
        facts: what the work is, as plain data.
        force: give up what is there of other work.

    Raises:
        RanksError: if another process works there, or the folder holds something else.
    """
    own = json.loads(json.dumps(facts, default=str))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RanksError(f"another process works in '{folder}'; wait for it, or choose another folder") from None
        _begin(folder, own, force=force)
        _look(folder)
        yield


def _begin(folder: Path, facts: dict[str, Any], *, force: bool) -> None:
    """Take up the work that is there, or leave nothing of it.

    Raises:
        RanksError: if the folder holds something else.
    """
    known = folder / IDENTITY
    others = [one for one in folder.iterdir() if one.name not in (LOCK, IDENTITY)]
    before: Any = None
    with suppress(OSError, ValueError):
        before = json.loads(known.read_text(encoding="utf-8"))
    if others and not isinstance(before, dict):
        raise RanksError(f"'{folder}' is in the way: it is not a folder of shared work (no readable {IDENTITY}); move it")
    if others and before != facts:
        changed = next(key for key in {**before, **facts} if before.get(key) != facts.get(key))
        if not force:
            raise RanksError(
                f"'{folder}' holds an interrupted run with another {changed}; start that command again, or give it up with "
                "force=True (--force)"
            )
        for one in others:
            shutil.rmtree(one) if one.is_dir() else one.unlink()
    temporary = folder / f".{IDENTITY}"
    temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    temporary.replace(known)


def _look(folder: Path) -> None:
    """Look at what an earlier run left: units that are not what was written go, and so do unfinished ones."""
    for unfinished in list(folder.rglob(f"{UNFINISHED}*")):
        shutil.rmtree(unfinished, ignore_errors=True)
    for unit in [one for one in folder.rglob("[0-9]" * 6) if one.is_dir()]:
        if not _whole(unit):
            shutil.rmtree(unit)


def _whole(unit: Path) -> bool:
    """Whether every file that a unit was written with is there as it was written."""
    listed = unit / Sealed.LIST
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines() if listed.is_file() else []
    return bool(lines) and all(Sealed(unit).good(line[66:]) for line in lines)
