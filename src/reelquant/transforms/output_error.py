"""What rounding a group would cost: the error of its layers' outputs on sampled rows, with the numbers that its layers are to have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from reelquant.branches.lowrank import largest_directions
from reelquant.formats import Granularity, MinMax, QuantSpec, dynamic, fit
from reelquant.stages import GroupView, Rewrite

Rank = Callable[[tuple[int, ...]], int]


def output_error(group: GroupView, rewrite: Rewrite, rank: Rank = lambda shape: 0) -> float:
    """Squared error of all outputs that read the input, over its sampled rows, if the group were rounded after one more rewrite.

    Weights and inputs are rounded to nearest with the ranges of their extremes; of static inputs those of the samples, at each step where
    there are scales per step. Biases are left out.

    Args:
        rank: of a weight's shape: so many of its largest directions stay float, as a branch would keep them; 0 for none.
    """
    after = group.rewritten(rewrite)
    before, rows = group.samples, after.samples
    taps = rows.shape[1] // group.channels
    zero = rewrite.per_tap(taps).input(torch.zeros_like(before[:1]))  # what a shift makes of zero: biases take it back exactly
    error = 0.0
    for site, weight, rewritten in zip(group.sites, group.weights, after.weights, strict=True):
        rest, wanted, size = rewritten.flatten(1), before @ weight.flatten(1).T, rank(tuple(weight.shape))
        if size:
            up, down = largest_directions(rest, size)
            rest = rest - up @ down
            wanted = wanted - before @ rewrite.undone(down.view(size, *weight.shape[1:])).flatten(1).T @ up.T
        rounded = fit(replace(site.specs.weight, range=MinMax()), rest)(rest)
        found = _input(site.specs.input, rows, taps, group) @ rounded.T - zero @ rest.T
        error += float((found - wanted).square().sum())
    return error


def _input(spec: QuantSpec | None, rows: Tensor, taps: int, group: GroupView) -> Tensor:
    """Rows as a layer would round them, ``[rows, channels * taps]``."""
    if spec is None:
        return rows
    values = rows.unflatten(1, (-1, taps)) if taps > 1 else rows
    axis = 1 if taps > 1 else -1
    spec = replace(spec, granularity=replace(spec.granularity, axis=axis))
    if spec.dynamic:
        return dynamic(spec, values)(values).flatten(1)
    grain = spec.granularity if spec.granularity.kind == "channel" else Granularity("tensor", axis=axis)
    shared = replace(spec, slots="shared", granularity=grain, range=MinMax(), alternatives=())
    if spec.slots == "shared" or group.statistics is None or group.statistics.rows is None:
        return fit(shared, values)(values).flatten(1)
    steps, found = group.statistics.rows.steps.to(values.device), torch.empty_like(values)
    for step in steps.unique():
        here = steps == step
        found[here] = fit(shared, values[here])(values[here])
    return found.flatten(1)
