"""A saved folder on the hub, through huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from reelquant._errors import CheckpointError
from reelquant._sums import OWN, summed_text
from reelquant.checkpoint.folder import INDEX, absolute
from reelquant.models.blank import read_json
from reelquant.models.manifest import REPORT, check_manifest
from reelquant.models.origin import SOURCE, means_something_elsewhere

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def push_to_hub(folder: str | Path, repository: str, *, private: bool | None = None, token: str | None = None, message: str = "") -> str:
    """Upload what :func:`reelquant.save` wrote, after every byte was compared with its sum.

    Where the report names a folder of this machine as the source of the pipeline, that stays here.

    Args:
        folder: of a pipeline.
        repository: ``owner/name``; it is made if it is not there.
        private: whether a new one is private; by default as the owner's settings say.
        token: of the hub; by default that of ``hf auth login``.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: if the folder is not a pipeline's or is damaged, the name is none, or the hub refuses.
    """
    from huggingface_hub import HfApi

    path = absolute(folder)
    if not (path / INDEX).is_file():
        raise CheckpointError(f"'{path}' is not a diffusers pipeline: it has no {INDEX}; reelquant.save writes one")
    _check_name(repository)
    check_manifest(path)
    words = message or "Upload of a pipeline quantized by reelquant"
    try:
        hub = HfApi(token=token)
        address = hub.create_repo(repository, private=private, exist_ok=True)
        common: dict[str, Any] = {"repo_id": repository, "commit_message": words}
        hub.upload_folder(folder_path=str(path), ignore_patterns=[REPORT, ".*", "**/.*"], **common)
        if (path / REPORT).is_file():
            hub.upload_file(path_or_fileobj=_public(read_json(path / REPORT)).encode(), path_in_repo=REPORT, **common)
    except CheckpointError:
        raise
    except Exception as error:  # of the network, the hub, the disk
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise CheckpointError(
            f"cannot upload '{path}' to '{repository}': {type(error).__name__}: {reason:.300}; log in once (hf auth login) or pass a token"
        ) from error
    return str(address)


def check_hub(repository: str) -> None:
    """Refuse a repository that cannot be written, as far as that shows without the network: before hours of work whose end is an upload.

    Raises:
        CheckpointError: if the name is none, or there is no token.
    """
    from huggingface_hub import get_token

    _check_name(repository)
    if get_token() is None:
        raise CheckpointError(f"this machine has no token of the hub, which '{repository}' needs to be written; log in once: hf auth login")


def _check_name(repository: str) -> None:
    if not REPOSITORY.fullmatch(repository):
        raise CheckpointError(f"'{repository}' is not the name of a repository; give owner/name")


def _public(report: dict[str, Any]) -> str:
    """The report without a path of this machine."""
    private = not means_something_elsewhere(str(report.get(SOURCE) or ""))
    return summed_text({key: value for key, value in report.items() if key != OWN and not (private and key == SOURCE)})
