"""A folder that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from reelquant._errors import CheckpointError
from reelquant.checkpoint.beside import ASIDE, beside, exchange, held, tidy

INDEX, OWN_INDEX = "model_index.json", "denoiser.json"
_KINDS = {INDEX: "a pipeline folder", OWN_INDEX: "the folder of a module"}


def absolute(path: str | Path) -> Path:
    """The absolute path of something, links on the way followed.

    Raises:
        CheckpointError: for links that lead in a circle, and for names that no disk takes.
    """
    try:
        return Path(path).expanduser().resolve()
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be followed ({error}); remove the link, or choose another place") from None


def check_target(target: str | Path, *, force: bool, index: str = INDEX) -> Path:
    """The absolute path of a folder that may be written.

    Args:
        target: the folder.
        force: whether an existing one may be replaced.
        index: the file by which a folder is known that we may have written.

    Raises:
        CheckpointError: if it exists and ``force`` is not given, or if it is not a pipeline folder: other folders are never deleted.
    """
    path = absolute(target)
    if not os.path.lexists(path):  # false also for names that a disk refuses
        return path
    if not force:
        raise CheckpointError(f"'{path}' already exists; choose another folder or pass force=True (--force) to replace it")
    if not path.is_dir() or (any(path.iterdir()) and not (path / index).is_file()):
        raise CheckpointError(f"'{path}' is not {_KINDS[index]} (no {index}) and is not replaced even with force; delete it yourself")
    return path


def check_writable(target: str | Path) -> None:
    """Refuse a place that takes no files before anything slow begins: a folder is made where the target will be, and removed.

    Raises:
        CheckpointError: with the reason, and the nearest folder that exists.
    """
    path = absolute(target)
    place = next((parent for parent in path.parents if os.path.lexists(parent)), path)
    probe = beside(place / path.name)
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise CheckpointError(f"cannot write '{path}': '{place}' takes no files ({error.strerror}); choose another place") from None


def check_folder(target: str | Path) -> None:
    """Refuse a place where files are added to what is there, if it is not a folder or takes no files.

    Raises:
        CheckpointError: with the reason.
    """
    path = absolute(target)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"'{path}' is a file; give a folder, or the name of a new one")
    check_writable(path)


def refuse_source(target: str | Path, source: str | Path) -> None:
    """Refuse to replace the folder that is read: with ``force`` the original would be gone.

    Raises:
        CheckpointError: if the target is the source, or holds it.
    """
    path, read = absolute(target), absolute(source)
    if read.is_relative_to(path) and read.is_dir():
        raise CheckpointError(f"'{path}' is, or holds, the pipeline that is read ('{read}') and is not replaced; choose another folder")


@contextmanager
def keeping_work(folder: Path) -> Iterator[None]:
    """One kind of error for a disk that does not take the files of work with which a later run goes on.

    Args:
        folder: of the work.

    Raises:
        CheckpointError: instead of the errors of files and of safetensors.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"cannot write '{folder}': {error}; what is done is kept there: free space and run again, it goes on"
        ) from error


@contextmanager
def new_folder(target: str | Path, *, force: bool = False, index: str = INDEX) -> Iterator[Path]:
    """Write into a temporary folder beside ``target`` that takes its name when the block ends.

    Whatever stops the block, nothing of it is left and an existing folder is as it was; with ``force`` it goes only after the new one
    is complete. What a run left that was killed goes now.

    Raises:
        CheckpointError: if the target is refused by :func:`check_target`, or if the disk does not take the files.
    """
    from safetensors import SafetensorError

    tidy(absolute(target))
    path = check_target(target, force=force, index=index)
    temporary, created = beside(path), [parent for parent in path.parents if not parent.exists()]
    try:
        temporary.mkdir(parents=True)
        with held(temporary):
            yield temporary
            take_place(temporary, path, force=force, index=index)
    except BaseException as error:
        remove(temporary)
        for parent in created:  # innermost first
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError | SafetensorError) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"cannot write '{path}': {error}; nothing is left behind, free space or choose another folder") from error
        raise


def remove(folder: Path) -> None:
    """Remove a folder of ours, as far as the system lets it go; also where a process may open hardly any more files."""
    shutil.rmtree(folder, ignore_errors=True)  # holds a handle for each level of folders
    for place, folders, files in os.walk(folder, topdown=False):  # one handle at a time
        for one in (os.path.join(place, name) for name in (*files, *folders)):
            with suppress(OSError):
                (os.rmdir if os.path.isdir(one) and not os.path.islink(one) else os.unlink)(one)
    with suppress(OSError):
        folder.rmdir()


def take_place(temporary: Path, path: Path, *, force: bool, index: str = INDEX) -> None:
    """Rename into place. An existing folder changes places with the new one in one step where the system can, and goes then; elsewhere it
    steps aside first, and :func:`tidy` brings it back if the process is killed in between.

    Raises:
        CheckpointError: if :func:`check_target` refuses what has appeared there in the meantime.
    """
    check_target(path, force=force, index=index)
    if not path.exists():
        temporary.rename(path)
        return
    if exchange(temporary, path):
        shutil.rmtree(temporary, ignore_errors=True)
        return
    old = beside(path, ASIDE)
    try:
        path.rename(old)
        temporary.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
