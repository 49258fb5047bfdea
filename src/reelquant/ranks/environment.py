"""Which process of how many this is, as its launcher says: torchrun, ``accelerate launch`` or ``srun``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from reelquant._errors import RanksError


@dataclass(frozen=True)
class Rank:
    """One of several processes that were started together.

    Attributes:
        number: 0 for the first, which writes results and talks to the user.
        count: of all processes, on all machines.
        local: number on its own machine, which is that of its GPU.
    """

    number: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes results and talks to the user."""
        return self.number == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.count == 1


class _Launcher(NamedTuple):
    """The variables in which a launcher says what a process is."""

    number: str
    count: str
    local: str


LAUNCHERS = (
    _Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, and accelerate launch, which starts it
    # srun. SLURM_NTASKS will not do: it is also set in a batch script, which is one process; only what srun starts has a count of its step.
    _Launcher("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
"""The first whose variables are set counts: torchrun may have been started by srun."""


def this_rank(environment: Mapping[str, str] | None = None) -> Rank:
    """What this process is; the only one, if no launcher says anything.

    Args:
        environment: where to look, by default the environment of the process.

    Raises:
        RanksError: if a variable is not a number, or the numbers do not fit together.
    """
    given = os.environ if environment is None else environment
    launcher = next((one for one in LAUNCHERS if one.number in given and one.count in given), None)
    if launcher is None:
        return Rank()
    number, count, local = (_number(given, name) for name in launcher)
    if not 0 <= number < count:
        raise RanksError(f"{launcher.number}={number} and {launcher.count}={count} do not fit: processes count from 0; unset both")
    return Rank(number, count, local)


def _number(given: Mapping[str, str], name: str) -> int:
    text = given.get(name, "0" if name.endswith(("LOCAL_RANK", "LOCALID")) else "")
    try:
        return int(text)
    except ValueError:
        raise RanksError(f"{name} is not a number: '{text}'; launchers set it (torchrun, accelerate launch, srun), so unset it") from None


def own_device(device: str, rank: Rank) -> str:
    """The device of a process: of several, each has the GPU of its number on its machine.

    Example:
        >>> own_device("cuda", Rank(9, 16, 1))
        "cuda:1"
    """
    return f"cuda:{rank.local}" if device == "cuda" and not rank.alone else device
