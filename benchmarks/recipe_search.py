"""Which recipe is best on a pipeline, found with a quarter of the trials: what was measured of other pipelines says what to try first.

Run it from the repository root; it measures nothing, it reads ``benchmarks/results/rows.jsonl``::

    python -m benchmarks.recipe_search --output benchmarks/results

Every trial is a row of the library or of the benchmarks beside it, with the recipe as it is today, over the first 16 clips of the row. A
search sees all trials of the *other* pipelines (leave one pipeline out) and none of its own. It tries the recipe that is predicted best,
learns from the answer, and tries the next one, until it has tried a quarter of the recipes. *Lost* is the best recipe of all less the best
that was tried, dB. The result is ``recipe-search.md``.

Source: Quantune (arXiv 2202.05048): recipes are features, a learned model orders them, and trials of other models come along. Ours: a
Gaussian process in the place of boosted trees, for tens of trials instead of thousands; features are numbers of bits, fineness of scales
and the stages of a recipe (31 of them); a recipe, and a pipeline, have an effect of their own beside these.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import groups, library, rounding
from benchmarks.common import Records, markdown
from reelquant.formats import parse_format
from reelquant.recipes.recipe import Recipe, load_recipe, names

PIPELINES = ("tiny-dit", "tiny-unet", "tiny-ltx")
CLIPS = 16  # of every trial: the first ones of longer rows
SHARE, LIMIT = 0.25, 0.3  # of the recipes that are tried; dB that may be lost
LEAST = 4  # recipes that a search has to choose from
SPLITS = 40  # random halves of the recipes that other pipelines are not asked for
FEW_BITS = 5  # of weights
OFFSET = 25.0  # variance of what all recipes of a pipeline have in common, dB^2: pipelines lie within some dB of each other
NOISE = 0.25  # variance of a figure of 16 clips that no feature explains, dB^2
SIZES = tuple(itertools.product((1.0, 10.0, 40.0), (0.1, 1.0, 10.0), (0.1, 1.0, 10.0), (2.0, 4.0)))
"""Tried for the model: variances (dB^2) of features on all pipelines, of a recipe on all pipelines, of features on one pipeline; length."""
OTHER = ("trust", "first frame")  # rows of other calibrations and conditions; calibrated as usual counts


# --- trials ---------------------------------------------------------------------------------------------------------------------------


def recipes() -> dict[str, Recipe]:
    """Everything that rows may be of, by name: the library, and what benchmarks hold it against."""
    sources: list[Any] = [*names(), *(source for source, _ in library.ROWS.values())]
    sources += [*(source for source, *_ in groups.ROWS.values()), *rounding.recipes().values()]
    return {recipe.name: recipe for recipe in map(load_recipe, sources)}


@dataclass(frozen=True)
class Trials:
    """What was measured: pipeline -> recipe -> mean PSNR of the first clips, dB."""

    recipes: Mapping[str, Recipe]
    figures: Mapping[str, Mapping[str, float]]

    @classmethod
    def load(cls, file: Path) -> Trials:
        """The rows that are of recipes as they are today."""
        known, rows = recipes(), Records(file).load()
        found: dict[str, dict[str, float]] = {pipeline: {} for pipeline in PIPELINES}
        for name, recipe in known.items():
            digest = f"-{recipe.digest()}"
            own = [row for row in rows if digest in str(row.get("digest")) and row.get("psnr") and _as_usual(row["name"], name)]
            for row in sorted(own, key=lambda row: row["clips"]):
                if row["pipeline"] in found and row["clips"] >= CLIPS:
                    found[row["pipeline"]][name] = float(np.mean(row["psnr"][:CLIPS]))
        return cls(known, found)

    def on(self, pipelines: Collection[str]) -> list[str]:
        """Recipes that were measured on all of these."""
        return [name for name in self.recipes if all(name in self.figures[one] for one in pipelines)]

    @cached_property
    def features(self) -> dict[str, np.ndarray]:
        """Of every recipe that was measured somewhere, each feature with the spread 1."""
        measured = [name for name in self.recipes if any(name in found for found in self.figures.values())]
        written = {name: features(self.recipes[name]) for name in measured}
        keys = sorted({key for one in written.values() for key in one})
        table = np.array([[one.get(key, 0.0) for key in keys] for one in written.values()])
        spread = table.std(0)
        return dict(zip(measured, table / np.where(spread > 0, spread, 1.0), strict=True))


def _as_usual(row: str, name: str) -> bool:
    return row == f"trust as usual: {name}" or not row.startswith(OTHER)


def features(recipe: Recipe) -> dict[str, float]:
    """What a recipe says: bits and scales of weights and inputs, and its stages."""
    found = {}
    for side, told in (("weight", recipe.defaults.weight), ("input", recipe.defaults.input)):
        formats = [] if told is None else [told.format] if isinstance(told.format, str) else list(told.format)
        found[f"{side} bits"] = math.log2(min((parse_format(one).bits for one in formats), default=16))
        found[f"{side} floats"] = float(any(not one.lstrip("u").startswith("int") for one in formats))
        grain = "" if told is None else str(told.granularity)
        size = int(grain.removeprefix("group-")) if grain.startswith("group-") else {"token": 128, "channel": 128}.get(grain, 512)
        found[f"{side} scales"] = -math.log2(size)
        found[f"{side} at run time"] = float(bool(told and told.dynamic))
        found[f"{side} range searched"] = float(told is not None and told.range != "minmax")
        found[f"{side} by timestep"] = float(told is not None and told.slots != "shared")
    for entry in recipe.entries:
        found[f"{entry.axis} {entry.name}"] = 1.0
    return found


# --- the model ------------------------------------------------------------------------------------------------------------------------

Place = tuple[str, str]  # pipeline, recipe


@dataclass(frozen=True)
class Model:
    """A Gaussian process over pipelines and recipes.

    Attributes:
        features: of every recipe.
        sizes: one of :data:`SIZES`.
    """

    features: Mapping[str, np.ndarray]
    sizes: tuple[float, float, float, float] = SIZES[0]

    def kernel(self, one: Sequence[Place], other: Sequence[Place]) -> np.ndarray:
        """Covariances ``[one, other]``, dB^2."""
        shared, recipe, apart, length = self.sizes
        x, y = (np.array([self.features[name] for _, name in places]) for places in (one, other))
        near = np.exp(-np.square(x[:, None] - y[None]).sum(-1) / (2 * length**2 * x.shape[1] / 10))
        same = np.array([[a[1] == b[1] for b in other] for a in one])
        here = np.array([[a[0] == b[0] for b in other] for a in one])
        return shared * near + recipe * same + here * (apart * near + OFFSET)

    def predicted(self, known: Mapping[Place, float], asked: Sequence[Place]) -> np.ndarray:
        """Mean of every place asked for, dB."""
        places, values = list(known), np.array(list(known.values()))
        inner = self.kernel(places, places) + NOISE * np.eye(len(places))
        return values.mean() + self.kernel(asked, places) @ np.linalg.solve(inner, values - values.mean())

    def likelihood(self, known: Mapping[Place, float]) -> float:
        """Logarithm, without its constant."""
        places, values = list(known), np.array(list(known.values()))
        inner = self.kernel(places, places) + NOISE * np.eye(len(places))
        rest = values - values.mean()
        return float(-0.5 * rest @ np.linalg.solve(inner, rest) - 0.5 * np.linalg.slogdet(inner)[1])


def fitted(features: Mapping[str, np.ndarray], known: Mapping[Place, float]) -> Model:
    """The sizes under which these trials are likeliest."""
    return max((Model(features, sizes) for sizes in SIZES), key=lambda one: one.likelihood(known))


def search(model: Model, known: Mapping[Place, float], figures: Mapping[str, float], pipeline: str, count: int) -> list[str]:
    """The recipes that are tried on a pipeline, in order.

    Args:
        known: trials of other pipelines.
        figures: what trials on this one would say, dB; only those that are made are looked at.
        count: how many are made.
    """
    seen, tried = dict(known), list[str]()
    for _ in range(count):
        left = [name for name in figures if name not in tried]
        best = left[int(model.predicted(seen, [(pipeline, name) for name in left]).argmax())]
        tried.append(best)
        seen[pipeline, best] = figures[best]
    return tried


# --- what is found --------------------------------------------------------------------------------------------------------------------


def sets(trials: Trials) -> Iterator[tuple[str, list[str], tuple[str, ...]]]:
    """Words, recipes and pipelines. A recipe that is best on every pipeline is found by anyone, so there are sets without it."""
    few = [name for name, one in trials.recipes.items() if one.defaults.weight and _bits(one) <= FEW_BITS and _few(one)]
    for pipelines in (PIPELINES, PIPELINES[:2]):
        measured = trials.on(pipelines)
        yield "all", measured, pipelines
        left = [name for name in measured if name in few]
        yield "4-bit weights", left, pipelines
        left = _without_champions(trials, left, pipelines)
        yield "4-bit weights, without those that are best on every pipeline", left, pipelines


def _bits(recipe: Recipe) -> float:
    told = recipe.defaults.weight.format if recipe.defaults.weight else "int16"
    return min(parse_format(one).bits for one in ([told] if isinstance(told, str) else told))


def _few(recipe: Recipe) -> bool:
    return not any(entry.axis == "reuse" for entry in recipe.entries)


def _without_champions(trials: Trials, some: Sequence[str], pipelines: Sequence[str]) -> list[str]:
    left = list(some)
    while left and len(champions := {max(left, key=trials.figures[one].__getitem__) for one in pipelines}) == 1:
        left.remove(champions.pop())
    return left


def known_of(trials: Trials, pipeline: str, hidden: Collection[str] = ()) -> dict[Place, float]:
    """Trials of all other pipelines."""
    return {
        (other, name): value
        for other, found in trials.figures.items()
        for name, value in found.items()
        if other != pipeline and name not in hidden
    }


def lost(figures: Mapping[str, float], tried: Collection[str]) -> float:
    """The best of all less the best that was tried, dB."""
    return max(figures.values()) - max(figures[name] for name in tried)


def at_random(figures: Mapping[str, float], count: int) -> float:
    """What is lost on average when so many recipes are tried in random order, dB."""
    ordered = sorted(figures.values(), reverse=True)
    ways = [math.comb(len(ordered) - 1 - place, count - 1) for place in range(len(ordered))]
    return float(ordered[0] - np.dot(ordered, ways) / sum(ways))


@dataclass(frozen=True)
class Searched:
    """A search on a pipeline.

    Attributes:
        words: what it chooses from.
        pipeline: that it is for.
        others: pipelines that the recipes were measured on, too.
        figures: what trials of all of them say, dB.
        tried: what the search tries.
        unseen: what is lost where half of the recipes were not measured on the other pipelines, dB, once for each of :data:`SPLITS`.
    """

    words: str
    pipeline: str
    others: tuple[str, ...]
    figures: Mapping[str, float]
    tried: Sequence[str]
    unseen: Sequence[float] = ()

    @property
    def best(self) -> str:
        return max(self.figures, key=self.figures.__getitem__)

    @property
    def lost(self) -> float:
        return lost(self.figures, self.tried)

    def line(self) -> list[str]:
        """Of the table."""
        within = np.mean([value <= LIMIT for value in self.unseen])
        return [
            self.words, self.pipeline, f"{len(self.tried)} of {len(self.figures)}", f"`{self.best}`, {self.figures[self.best]:.1f}",
            f"{self.lost:.1f}", f"{np.mean(self.unseen):.1f} ({within:.0%})", f"{at_random(self.figures, len(self.tried)):.1f}",
        ]  # fmt: skip


def searched(trials: Trials, splits: int = SPLITS) -> Iterator[Searched]:
    """Every set on every pipeline."""
    for words, some, pipelines in sets(trials):
        for pipeline in pipelines if len(some) >= LEAST else ():
            figures = {name: trials.figures[pipeline][name] for name in some}
            count = max(int(SHARE * len(some)), 1)
            unseen = [lost(figures, _tried(trials, pipeline, figures, count, _half(figures, split))) for split in range(splits)]
            others = tuple(one for one in pipelines if one != pipeline)
            yield Searched(words, pipeline, others, figures, _tried(trials, pipeline, figures, count), unseen)


def _tried(trials: Trials, pipeline: str, figures: Mapping[str, float], count: int, hidden: Collection[str] = ()) -> list[str]:
    known = known_of(trials, pipeline, hidden)
    return search(fitted(trials.features, known), known, figures, pipeline, count)


def _half(figures: Mapping[str, float], split: int) -> list[str]:
    return np.random.default_rng(split).choice(list(figures), len(figures) // 2, replace=False).tolist()


HEADINGS = (
    "recipes",
    "pipeline",
    "tried",
    "best of all, dB",
    "lost, dB",
    f"lost where half of the recipes were never measured, dB (within {LIMIT})",
    "lost in random order, dB",
)


def main() -> None:
    """Read the rows and write the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = made.parse_args()
    trials = Trials.load(args.output / "rows.jsonl")
    about = " ".join(" ".join(str(__doc__).split("\n\n")[3:]).split())
    text = f"# A search over recipes\n\n{about}\n\n{markdown(HEADINGS, [one.line() for one in searched(trials)])}"
    (args.output / "recipe-search.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
