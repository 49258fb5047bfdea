"""Scales per step of layers that do not run at every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from reelquant.engine.build import Context, build_group
from reelquant.engine.choice import Choice
from reelquant.observe import Call, Geometry, InputStatistics, Watched
from tests.single import one_group, plan_of

PER_STEP = {"format": "int8", "slots": "per_step"}


def scales(ran: dict[int, float], steps: int) -> list[float]:
    """Scales of the input of a layer that ran at these steps only, with inputs between minus and plus the given values."""
    model: Any = nn.Sequential(nn.Linear(2, 3))
    map_ = one_group(model, ["0"])
    plan = plan_of(model, map_, {"format": "int8", "granularity": "channel"}, PER_STEP)
    wanted = frozenset({"range"})
    geometry = Geometry.of(model[0])
    seen = InputStatistics.for_input(Watched("0", geometry, -1, 1, "main", steps, torch.Generator(), wanted, steps, 1))
    for step, reach in ran.items():
        seen.update(torch.tensor([[reach, -reach]]), Call(step))
    context = Context(plan, model, {"0": seen}, [float(step) for step in range(steps)], model.get_submodule)
    layer = build_group(context, map_.groups[0], Choice.first(plan.entries)).layers["0"]
    return layer.input_scale.flatten().tolist()


@pytest.mark.parametrize(
    ("ran", "steps", "reaches"),
    [
        ({0: 1.0, 1: 2.0, 2: 4.0}, 3, [1.0, 2.0, 4.0]),
        ({0: 1.0, 2: 2.0, 4: 4.0}, 6, [1.0, 1.0, 2.0, 2.0, 4.0, 4.0]),  # step 1 lies between 0 and 2: the earlier one
        ({1: 1.0, 4: 2.0}, 6, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]),
        ({2: 1.0}, 6, [1.0]),
    ],
)
def test_a_step_without_statistics_has_the_scale_of_the_nearest_step(ran: dict[int, float], steps: int, reaches: list[float]) -> None:
    unit = scales({0: 1.0}, 1)[0]
    assert scales(ran, steps) == pytest.approx([unit * reach for reach in reaches])
