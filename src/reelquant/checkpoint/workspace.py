"""A long piece of work beside the folder it makes: one process at a time, kept when it is stopped, gone when it is done."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelquant._errors import CheckpointError, printable
from reelquant.checkpoint.beside import tidy
from reelquant.checkpoint.folder import absolute, check_target, take_place
from reelquant.models.blank import read_json

LOCK, IDENTITY, RESULT, WRITING = "lock", "work.json", "result", ".writing"
GIVEN_UP: Mapping[str, Any] = {}  # the identity of work that is being deleted


@dataclass(frozen=True)
class Workspace:
    """Where the work lies.

    Attributes:
        target: the folder that will appear.
        folder: ``<target>.partial``, which is kept until then.
    """

    target: Path
    folder: Path

    @property
    def result(self) -> Path:
        """The folder that takes the target's place in the end."""
        return self.folder / RESULT


def work_folder(target: Path) -> Path:
    """Where the work on a target is kept."""
    return target.with_name(f"{target.name}.partial")


@contextmanager
def workspace(target: str | Path, identity: Mapping[str, Any], *, resume: bool = False, force: bool = False) -> Iterator[Workspace]:
    """Work on a folder until it is complete; after an error, finished files stay for ``resume``.

    Args:
        target: the folder to make.
        identity: what the work is: plain data. Work is only resumed if all of it is as it was.
        resume: go on where an earlier run stopped; without one, begin.
        force: replace an existing target in the end, and give up what an earlier run left (with ``resume``, if it was about something
            else).

    Raises:
        CheckpointError: if the target is refused, another process works on it, an earlier run is not asked to go on or was about something
            else, or the disk does not take the files.
    """
    from safetensors import SafetensorError

    tidy(absolute(target))
    path = check_target(target, force=force)
    work = Workspace(path, work_folder(path))
    with _locked(work):
        try:
            _begin(work, json.loads(json.dumps(identity)), resume=resume, force=force)
            yield work
            take_place(work.result, path, force=force)
        except (OSError, SafetensorError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"cannot write '{path}': {error}; what is done is kept in '{work.folder}': free space and go on with resume=True (--resume)"
            ) from error
        with suppress(OSError):  # the new folder is complete; files that cannot be removed do no harm
            _clear(work)


@contextmanager
def _locked(work: Workspace) -> Iterator[None]:
    """Hold the lock that ends with the process, however it ends."""
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
        _check_own(work.folder)
        handle = os.open(work.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot work in '{work.folder}': {error}; choose another folder") from error
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
            raise CheckpointError(f"'{work.folder / LOCK}' is a link or a pipe; remove it, or choose another folder")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            other = printable(os.read(handle, 20).decode("ascii", "replace")) or "unknown"
            raise CheckpointError(f"process {other} is writing '{work.target}'; wait for it, or choose another folder") from None
        try:
            os.ftruncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
        except OSError as error:
            raise CheckpointError(f"cannot write '{work.folder / LOCK}': {error.strerror}; free space or choose another folder") from error
        yield
    finally:
        os.close(handle)
        _remove_if_empty(work.folder)


def _check_own(folder: Path) -> None:
    """In a folder that many may write to, another user may have put links in the place of ours."""
    if folder.is_symlink():
        raise CheckpointError(f"'{folder}' is a link, and work is not written through links; remove it, or choose another folder")
    if (owner := folder.stat().st_uid) != os.getuid():
        raise CheckpointError(f"'{folder}' belongs to another user (id {owner}); choose another folder")


def _remove_if_empty(folder: Path) -> None:
    """Nothing was begun: leave no trace."""
    if folder.is_dir() and [file.name for file in folder.iterdir()] == [LOCK]:
        shutil.rmtree(folder)


def _begin(work: Workspace, identity: dict[str, Any], *, resume: bool, force: bool) -> None:
    """Take up the work that is there, or leave nothing of it."""
    known = work.folder / IDENTITY
    before = _identity(known, force=force) if known.is_file() else GIVEN_UP
    if before != GIVEN_UP and not resume and not force:
        raise CheckpointError(
            f"'{work.folder}' holds an interrupted run; go on with resume=True (--resume), or give it up with force=True (--force)"
        )
    if before != GIVEN_UP and resume and not force:
        _compare(before, identity, work)
    if before == GIVEN_UP or before != identity or not resume:
        _clear(work)
        _note(work, identity)
    work.result.mkdir(exist_ok=True)


def _identity(known: Path, *, force: bool) -> Mapping[str, Any]:
    """What earlier work was about. Nothing can be resumed that does not say it."""
    try:
        return read_json(known)
    except CheckpointError as error:
        if force:
            return GIVEN_UP
        raise CheckpointError(f"{error}; or give the interrupted run up with force=True (--force)") from None


def _note(work: Workspace, identity: Mapping[str, Any]) -> None:
    whole_file(work.folder / IDENTITY, lambda path: path.write_text(json.dumps(identity, indent=2) + "\n"))


def _clear(work: Workspace) -> None:
    """Delete the work. Killed in between, the folder is still known as ours, and as one in which nothing can be resumed."""
    known = work.folder / IDENTITY
    own = (LOCK, IDENTITY, IDENTITY + WRITING)
    others = [file for file in work.folder.iterdir() if file.name not in own]
    if others and not known.is_file():
        raise CheckpointError(f"'{work.folder}' is not a working folder of reelquant (no {IDENTITY}) and is in the way; move it")
    _note(work, GIVEN_UP)
    for file in others:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    known.unlink()


def _compare(before: Mapping[str, Any], now: dict[str, Any], work: Workspace) -> None:
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        was, is_ = (f"{side.get(changed[0])!r:.120}" for side in (before, now))
        raise CheckpointError(
            f"'{work.folder}' was begun with another {changed[0]}: {was}, now {is_}; resume with the same one, "
            "or give the old run up with force=True (--force)"
        )


def whole_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is complete whenever it is there, also if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + WRITING)
    write(temporary)
    temporary.replace(path)
