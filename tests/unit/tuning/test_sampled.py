"""What sampled schedules say about the damages that schedules are planned with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reelquant.reuse.plans import Errors, even, expected, plans
from reelquant.tuning.guided import guided_answers
from reelquant.tuning.kept import KeptFigures
from reelquant.tuning.recording import Seconds
from reelquant.tuning.sampled import Sample, by_fit, misfits
from reelquant.tuning.search import KINDS, MEASURED, Search

STEPS = 12


def errors() -> Errors:
    """Results that change smoothly, and damages that fall steeply."""
    times = np.linspace(1000.0, 50.0, STEPS)
    values = np.stack([np.sin(times / 300 + phase) for phase in np.linspace(0, 3, 40)], 1)
    weight = np.exp(np.linspace(4.0, 0.0, STEPS))
    return Errors(list(times), values @ values.T, weight, fitted=True)


def figures(told: Errors, easy: float, noise: float = 0.0, seed: int = 0) -> list[Sample]:
    """What schedules would show if errors were right, on eight clips that are so easy and differ by so much, dB."""
    schedules = [even(STEPS, 6), *(plans(kind(errors()), 1)[6].steps for kind in KINDS.values()), even(STEPS, 4)]
    dice = np.random.default_rng(seed)
    mean = [easy - 10 * np.log10(expected(told, steps, 1)) for steps in schedules]
    return [Sample(steps, 1, tuple(psnr + noise * dice.normal(size=8))) for steps, psnr in zip(schedules, mean, strict=True)]


@pytest.mark.parametrize("name", KINDS)
def test_the_errors_that_explain_what_was_sampled_come_first(name: str) -> None:
    kinds = {one: kind(errors()) for one, kind in KINDS.items()}
    samples = figures(kinds[name], easy=35.0)
    found = misfits(kinds, samples)
    assert found[name] < 1e-9 and found[by_fit(kinds, samples)[0]] < 1e-9


def test_damages_of_single_steps_are_believed_unless_clips_are_sure() -> None:
    kinds = {one: kind(errors()) for one, kind in KINDS.items()}

    def kept(truth: str, noise: float) -> int:
        """Of 40 runs, in how many single steps are believed."""
        return sum(by_fit(kinds, figures(kinds[truth], 35.0, noise, seed))[0] == MEASURED for seed in range(40))

    assert kept("all alike", 1.0) == 0
    assert kept(MEASURED, 4.0) >= 32 and kept("all alike", 60.0) >= 24


def test_one_sample_tells_nothing() -> None:
    kinds = {one: kind(errors()) for one, kind in KINDS.items()}
    assert by_fit(kinds, figures(errors().softened(0.0), 30.0)[:1]) == list(KINDS)


def search() -> Search:
    class Trials:
        def run(self, stage: object, computed: tuple[int, ...], *_: object) -> tuple[int, ...]:
            return computed

    return Search((), errors(), Seconds(1.0, 0.0, 0.0, 1), Trials())  # type: ignore[arg-type]


def test_what_is_sampled_begins_with_even_spacing_and_has_no_schedule_twice() -> None:
    found = search().proposals(8)
    assert found[0] == even(STEPS, 6) and len(found) == len(set(found)) <= 8
    assert search().proposals(1) == found[:1] and search().proposals(0) == []


def test_the_schedule_of_the_believed_errors_is_tried_first() -> None:
    one, alike = search(), errors().softened(0.0)
    planned = plans(errors(), 1)[6].steps, plans(alike, 1)[6].steps
    assert planned[0] != planned[1]
    assert next(iter(one.all_of(6))) == planned[0] and one.kinds[0] == MEASURED
    one.believe(figures(alike, 40.0))
    assert next(iter(one.all_of(6))) == planned[1]


def test_softened_damages_keep_their_order_or_are_alike() -> None:
    assert np.allclose(errors().softened(1.0).weight, errors().weight)
    assert np.allclose(errors().softened(0.5).weight[1:] ** 2, errors().weight[1:])
    assert set(errors().softened(0.0).weight[1:]) == {1.0}


def test_kept_figures_go_on_after_a_torn_line_and_ignore_other_settings(tmp_path: Path) -> None:
    file = tmp_path / "work" / "figures.jsonl"
    KeptFigures(file, ["a"], "schedule", "psnr").keep("x", [1.0, 2.0])
    KeptFigures(file, ["b"], "schedule", "psnr").keep("x", [3.0])
    with file.open("a") as opened:
        opened.write('{"settings": "[\\"a')
    again = KeptFigures(file, ["a"], "schedule", "psnr")
    assert again.of("x") == [1.0, 2.0] and again.of("y") is None


def test_inner_products_of_guided_answers_are_summed_over_runs() -> None:
    scheduler = SimpleNamespace(step=lambda answer, timestep, sample: answer)
    answers = torch.randn(2, 3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    made = scheduler.step
    with guided_answers(scheduler) as heard:
        for run in answers:
            for number, time in enumerate((900, 500, 100)):
                assert torch.equal(scheduler.step(run[number], torch.tensor(time), None), run[number])
    assert scheduler.step is made and len(heard.runs) == 2
    flat = answers.flatten(2).double()
    assert np.allclose(heard.gram([900.0, 500.0, 100.0]), (flat @ flat.transpose(1, 2)).sum(0).numpy())
    assert heard.gram([900.0, 450.0]) is None
