from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reelquant._errors import CheckpointError, RecipeError
from reelquant.formats import Kept


def test_the_bytes_by_hand() -> None:
    codes = torch.tensor([[7, 0, 0, 9, 0, 0, 5, 0]], dtype=torch.uint8)
    zeros = torch.zeros_like(codes)
    # bits, first weight lowest: 1001 of the first four, 1010 of the second: of its three zeros the first one counts as kept
    stored = Kept(2, 4).pack(codes, zeros, 8)
    assert stored.tolist() == [[0b0101_1001, 7, 9, 0, 5]]
    assert torch.equal(Kept(2, 4).unpack(stored, zeros, 8), codes)
    assert Kept(2, 4).pack(codes, zeros, 4).tolist() == [[0b0101_1001, 7 | 9 << 4, 0 | 5 << 4]]


@pytest.mark.parametrize(
    ("kept", "width", "bits", "expected"), [("2:4", 64, 8, 40), ("2:4", 64, 4, 24), ("42:64", 64, 8, 50), ("2:4", 5, 8, 5)]
)
def test_bytes_of_a_row(kept: str, width: int, bits: int, expected: int) -> None:
    assert Kept.parse(kept).row_bytes(width, bits) == expected


@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 4),
    width=st.integers(1, 40),
    bits=st.integers(2, 8),
    kept=st.sampled_from(["1:2", "2:4", "3:7", "42:64"]),
)
def test_unpacking_undoes_packing(seed: int, rows: int, width: int, bits: int, kept: str) -> None:
    generator, pattern = torch.Generator().manual_seed(seed), Kept.parse(kept)
    zeros = torch.randint(2**bits, (rows, 1), generator=generator).to(torch.uint8).expand(rows, width)  # a zero point for every row
    stays = pattern.best(pattern.in_groups(torch.rand(rows, width, generator=generator), -1.0)).flatten(1)[:, :width]
    codes = torch.where(stays, torch.randint(2**bits, (rows, width), generator=generator).to(torch.uint8), zeros)
    stored = pattern.pack(codes, zeros, bits)
    assert stored.shape == (rows, pattern.row_bytes(width, bits))
    assert torch.equal(pattern.unpack(stored, zeros, bits), codes)


def test_more_weights_than_are_kept_are_refused() -> None:
    with pytest.raises(CheckpointError, match="of which 2:4 are kept"):
        Kept(2, 4).pack(torch.ones(1, 4, dtype=torch.uint8), torch.zeros(1, 4, dtype=torch.uint8), 8)


def test_damaged_bytes_are_refused() -> None:
    zeros = torch.zeros(1, 4, dtype=torch.uint8)
    stored = Kept(2, 4).pack(torch.tensor([[1, 2, 0, 0]], dtype=torch.uint8), zeros, 8)
    with pytest.raises(CheckpointError, match="damaged"):
        Kept(2, 4).unpack(stored ^ torch.tensor([[4, 0, 0]], dtype=torch.uint8), zeros, 8)
    with pytest.raises(CheckpointError, match=r"take 3 bytes a row, got \(1, 2\)"):
        Kept(2, 4).unpack(stored[:, :2], zeros, 8)


@pytest.mark.parametrize("text", ["", "2", "4:4", "0:4", "5:4", "2:4:8", "a:b", "1:5000", "-2:4"])
def test_patterns_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="KEPT:OF"):
        Kept.parse(text)
