"""Which process this is, as launchers say."""

from __future__ import annotations

import pytest

from reelquant import RanksError
from reelquant.ranks import Rank, this_rank
from reelquant.ranks.environment import own_device

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "9", "SLURM_NTASKS": "32", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "32"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Rank()),
        (TORCHRUN, Rank(3, 16, 1)),
        (SRUN, Rank(9, 32, 1)),
        (SRUN | TORCHRUN, Rank(3, 16, 1)),  # torchrun, started by srun once a machine
        ({name: value for name, value in SRUN.items() if name != "SLURM_STEP_NUM_TASKS"}, Rank()),  # a batch script, before srun
        ({"RANK": "0"}, Rank()),
    ],
    ids=["alone", "torchrun", "srun", "torchrun in srun", "batch script", "half a launcher"],
)
def test_launchers_say_which_process_this_is(given: dict[str, str], expected: Rank) -> None:
    assert this_rank(given) == expected
    assert this_rank(given).first == (expected.number == 0) and this_rank(given).alone == (expected.count == 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"RANK": "one"}, "RANK is not a number: 'one'"), ({"RANK": "16"}, "RANK=16 and WORLD_SIZE=16 do not fit")],
)
def test_what_cannot_be_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(RanksError, match=message):
        this_rank(TORCHRUN | change)


def test_each_process_of_a_machine_has_a_gpu() -> None:
    assert own_device("cuda", Rank(9, 16, 1)) == "cuda:1"
    assert (
        own_device("cuda", Rank()) == "cuda"
        and own_device("cuda:0", Rank(9, 16, 1)) == "cuda:0"
        and own_device("cpu", Rank(1, 2, 1)) == "cpu"
    )
