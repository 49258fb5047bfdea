from __future__ import annotations

import pytest
import torch

from reelquant._errors import CheckpointError
from reelquant.formats import Leading


def test_the_first_ones_of_every_part_are_stored() -> None:
    part = Leading.read("2:3")
    assert part.places(6).tolist() == [0, 1, 3, 4] and part.count(6) == 4 and str(part) == "2:3"


def test_all_are_stored_where_nothing_is_said() -> None:
    part = Leading.read("")
    assert torch.equal(part.places(5), torch.arange(5)) and part.count(5) == 5 and str(part) == ""


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "2-4", "2:4:8", "1:65537"])
def test_what_a_damaged_config_says_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="written KEPT:OF"):
        Leading.read(text)


def test_parts_divide_a_weight() -> None:
    with pytest.raises(CheckpointError, match="not made of parts of 4"):
        Leading.read("3:4").count(10)
