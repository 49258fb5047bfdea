"""What the page shows: plans, evaluations, comparisons and their votes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reelquant._errors import CheckpointError
from reelquant.serve import evaluations, plan
from reelquant.serve.comparisons import Comparisons, sign_test
from reelquant.serve.folder import Folder
from tests.unit.serve.models import evaluation

ONE, TWO, THREE = (f"2026010112000{n}000000-0123abcd" for n in range(3))
LAYER = {"name": "a", "role": "main", "skipped": None, "weight": "int8 channel", "input": None, "bytes_before": 4000, "bytes_after": 1000}
PART = {"recipe": "w8a16", "denoiser": "Wan", "quantized": 1, "skipped": 1, "bytes_before": 4000, "bytes_after": 1000, "stages": []}
TAKES = {"streams": False, "memory": 1, "in_memory": 6e8, "budget": 2e9, "result": 7e6, "source": 1.1e7, "seconds": 0.2, "calls": 700}


def test_a_plan_has_figures_and_a_row_for_each_layer() -> None:
    stays = LAYER | {"name": "b", "skipped": "first and last layer stay float", "bytes_after": 4000}
    [found] = plan.parts(PART | {"layers": [LAYER, stays], "estimate": TAKES})
    assert found.tiles == [
        ("Layers", "1 of 2", "become quantized"),
        ("Their size", "4 kB → 1 kB", "4.00x smaller than float32"),
        ("Memory", "600 MB", "of 2 GB; the whole model fits"),
        ("Result", "7 MB", "the float folder has 11 MB"),
        ("Work", "700 calls", "of the model, and about 1 s of reading, rounding, writing"),
    ]
    assert found.layers == [
        ("a", "main", "int8 channel, input float", "4 kB", "1 kB", False),
        ("b", "main", "float: first and last layer stay float", "4 kB", "4 kB", True),
    ]


def test_the_plan_of_several_components_and_without_an_estimate() -> None:
    part = PART | {"layers": [LAYER]}
    found = plan.parts({"transformer": part, "vae": part})
    assert [one.name for one in found] == ["transformer", "vae"] and len(found[0].tiles) == 2
    assert not plan.resumable({"transformer": part}) and plan.resumable(part | {"estimate": TAKES})


def test_evaluations_show_their_verdict_whatever_their_fields_hold(tmp_path: Path) -> None:
    whole: dict[str, Any] = {
        "test": {"name": "/x/q", "recipe": "w8a16"},
        "reference": {"name": "tiny-dit"},
        "gate": {"preset": "default", "passed": False},
        "near_lossless": {"holds": False},
        "defects": [{"name": "frozen"}],
        "metrics": {"psnr": {"value": 51.23, "unit": "dB"}},
        "clips": 8,
        "created": "2026-01-02T03:04:05",
    }
    evaluation(tmp_path / "a", **whole)
    evaluation(tmp_path / "b", test=[1], gate="no", near_lossless={"holds": []}, metrics=None, defects={}, clips="x")
    (evaluation(tmp_path / "c") / "report.json").write_text("[")
    found = {row.name: row for row in evaluations.rows(Folder(tmp_path))}
    assert (found["a"].title, found["a"].tone, found["a"].verdict) == (
        "q against tiny-dit",
        "bad",
        "gate default failed, not near-lossless, frozen seen",
    )
    assert found["a"].figures == [("PSNR", "51.2 dB")] and found["a"].about == "8 clips · w8a16 · 2026-01-02 03:04"
    assert found["b"].verdict == found["c"].verdict == "no gate"


@pytest.mark.parametrize("name", ["../e", "/etc", "e/../e", "model", "linked", "nowhere", ""])
def test_reports_are_opened_within_the_folder_alone(tmp_path: Path, name: str) -> None:
    root = tmp_path / "served"
    evaluation(root / "e")
    (root / "model").mkdir()
    outside = evaluation(tmp_path / "e")
    evaluation(root / "linked")
    (root / "linked" / "report.html").unlink()
    (root / "linked" / "report.html").symlink_to(outside / "report.html")
    assert evaluations.report(Folder(root), "e") == root / "e" / "report.html"
    with pytest.raises(CheckpointError):
        evaluations.report(Folder(root), name)


@pytest.fixture
def made(tmp_path: Path) -> Comparisons:
    found = Comparisons(Folder(tmp_path))
    for number, quantized in ((ONE, "./q"), (TWO, "./q"), (THREE, "./other")):
        found.begin(number, {"float": "tiny-dit", "quantized": quantized, "prompt": "x", "seed": 0})
        (found.root / number / "float-000.png").write_bytes(b"png")
    return found


def test_votes_are_counted_over_all_clips_of_the_same_two_models(made: Comparisons) -> None:
    made.vote(ONE, "float")
    made.vote(ONE, "same")
    made.vote(THREE, "quantized")
    assert made.vote(TWO, "float") == {"float": 2, "quantized": 0, "same": 1, "chance": 0.5}
    assert made.shown(THREE)["tally"] == {"float": 0, "quantized": 1, "same": 0, "chance": 1.0}
    assert list(made.all()) == [THREE, TWO, ONE] and made.shown(ONE)["frames"] == 1
    for picked in ("left", None, ["float"]):
        with pytest.raises(CheckpointError):
            made.vote(ONE, picked)


def test_a_file_of_votes_that_holds_something_else_counts_nothing(made: Comparisons) -> None:
    (made.root / ONE / "votes.json").write_text(json.dumps({"votes": ["float", "x", 1, None]}))
    assert made.shown(ONE)["tally"]["float"] == 1


@pytest.mark.parametrize("number", ["..", "../../etc", "20260101120009000000-0123abcd", "", ONE + "/.."])
def test_comparisons_are_found_by_their_numbers_alone(made: Comparisons, number: str) -> None:
    with pytest.raises(CheckpointError):
        made.shown(number)


def test_frames_behind_links_are_not_opened(made: Comparisons, tmp_path: Path) -> None:
    assert made.frame(ONE, "float", 0).read_bytes() == b"png"
    (tmp_path / "secret").write_bytes(b"secret")
    (made.root / ONE / "float-001.png").symlink_to(tmp_path / "secret")
    for side, position in (("float", 1), ("float", 2), ("float", -1), ("../float", 0)):
        with pytest.raises(CheckpointError):
            made.frame(ONE, side, position)
    (made.root / TWO).rename(tmp_path / "moved")
    (made.root / TWO).symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="link"):
        made.frame(TWO, "float", 0)


def test_the_sign_test() -> None:
    assert sign_test(0, 0) is None
    assert [sign_test(1, 0), sign_test(5, 0), sign_test(0, 5), sign_test(3, 3), sign_test(9, 1)] == [1.0, 0.0625, 0.0625, 1.0, 22 / 1024]
