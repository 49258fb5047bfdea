from __future__ import annotations

from typing import Any

import pytest
import torch

from reelquant.engine.choice import Choice
from reelquant.engine.plan import Plan, make_plan
from reelquant.engine.search import candidates, choose, family, trial_count
from reelquant.formats.criteria import latent_psnr
from reelquant.recipes.recipe import load_recipe
from reelquant.sites import DenoiserMap, Group, Layer

POWERS = [0.0, 0.5, 1.0]


def plan(scope: str, steps: Any) -> Plan:
    model = torch.nn.ModuleDict(
        {
            "blocks": torch.nn.ModuleList(
                torch.nn.ModuleDict({"wide": torch.nn.Linear(4, 64), "slim": torch.nn.Linear(4, 4)}) for _ in range(2)
            )
        }
    )
    names = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("wide", "slim")]
    layers = {
        name: Layer(name, "Linear", "main", frozenset(), tuple(model.get_submodule(name).weight.shape), order=i)
        for i, name in enumerate(names)
    }
    map_ = DenoiserMap("Model", layers, tuple(Group((name,), "main") for name in names))
    recipe = {"name": "mine", "defaults": {"weight": {"format": "int8"}}, "steps": steps, "search": {"scope": scope}}
    return make_plan(load_recipe(recipe), map_, model)


CHOICE = [{"transform": "shift", "center": "mid"}, {"transform": "range_integrate", "power": POWERS}]


def power(choice: Choice) -> float:
    return POWERS[choice.picks[1]]


def test_families_are_names_up_to_block_numbers() -> None:
    found = plan("model", CHOICE)
    assert {family(group) for group in found.map.groups} == {"blocks.*.wide", "blocks.*.slim"}


def test_candidates_are_all_combinations() -> None:
    steps = [{"transform": "shift", "center": ["mid", "mean"]}, {"transform": "range_integrate", "power": POWERS}, {"solve": "nearest"}]
    planned = plan("model", steps)
    named = [choice.named(planned.entries) for choice in candidates(planned)]
    pairs = {(one["shift.center"], one["range_integrate.power"]) for one in named}
    assert len(named) == 6 and pairs == {(center, power) for center in ("mid", "mean") for power in POWERS}


def test_the_best_trajectory_wins_for_all() -> None:
    found = plan("model", CHOICE)
    seen: list[dict[str, float]] = []

    def evaluate(assignments: Any) -> list[float]:
        tried = [{name: power(options) for name, options in one.items()} for one in assignments]
        seen.extend(tried)
        return [-abs(one["blocks.*.wide"] - 0.5) for one in tried]

    assignment, trials = choose(found, found.map.groups, evaluate)
    assert {name: power(options) for name, options in assignment.items()} == {"blocks.*.wide": 0.5, "blocks.*.slim": 0.5}
    assert len(trials) == len(seen) == trial_count(found, found.map.groups) == 3
    assert trials[1].options == {"shift.center": "mid", "range_integrate.power": 0.5} and trials[1].psnr == 0


def test_families_are_refined_widest_first() -> None:
    found = plan("family", CHOICE)
    told = []

    def evaluate(assignments: Any) -> list[float]:
        return [-abs(power(one["blocks.*.wide"]) - 1.0) - 0.1 * abs(power(one["blocks.*.slim"]) - 0.0) for one in assignments]

    assignment, trials = choose(found, found.map.groups, evaluate, told.append)
    assert power(assignment["blocks.*.wide"]) == 1.0 and power(assignment["blocks.*.slim"]) == 0.0
    assert [trial.family for trial in trials] == ["all"] * 3 + ["blocks.*.wide"] * 2 + ["blocks.*.slim"] * 2 and told == trials
    assert trial_count(found, found.map.groups) == 3 + 2 * 2


def test_nothing_open_samples_nothing() -> None:
    found = plan("family", [{"transform": "shift"}])

    def evaluate(assignments: Any) -> list[float]:
        raise AssertionError

    assignment, trials = choose(found, found.map.groups, evaluate)
    assert trials == [] and trial_count(found, found.map.groups) == 0 and set(assignment) == {"blocks.*.wide", "blocks.*.slim"}


def test_latent_psnr_by_hand() -> None:
    reference = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    # peak 1; errors 0.01 and 0.0001 in the mean square: 20 and 40 dB
    assert latent_psnr(reference, reference + torch.tensor([[0.1], [0.01]])) == pytest.approx(30, abs=1e-3)
    assert latent_psnr(reference, reference) == pytest.approx(200)  # a perfect clip counts 200, so that means stay finite
    broken = reference.clone()
    broken[0, 0] = torch.nan
    assert latent_psnr(reference, broken) == pytest.approx((200 - 100) / 2)
    assert latent_psnr(reference, torch.full_like(reference, torch.inf)) == -100
