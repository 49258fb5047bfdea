"""Several processes of one command, as torchrun, ``accelerate launch`` and ``srun`` start them: the first one talks to the user."""

from __future__ import annotations

from pathlib import Path

import typer

from reelquant.ranks import Rank, this_rank
from reelquant.ranks.environment import own_device

SHARING = ("quantize", "evaluate", "tune")
"""The verbs whose work is shared; of every other one the first process does everything."""


def only_first_speaks(verb: str | None) -> Rank:
    """Let the first process talk to the user, and end the others where a verb has nothing for them to do.

    Raises:
        typer.Exit: in every other process of a verb that is not shared.
    """
    rank = this_rank()
    if not rank.first:
        from reelquant.cli.console import only_errors

        if verb not in SHARING:
            raise typer.Exit
        only_errors()
    return rank


def of_this_process(device: str) -> str:
    """The device that ``--device`` means in this process."""
    return own_device(device, this_rank())


def work_folder(output: Path) -> Path:
    """Where processes meet while they make a folder, beside it."""
    return output.with_name(f"{output.name}.ranks")


def meeting_place(output: Path) -> Path | None:
    """The folder in which the making of an output is shared; None for one process, unless several began it."""
    folder = work_folder(output.absolute())
    return folder if folder.is_dir() or not this_rank().alone else None


def sharing(folder: Path) -> bool:
    """Whether what is made in a folder is shared: there are several processes, or several began."""
    return not this_rank().alone or (folder / "ranks").is_dir()
