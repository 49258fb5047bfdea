"""Which steps a schedule computes."""

from __future__ import annotations

import pytest
import torch

from reelquant.reuse.history import History, weights
from reelquant.reuse.schedule import Schedule

TIMES = [1000.0, 900.0, 800.0, 700.0, 600.0, 500.0, 400.0]


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (Schedule(every=1), [0, 1, 2, 3, 4, 5, 6]),
        (Schedule(every=2), [0, 2, 4, 6]),
        (Schedule(every=3), [0, 3, 6]),
        (Schedule(every=2, first=4), [0, 1, 2, 3, 5]),
        (Schedule(at=(1000.0, 800.0, 500.0)), [0, 2, 5]),
        (Schedule(at=(500.0,)), [0, 5]),  # the first step is always computed
        (Schedule(at=(850.0, 820.0)), [0, 2]),  # two timesteps that one step reaches
        (Schedule(at=(800.2,)), [0, 2]),
        (Schedule(at=(799.8,)), [0, 2]),  # a pipeline may hand 799.8 over as 800
        (Schedule(first=3, at=(500.0,)), [0, 1, 2, 5]),
    ],
)
def test_which_steps_are_computed(schedule: Schedule, steps: list[int]) -> None:
    before = [None, *TIMES]
    assert [step for step, time in enumerate(TIMES) if schedule.computes(step, time, before[step])] == steps


def test_weights_of_a_polynomial() -> None:
    assert weights([5.0], 3.0) == [1.0]
    assert weights([6.0, 5.0], 3.0) == pytest.approx([-2.0, 3.0])
    assert sum(weights([9.0, 6.0, 5.0], 3.0)) == pytest.approx(1.0)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_of_each_order_is_exact_for_polynomials_of_that_degree(order: int) -> None:
    history = History(order)
    for time in (9.0, 7.0, 6.0):
        history.keep(time, [torch.full((2,), time**order, dtype=torch.float64)])
    assert len(history) == order + 1
    assert history.at(3.0)[0].tolist() == pytest.approx([3.0**order] * 2)


def test_whole_numbers_are_not_forecast() -> None:
    history = History(1)
    for time, value in ((9.0, 1), (7.0, 4)):
        history.keep(time, [torch.tensor([value])])
    assert history.at(5.0)[0].tolist() == [4]
