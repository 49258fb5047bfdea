"""Which calls of the denoiser are recorded."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from reelquant.engine.recorder import Recorder


class Denoiser(nn.Module):
    def forward(self, latents: Tensor, timestep: int) -> Tensor:
        return latents + timestep


def recorded(wanted: int, expected: int, runs: int, steps: int, calls_a_step: int = 1) -> list[tuple[int, int]]:
    """(step, call of that step) of every recorded call."""
    recorder, denoiser = Recorder(wanted, expected, lambda args, kwargs: args[1]), Denoiser()
    with recorder.watching(denoiser):
        for _ in range(runs):
            for step in range(steps):
                for half in range(calls_a_step):
                    denoiser(torch.tensor(float(half)), step)
    recording = recorder.recording([float(step) for step in range(steps)])
    for call in recording:
        assert float(call.output) == float(call.args[0]) + call.step
    return [(call.step, int(call.args[0])) for call in recording]


def test_few_calls_are_spread_over_the_steps() -> None:
    # a stride of 20 is one run of the sampler: places 0, 0.618, 0.236 and 0.854 of it
    assert [step for step, _ in recorded(4, 80, 4, 20)] == [0, 12, 4, 17]


@pytest.mark.parametrize("wanted", [4, 8, 16, 40])
def test_steps_do_not_repeat_more_than_they_have_to(wanted: int) -> None:
    steps = Counter(step for step, _ in recorded(wanted, 80, 4, 20))
    assert wanted <= steps.total() < 2 * wanted
    assert len(steps) >= 0.6 * min(wanted, 20) and min(steps) < 8 and max(steps) >= 12


@pytest.mark.parametrize("wanted", [8, 16, 32, 80])
def test_both_halves_of_a_guidance_pair_are_met(wanted: int) -> None:
    halves = Counter(half for _, half in recorded(wanted, 80, 4, 20, calls_a_step=2))
    assert wanted <= halves.total() < 2 * wanted and min(halves[0], halves[1]) >= 0.25 * halves.total()


@pytest.mark.parametrize("expected", [5, 80, 1000])
def test_a_wrong_expectation_still_gives_some_calls_and_not_too_many(expected: int) -> None:
    assert 1 <= len(recorded(4, expected, 4, 20)) < 8


def test_all_calls_if_as_many_are_wanted_as_are_made() -> None:
    assert [step for step, _ in recorded(80, 80, 4, 20)] == list(range(20)) * 4


def test_none_if_none_are_wanted() -> None:
    assert recorded(0, 80, 1, 20) == []
