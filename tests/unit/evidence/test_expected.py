"""How long an evaluation will take: what is told, and when."""

from __future__ import annotations

import pytest

from reelquant.evidence.expected import Expected


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


class Listener:
    """Keeps the sentences."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def phase(self, name: str, total: int) -> None:
        pass

    def advance(self) -> None:
        pass

    def tell(self, sentence: str) -> None:
        self.said.append(sentence)


def run(expected: Expected, clock: Clock, phase: str, calls: int, step: float, around: float, steps: int = 4, first: float = 0.0) -> None:
    """A phase of sampling: ``steps`` a call, ``around`` seconds after each call, ``first`` seconds more for the first step of all."""
    expected.phase(phase, calls * steps)
    for call in range(calls):
        for number in range(steps):
            clock.time += step + (first if not call and not number else 0.0)
            expected.advance()
        clock.time += around


def test_the_total_is_told_after_two_steps_and_with_measuring_after_one_call() -> None:
    clock, heard = Clock(), Listener()
    expected = Expected(heard, {"sample float": 3, "sample quantized": 3}, measured=10, look=lambda: 2.0, more=1.0, now=clock)
    run(expected, clock, "sample float", 3, step=5.0, around=3.0, first=40.0)  # the first step compiles
    assert heard.said == [
        "about 2.3 min in all: 7 calls of 4 steps, 5 s a step; decoding and measuring come on top",
        "now about 3 min in all: 7 calls of 4 steps, 5 s a step, 2 s to measure a clip",
    ]
    assert expected.seconds == 7 * (4 * 5 + 3) + 10 * 2


def test_a_variant_that_is_slower_changes_the_total_and_one_as_fast_does_not() -> None:
    clock, heard = Clock(), Listener()
    expected = Expected(heard, {"sample float": 2, "sample quantized": 2, "sample floor": 2}, now=clock)
    run(expected, clock, "sample float", 2, step=1.0, around=0.0)
    run(expected, clock, "sample quantized", 2, step=1.1, around=0.0)
    assert len(heard.said) == 2
    run(expected, clock, "sample floor", 2, step=10.0, around=0.0)
    assert len(heard.said) == 3 and expected.seconds == pytest.approx(2 * 4 * (1 + 1.1 + 10))


def test_phases_that_make_no_clips_and_calls_of_one_step_are_heard() -> None:
    clock, heard = Clock(), Listener()
    expected = Expected(heard, {"sample float": 1, "sample quantized": 1}, now=clock)
    expected.phase("measure test", 3)
    expected.advance()
    assert heard.said == [] and expected.seconds is None
    run(expected, clock, "sample float", 1, step=7.0, around=1.0, steps=1)
    expected.phase("sample quantized", 1)
    assert [said.partition(" in all")[0] for said in heard.said] == ["about 14 s", "now about 16 s"]
