"""From rows to verdicts: means beside their floor, what counts as near-lossless, warnings, and the written schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reelquant.evidence import evaluation
from reelquant.evidence.evaluation import Sets, results
from reelquant.evidence.store import Store


def sets(tmp_path: Path, **values: dict[str, list[float]]) -> Sets:
    """Variants with given figures, a list of one per clip: ``test={"psnr": [30, 31]}``."""
    store = Store(tmp_path)
    names: dict[str, list[str]] = {}
    for variant, figures in values.items():
        count = max((len(one) for one in figures.values()), default=2)
        names[variant] = [f"{i:04d}" for i in range(count)]
        for i, name in enumerate(names[variant]):
            store.add(variant, {"name": name, "sources": [], "figures": {key: one[i] for key, one in figures.items()}, "curves": {}})
    return Sets(store, names)


@pytest.mark.parametrize(
    ("metric", "floor", "test", "within"),
    [
        ("psnr", [50.0, 52.0], [50.5, 50.5], True),
        ("psnr", [50.0, 52.0], [49.0, 49.5], False),
        ("color_shift", [0.1, 0.3], [0.2, 0.2], True),
        ("color_shift", [0.1, 0.3], [0.4, 0.4], False),
        ("motion_deviation", [-0.02, 0.01], [0.015, 0.015], True),
        ("motion_deviation", [-0.02, 0.01], [-0.03, -0.03], False),
        ("tempo", [0.99, 1.0], [1.005, 1.005], True),
        ("tempo", [0.99, 1.0], [0.9, 0.9], False),
        ("motion_energy", [1.0, 2.0], [5.0, 5.0], None),
    ],
)
def test_a_figure_is_within_the_floor_if_it_is_no_worse_than_the_far_end_of_its_interval(
    tmp_path: Path, metric: str, floor: list[float], test: list[float], within: bool | None
) -> None:
    found = results(sets(tmp_path, reference={}, test={metric: test}, bf16={metric: floor}), [metric], {})
    assert found[metric].within_floor is within
    assert (found[metric].to_json()["floor_limit"] is None) == (within is None)
    assert found[metric].floor["bf16"].mean == pytest.approx(sum(floor) / 2)


@pytest.mark.parametrize(
    ("metric", "floor", "words"),
    [
        ("psnr", [50.0, 52.0], "at least 50.0"),
        ("checkerboard_deviation", [-0.0013, 0.0017], "from -0.002 to 0.002"),
        ("tempo", [0.97, 1.0], "from 0.97 to 1.03"),
        ("dropped", [0.0, 0.0], "at most 0.000"),
    ],
)
def test_the_limit_of_the_floor_is_told_with_enough_digits(tmp_path: Path, metric: str, floor: list[float], words: str) -> None:
    found = results(sets(tmp_path, reference={}, test={metric: [1.0, 1.0]}, bf16={metric: floor}), [metric], {})
    assert found[metric].to_json()["floor_limit"] == words


def test_near_lossless_needs_every_figure_and_a_floor(tmp_path: Path) -> None:
    both = {"psnr": [50.0, 50.0], "color_shift": [0.1, 0.1]}
    good = results(sets(tmp_path / "a", reference={}, test=both, bf16=both), list(both), {})
    assert evaluation.near_lossless(good)["holds"] is True  # type: ignore[index]
    worse = results(sets(tmp_path / "b", reference={}, test=both | {"color_shift": [1.0, 1.0]}, bf16=both), list(both), {})
    assert evaluation.near_lossless(worse) == {
        "holds": False, "failed": ["color_shift"], "judged": ["psnr", "color_shift"], "why": "outside the noise floor: Colour shift",
    }  # fmt: skip
    assert evaluation.near_lossless(results(sets(tmp_path / "c", reference={}, test=both), list(both), {})) is None


def test_distances_are_held_against_the_same_noise_and_those_to_data_against_another_draw(tmp_path: Path) -> None:
    found = sets(tmp_path, reference={}, test={}, reseed={}, bf16={}, data={})
    generator = torch.Generator().manual_seed(0)
    for shift, variant in enumerate(("reference", "bf16", "test", "reseed", "data")):
        for i in range(2):
            value = torch.full((1, 4), float(i)) + 0.1 * shift + 0.001 * torch.rand(1, 4, generator=generator)
            found.store.put("i3d", variant, f"{i:04d}", value)
    both = results(found, ["fvd", "fvd_data"], {})
    fvd = both["fvd"]
    assert set(fvd.floor) == {"bf16", "reseed"}
    assert fvd.interval is not None and fvd.interval.mean == pytest.approx(4 * 0.2**2, rel=0.05)
    assert fvd.within_floor is False  # 0.16 is less than the 0.36 of other noise, and more than bf16's 0.04
    assert both["fvd_data"].within_floor is False  # 0.16 to data, another draw 0.04
    assert both["fvd_data"].reference == pytest.approx(4 * 0.4**2, rel=0.05)
    assert "FVD of 2 clips" in evaluation.warnings({"fvd": fvd}, found)[0]


def test_missing_metrics_stay_in_the_table_with_the_reason(tmp_path: Path) -> None:
    found = results(sets(tmp_path, reference={}, test={"psnr": [1.0]}), ["psnr", "fvd", "ssim"], {"fvd": "needs the weights 'i3d'"})
    assert list(found) == ["psnr", "fvd", "ssim"]
    assert found["fvd"].missing == "needs the weights 'i3d'"
    assert found["ssim"].missing == "no clip gives this figure"
    assert found["fvd"].to_json()["value"] is None
    json.dumps([one.to_json() for one in found.values()])


def test_the_trajectory_is_the_mean_of_the_curves_of_the_clips_that_have_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for i, curve in enumerate(([0.1, 0.2], [0.3, 0.4])):
        store.add("test", {"name": f"{i:04d}", "sources": [], "figures": {}, "curves": {"latent_error": curve}})
    store.add("test", {"name": "0002", "sources": [], "figures": {}, "curves": {}})
    made = evaluation.trajectory(Sets(store, {"reference": [], "test": ["0000", "0001", "0002"]}))
    assert made is not None
    assert (made["steps"], made["clips"], made["test"]["mean"]) == ([1, 2], 2, pytest.approx([0.2, 0.3]))
