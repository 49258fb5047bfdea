"""``--push-to-hub``: what was written goes to the hub, too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reelquant.cli.signals import keeping

Push = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="Then upload the folder with its model card; after `hf auth login`. Not if --gate is missed.",
        show_default=False,
    ),
]


def upload(path: Path, repository: str | None, json: bool) -> dict[str, str]:
    """Upload a finished folder.

    Args:
        path: the folder.
        repository: ``owner/name``; None for no upload.
        json: print nothing.

    Returns:
        What the JSON document says of it; empty if nothing is uploaded.

    Raises:
        CheckpointError: if the hub refuses. The folder stays.
    """
    from reelquant._errors import CheckpointError
    from reelquant.api import push_to_hub
    from reelquant.cli import console

    if repository is None:
        return {}
    again = f"the folder is complete; upload it in Python: reelquant.push_to_hub({str(path)!r}, {repository!r})"
    try:
        with keeping(lambda: again):
            address = push_to_hub(path, repository)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {again}") from error
    if not json:
        console.done(address, "uploaded with its model card")
    return {"repository": address}
