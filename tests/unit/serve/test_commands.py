"""The words of a job: values of a form stay values, whatever they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from reelquant._errors import ReelQuantError
from reelquant.cli import app
from reelquant.serve import commands
from reelquant.serve.folder import Folder
from tests.unit.serve.models import pipeline

NUMBER = "20260101120000000000-0123abcd"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    pipeline(tmp_path / "my model")
    pipeline(tmp_path / "q", recipe="w8a16", source="tiny-dit")
    return Folder(tmp_path)


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command line makes of the words."""
    verbs: Any = typer.main.get_command(app)
    verb = verbs.commands[words[0]]
    return verb.make_context(words[0], list(words[1:])).params


def test_quantize_gets_the_form_and_a_name_of_its_own(folder: Folder) -> None:
    form = {"model": "./my model", "recipe": "w8a16", "name": "", "max_memory": "1.5 GB", "device": "cpu", "dtype": "bfloat16"}
    work = commands.quantize(folder, form | {"resumable": True})
    found = parsed(work.commands[0])
    assert work.output == "my-model-w8a16" and work.title == "my model with w8a16"
    assert (found["model"], found["recipe"], str(found["output"]), found["max_memory"]) == (
        "./my model",
        ["w8a16"],
        "my-model-w8a16",
        "1.5 GB",
    )
    assert found["resume"] and found["json"] and found["dtype"] == "bfloat16" and not found["force"]
    assert parsed(commands.plan(folder, form))["dry_run"]


def test_compare_makes_both_clips_from_the_same_noise(folder: Folder) -> None:
    form = {"float": "tiny-dit", "quantized": "./q", "prompt": "--output=/etc/x", "seed": "7", "steps": "", "number": NUMBER}
    work = commands.compare(folder, form)
    first, second = (parsed(words) for words in work.commands)
    assert (first["model"], second["model"]) == ("tiny-dit", "./q")
    assert first["prompt"] == second["prompt"] == "--output=/etc/x" and first["seed"] == second["seed"] == 7
    assert [one["output"].parent for one in (first, second)] == [Path(".reelquant/comparisons") / NUMBER] * 2


def test_evaluate_takes_networks_from_the_folder_alone(folder: Folder) -> None:
    form = {"float": "tiny-dit", "quantized": "./q", "clips": 2, "steps": "3", "gate": "", "metrics": "default"}
    assert parsed(commands.evaluate(folder, form).commands[0])["weights"] is None
    (folder.root / "weights").mkdir()
    found = parsed(commands.evaluate(folder, form).commands[0])
    assert str(found["weights"]) == "weights" and (found["clips"], found["steps"], found["gate"]) == (2, 3, None)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "owner/name"},
        {"model": "../x"},
        {"model": "./q"},
        {"model": "--help"},
        {"recipe": "/etc/x.yaml"},
        {"recipe": "nonsense"},
        {"name": "../out"},
        {"name": "q"},
        {"device": "cpu --force"},
        {"dtype": "int8"},
        {"max_memory": "all"},
    ],
)
def test_values_that_are_not_offered_are_refused(folder: Folder, change: dict[str, str]) -> None:
    form = {"model": "./my model", "recipe": "w8a16", "name": "", "max_memory": "", "device": "cpu", "dtype": "float32"}
    commands.quantize(folder, form)
    with pytest.raises(ReelQuantError):
        commands.quantize(folder, form | change)


@pytest.mark.parametrize(
    "change", [{"seed": "1.5"}, {"seed": "x"}, {"steps": "-1"}, {"steps": "nan"}, {"number": "../x"}, {"quantized": "tiny-dit"}]
)
def test_comparisons_that_cannot_be_made_are_refused(folder: Folder, change: dict[str, str]) -> None:
    form = {"float": "tiny-dit", "quantized": "./q", "prompt": "x", "seed": 0, "steps": "", "number": NUMBER}
    commands.compare(folder, form)
    with pytest.raises(ReelQuantError):
        commands.compare(folder, form | change)
