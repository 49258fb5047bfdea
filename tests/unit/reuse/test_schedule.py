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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_results_are_half_a_code_away_and_take_a_byte_a_value(dtype: torch.dtype) -> None:
    history, exact = History(1, rounded=True), History(1)
    values = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0, 0] = 0.0
    for timestep in (9.0, 7.0):
        for one in (history, exact):
            one.keep(timestep, [values * timestep, torch.arange(3)])
    (found, numbers), (wanted, _) = history.at(9.0), exact.at(9.0)
    half = 9.0 * values.float().abs().amax(-1, keepdim=True) / 127 / 2
    assert ((found.float() - wanted.float()).abs() <= half * 1.01 + 2 * torch.finfo(dtype).eps * wanted.float().abs()).all()
    assert found.dtype == dtype and torch.equal(numbers, torch.arange(3)) and history.kinds == exact.kinds
    assert history.bytes == 2 * (2 * 8 * (64 + dtype.itemsize) + 3 * 8) and exact.bytes == 2 * (2 * 8 * 64 * dtype.itemsize + 3 * 8)
