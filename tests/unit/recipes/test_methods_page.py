"""The page of methods follows the recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.methods import PAGE, figures, page
from reelquant.recipes.recipe import load_recipe, names

ROOT = Path(__file__).parents[3]
ROW = {"name": "qvd-w8a8", "pipeline": "tiny-dit", "clips": 64, "psnr": [50.0, 40.0], "psnr_mean": 45.0}


@pytest.mark.parametrize("name", names())
def test_every_recipe_is_on_the_page_as_it_is(name: str) -> None:
    recipe, written = load_recipe(name), (ROOT / PAGE).read_text(encoding="utf-8")
    for text in (f"## {name}\n", recipe.summary, recipe.ours):
        assert text in written, "python -m benchmarks.methods writes the page again"
    assert recipe.ours or not recipe.paper, "say what differs from the paper in 'ours'"


def test_figures_are_those_of_the_recipe_as_it_is() -> None:
    recipe = load_recipe("qvd-w8a8")
    today = ROW | {"digest": f"abc-{recipe.digest()}"}
    assert figures(recipe, [today], "tiny-dit") == "45.0 (40.0), 64"
    assert figures(recipe, [today | {"digest": "abc-of-an-older-recipe"}], "tiny-dit") == "-"
    assert figures(recipe, [today], "tiny-unet") == "-"
    assert figures(recipe, [today | {"name": "trust 8 steps: qvd-w8a8"}], "tiny-dit") == "-"
    assert "| 45.0 (40.0), 64 |" in page([recipe], [today])


def test_what_is_said_of_a_paper_does_not_change_the_digest() -> None:
    recipe = load_recipe("qvd-w8a8")
    assert recipe.model_copy(update={"ours": "another"}).digest() == recipe.digest()
