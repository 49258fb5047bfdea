"""The search over recipes: what it may look at, what it learns, and the figures of its table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from benchmarks.recipe_search import Model, at_random, fitted, lost, search

COUNT = 24


class Watched(Mapping[str, float]):
    """Figures that remember which of them were read."""

    def __init__(self, figures: Mapping[str, float]) -> None:
        self.figures, self.read = figures, list[str]()

    def __getitem__(self, name: str) -> float:
        self.read.append(name)
        return self.figures[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.figures)

    def __len__(self) -> int:
        return len(self.figures)


def made(noise: float) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """Recipes with three features that mean the same on three pipelines, each with a level of its own."""
    generator = np.random.default_rng(3)
    features = {f"r{number}": generator.normal(size=3) for number in range(COUNT)}
    worth = np.array([6.0, -3.0, 1.0])
    figures = {
        pipeline: {name: level + float(x @ worth) + noise * generator.normal() for name, x in features.items()}
        for pipeline, level in (("a", 30.0), ("b", 50.0), ("c", 40.0))
    }
    return features, figures


def known(figures: Mapping[str, Mapping[str, float]], names: list[str]) -> dict[tuple[str, str], float]:
    return {(pipeline, name): figures[pipeline][name] for pipeline in ("b", "c") for name in names}


def test_only_the_recipes_that_are_tried_are_looked_at() -> None:
    features, figures = made(0.5)
    watched = Watched(figures["a"])
    tried = search(Model(features), known(figures, list(features)), watched, "a", 4)
    assert sorted(watched.read) == sorted(tried)
    assert len(set(tried)) == 4


def test_recipes_that_were_measured_nowhere_are_ordered_by_their_features() -> None:
    features, figures = made(0.0)
    best = sorted(figures["a"], key=figures["a"].__getitem__)[-2:]
    told = known(figures, [name for name in features if name not in best])
    assert set(search(fitted(features, told), told, figures["a"], "a", COUNT // 4)) >= set(best)


def test_an_answer_changes_what_is_tried_next() -> None:
    """A recipe fails on this pipeline: the one like it is not the next choice, although other pipelines say so."""
    features = {"left": np.array([1.0, 0, 0]), "like left": np.array([1.1, 0, 0]), "right": np.array([-9.0, 0, 0])}
    other = {"left": 40.0, "like left": 39.0, "right": 36.0}
    told = {(pipeline, name): value for pipeline in ("b", "c") for name, value in other.items()}
    model = Model(features, (10.0, 0.1, 40.0, 2.0))
    assert search(model, told, {"left": 10.0, "like left": 9.0, "right": 36.0}, "a", 2) == ["left", "right"]


def test_what_is_lost() -> None:
    figures = {"a": 3.0, "b": 2.0, "c": 0.0}
    assert lost(figures, ["b", "c"]) == 1.0
    assert at_random(figures, 1) == pytest.approx(3 - 5 / 3)
    assert at_random(figures, 2) == pytest.approx(3 - (3 + 3 + 2) / 3)
