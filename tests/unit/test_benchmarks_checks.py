"""The benchmark that holds recipes against what was asked of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.checks import CHECKS, Check, page, verdict
from benchmarks.common import Clips, Records
from reelquant.recipes.recipe import load_recipe


@pytest.mark.parametrize(
    ("asked", "mean", "low", "said"),
    [(1.5, 1.4, 0.5, "missed"), (1.5, 1.6, 0.5, "passed"), (1.5, 1.6, -0.1, "not told"), (0.0, -0.1, -1.0, "missed")],
)
def test_verdicts(asked: float, mean: float, low: float, said: str) -> None:
    assert verdict(asked, mean, low) == said


@pytest.mark.parametrize("name", CHECKS)
def test_both_sides_of_a_check_are_recipes_and_differ(name: str) -> None:
    check = CHECKS[name]
    one, other = (load_recipe(source) for source in (check.row, check.rival))
    assert one.digest() != other.digest()


def test_gains_are_paired_and_what_is_missing_is_named(tmp_path: Path) -> None:
    clips, records = Clips("tiny-dit", 2), Records(tmp_path / "rows.jsonl")
    check = Check("minmax-w8a8", "minmax-w6a6", "fewer bits", 4.0, reasons={"tiny-dit": "because"})
    assert "not measured yet: `eight bits`" in page({"eight bits": check}, records, [clips])
    for source, values in (("minmax-w8a8", [33.0, 35.0]), ("minmax-w6a6", [30.0, 32.0])):
        digest = f"{clips.digest}-{load_recipe(source).digest()}"
        records.add({"name": source, "digest": digest, "psnr": values, "psnr_mean": sum(values) / 2})
    text = page({"eight bits": check}, records, [clips])
    assert "| eight bits | fewer bits | 4 | 34.0 | 33.0 | +3.0 (+3.0 to +3.0) | 2 | missed | because |" in text
