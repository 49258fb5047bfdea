"""Temporary names beside a target: held while they are written, tidied up after a run that was killed, exchanged in one step."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NEW, ASIDE = "partial", "aside"  # being written; an old folder that steps aside for a new one
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def beside(path: Path, kind: str = NEW) -> Path:
    """A hidden name in the folder of ``path`` that nothing has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}")


@contextmanager
def held(temporary: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends, and by which :func:`tidy` knows that a process is at work."""
    handle = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        with suppress(OSError):  # some network disks have no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def tidy(path: Path) -> None:
    """Remove what killed runs left beside ``path``; an old folder that had stepped aside comes back if nothing took its place."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.({NEW}|{ASIDE})")
    try:
        found = [path.parent / name for name in os.listdir(path.parent) if pattern.fullmatch(name)]
    except OSError:
        return
    for left in sorted(found):
        with suppress(OSError):
            if left.suffix == f".{ASIDE}" and not os.path.lexists(path):
                left.rename(path)
            elif not left.is_symlink() and left.stat().st_uid == os.getuid() and _free(left):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _free(left: Path) -> bool:
    handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or the disk cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0
