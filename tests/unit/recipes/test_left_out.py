"""The table of what published ways to leave out work reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.left_out import Gain, Quality, Shown, page
from reelquant.recipes.recipe import load_recipe

ROOT = Path(__file__).parents[3]


def row(name: str, psnr: list[float], digest: str = "of-the-clips", clips: int = 16) -> dict[str, Any]:
    mean = sum(psnr) / len(psnr)
    facts = {"pipeline": "tiny-dit", "clips": clips, "status": "measured", "psnr_mean": mean, "psnr_low": mean, "psnr_high": mean}
    return facts | {"name": name, "digest": digest, "psnr": psnr}


def test_a_gain_is_taken_over_the_same_clips() -> None:
    rows = [
        row("a", [40.0, 42.0], "more-clips-x", 64),
        row("a", [40.0, 42.0]),
        row("b", [39.0, 40.0]),
        row("b", [1.0, 1.0], "other-clips-x", 64),
    ]
    words, clips, verdict, _ = Gain("a", "b", 1.0, "-").told(rows, "tiny-dit")
    assert (words.split(" dB")[0], clips, verdict) == ("+1.5", "16", "passed")
    assert Gain("a", "b", 2.0, "-").told(rows, "tiny-dit")[2] == "missed"
    assert Gain("a", "b", 1.0, "-").told(rows, "tiny-unet")[2] == "not measured"


def test_a_recipe_counts_as_it_is_today() -> None:
    today = f"0123456789ab-{load_recipe('qvd-w8a8').digest()}"
    rows = [row("whatever", [50.0], today), row("whatever", [10.0], "0123456789ab-of-an-older-one", 64)]
    assert Quality("recipe qvd-w8a8", 30.0, "-").told(rows, "tiny-dit")[1:3] == ("16", "passed")


def test_every_test_that_the_table_names_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert "`cachequant-w8a8`" in page([])
    with pytest.raises(SystemExit, match="there is no test"):
        Shown("tests/contracts/test_reuse.py::test_that_is_not_there").told([], "-")
