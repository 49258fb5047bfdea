"""Which calls of the denoiser are recorded."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from reelquant.clock import FIRST, SECOND
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


@pytest.mark.parametrize("wanted", [4, 8, 16, 40, 80])
def test_pairs_are_recorded_as_a_whole(wanted: int) -> None:
    recorder, denoiser = Recorder(wanted, 80, lambda args, kwargs: args[1], lambda args, kwargs: int(args[0]), pairs=True), Denoiser()
    with recorder.watching(denoiser):
        for _ in range(4):
            for step in range(20):
                for half in (FIRST, SECOND):
                    denoiser(torch.tensor(float(half)), step)
    calls = recorder.recording([float(step) for step in range(20)])
    firsts, seconds = list(calls)[::2], list(calls)[1::2]
    assert wanted <= len(firsts) == len(seconds) < 2 * wanted
    assert all((one.half, other.half) == (FIRST, SECOND) and one.step == other.step for one, other in zip(firsts, seconds, strict=True))
    single = [step for step, _ in recorded(wanted, 80, 4, 20)]
    assert [one.step for one in firsts] == single  # the pairs that lie where single calls would


def test_pairs_stay_whole_when_more_calls_come_than_expected() -> None:
    recorder, denoiser = Recorder(3, 5, lambda args, kwargs: args[1], lambda args, kwargs: int(args[0]), pairs=True), Denoiser()
    with recorder.watching(denoiser):
        for step in range(97):
            for half in (FIRST, SECOND):
                denoiser(torch.tensor(float(half)), step)
    calls = list(recorder.recording([float(step) for step in range(97)]))
    assert 6 <= len(calls) < 12 and [call.half for call in calls] == [FIRST, SECOND] * (len(calls) // 2)
    assert [call.step for call in calls[::2]] == [call.step for call in calls[1::2]]
