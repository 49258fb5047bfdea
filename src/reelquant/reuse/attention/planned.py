"""At which steps every place of attention is computed, under one budget of multiplications, and what stands for it at the others.

What is shared is a weighted sum of the last one or two computed outputs, with the weights of least squares, which the recorded inner
products give. For a price of a computed step the best schedule of a place is found by dynamic programming; the price is raised until all
places together keep the budget (Lagrange's method: the choice is the best one for the multiplications that it takes).

Paper: CacheQuant (arXiv 2503.01323), its dynamic programming over recorded errors, for blocks. Ours plans for every place of attention.
Damage is the squared error of a place's output, not over its size: places that add much to the features, as those over frames do, stay
computed. Weights for how far an error reaches (at the denoiser's output place by place, and at the final latents step by step) were
measured, and brought nothing: tiny-unet 42.2 dB with them and without, tiny-dit 52.0 with them and 54.5 without, at half of the
multiplications.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from reelquant.reuse.attention.mode import Mode
from reelquant.reuse.attention.recorded import Array, Recorded
from reelquant.reuse.attention.share import Share

ORDERS = (0, 1)
RIDGE = 1e-5
"""Of the mean power of the outputs: keeps weights small where outputs are almost alike."""
ROUNDS = 60
"""Halvings of the interval in which the price lies."""

Steps = tuple[int, ...]
Forecasts = tuple[tuple[float, ...] | None, ...]
"""By step: the weights of the last computed outputs, oldest first; None where attention is computed."""


class Pauses(NamedTuple):
    """What may follow the computed steps ``history``: damage of a pause of none, one, ... steps, and the weights at its steps."""

    damage: Array
    weights: Array


def pauses(recorded: Recorded, site: str, order: int) -> dict[Steps, Pauses]:
    """Everything that a schedule of a place is made of, by the last ``order + 1`` computed steps.

    Errors of steps that follow each other are alike, so within a pause they are added, and squared then.
    """
    steps, gram = len(recorded.timesteps), recorded.grams[site]
    gap = max(8, steps // 3)
    found = {}
    for last in range(steps):
        befores = [()] if not order or not last else [(before,) for before in range(max(last - gap, 0), last)]
        for before in befores:
            history, following = [*before, last], np.arange(last + 1, min(last + gap, steps))
            within = gram[np.ix_(history, history)]
            damped = within + RIDGE * np.trace(within) / len(history) * np.eye(len(history))
            weights = np.linalg.solve(damped, gram[np.ix_(history, following)]).T
            crossed = (weights * gram[np.ix_(following, history)]).sum(1)
            squares = gram[following, following] - 2 * crossed + np.einsum("si,ij,sj->s", weights, within, weights)
            single = np.sqrt(squares.clip(min=0))
            found[tuple(history)] = Pauses(np.concatenate([[0.0], single.cumsum() ** 2]), weights)
    return found


def cheapest(known: Mapping[Steps, Pauses], steps: int, price: float) -> tuple[float, Steps]:
    """The least damage and prices of computed steps together, and the computed steps."""
    kept = max(map(len, known))
    best: dict[Steps, tuple[float, Steps]] = {(0,): (price, (0,))}
    end: tuple[float, Steps] = (math.inf, ())
    by_last: list[list[Steps]] = [[] for _ in range(steps)]
    by_last[0].append((0,))
    for last in range(steps):
        for history in by_last[last]:
            value, path = best[history]
            for length, damage in enumerate(known[history].damage):
                following, total = last + 1 + length, value + float(damage)
                if following == steps:
                    end = min(end, (total, path))
                    continue
                new = (*history, following)[-kept:]
                if new not in best:
                    by_last[following].append(new)
                if new not in best or total + price < best[new][0]:
                    best[new] = total + price, (*path, following)
    return end


def plan(recorded: Recorded, budget: float) -> dict[str, Forecasts]:
    """The schedule of every place, of the least expected damage with at most this share of the multiplications.

    At least the first step of every place is computed, so a budget below one step's share is not kept.
    """
    known = {(site, order): pauses(recorded, site, order) for site in recorded.grams for order in ORDERS}
    steps, total = len(recorded.timesteps), sum(recorded.multiplications.values())

    def at(price: float) -> dict[str, tuple[int, Steps]]:
        chosen = {}
        for site, count in recorded.multiplications.items():
            values = {order: cheapest(known[site, order], steps, price * count / total) for order in ORDERS}
            order = min(ORDERS, key=lambda one: values[one][0])
            chosen[site] = order, values[order][1]
        return chosen

    def share(chosen: Mapping[str, tuple[int, Steps]]) -> float:
        return sum(recorded.multiplications[site] * len(path) for site, (_, path) in chosen.items()) / (total * steps)

    low, high = -60.0, 60.0  # logarithms of the price
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if share(at(math.exp(middle))) <= budget else (middle, high)
        if high - low < 1e-3:
            break
    return {site: forecasts(known[site, order], path, steps) for site, (order, path) in at(math.exp(high)).items()}


def forecasts(known: Mapping[Steps, Pauses], computed: Steps, steps: int) -> Forecasts:
    """What a schedule does at every step."""
    kept, found = max(map(len, known)), list[tuple[float, ...] | None]()
    for step in range(steps):
        before = tuple(one for one in computed if one <= step)
        if before[-1] == step:
            found.append(None)
            continue
        weights = known[before[-kept:]].weights[step - before[-1] - 1]
        found.append(tuple(round(float(one), 5) for one in weights))
    return tuple(found)


def forecasting(row: Sequence[Sequence[float] | None]) -> tuple[Mode | None, ...]:
    """The mode of every step that is not computed; all of a place remember the same outputs."""
    order = max((len(cell) for cell in row if cell is not None), default=1) - 1
    return tuple(None if cell is None else Share(order, tuple(cell)) for cell in row)
