"""What ``reelquant drop-blocks`` writes and prints, and how a run that was stopped goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from reelquant.cli import app
from reelquant.removal.distill import Distillation
from tests.tiny.stock import CALL
from tests.tiny.test_removal import longer

SHORT = [
    "--calls",
    "8",
    "--frames",
    str(CALL["num_frames"]),
    "--height",
    str(CALL["height"]),
    "--width",
    str(CALL["width"]),
    "--steps",
    "2",
]


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, ["drop-blocks", *map(str, words), *SHORT])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    longer(3).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red ball\na blue box\n")
    return tmp_path / "model"


def weights(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def test_the_folder_is_smaller_stock_and_says_what_is_gone(model: Path, tmp_path: Path) -> None:
    result = invoke(model, "-o", tmp_path / "less", "--blocks", "1", "--iterations", 3, "--prompts", tmp_path / "prompts.txt")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "block 1 of 3, counted from 0; num_layers is 2" in said and "of the output's variance on held-out calls" in said
    assert weights(tmp_path / "less").stat().st_size < 0.9 * weights(model).stat().st_size  # opened in float32, stored as narrow as it was
    assert {value.dtype for value in load_file(weights(tmp_path / "less")).values()} == {torch.bfloat16}
    opened = DiffusionPipeline.from_pretrained(tmp_path / "less")
    assert len(opened.transformer.blocks) == opened.transformer.config.num_layers == 2
    report = json.loads((tmp_path / "less" / "report.json").read_text())
    assert report["removal"]["blocks"] == [1] and report["bytes_folder"] < report["bytes_source"]
    assert not (tmp_path / "less.removal").exists()


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (model, "--iterations", 6, "--rate", 1e-3, "--prompts", tmp_path / "prompts.txt")
    whole = invoke(*words, "-o", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    monkeypatch.setattr("reelquant.removal.kept.EVERY", 2)
    own, done = Distillation.loss, []

    def stops(self: Distillation, *args: Any) -> Any:
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        return own(self, *args)

    monkeypatch.setattr(Distillation, "loss", stops)
    stopped = invoke(*words, "-o", tmp_path / "less")
    assert stopped.exit_code != 0 and not (tmp_path / "less").exists()
    assert "run the same command again to go on" in " ".join(stopped.output.split())
    monkeypatch.setattr("reelquant.removal.run.record", None)  # nothing is recorded again
    result = invoke(*words, "-o", tmp_path / "less")
    assert result.exit_code == 0, result.output
    assert len(done) == 4 + 4  # two iterations were kept
    assert weights(tmp_path / "less").read_bytes() == weights(tmp_path / "whole").read_bytes()


def test_another_wish_begins_again(model: Path, tmp_path: Path) -> None:
    work = tmp_path / "less.removal"
    work.mkdir()
    (work / "settings.json").write_text("{}")
    (work / "choice.json").write_text("[0]")
    result = invoke(model, "-o", tmp_path / "less", "--iterations", 0, "--prompts", tmp_path / "prompts.txt", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["removal"]["blocks"] != [0]  # the first block is the only one that changes much


@pytest.mark.parametrize(
    ("words", "said"), [(["--blocks", "one"], "--blocks takes numbers of blocks"), (["--count", "3"], "of 3 blocks 1 to 2")]
)
def test_wishes_that_make_no_sense_are_one_line(model: Path, tmp_path: Path, words: list[str], said: str) -> None:
    result = invoke(model, "-o", tmp_path / "less", *words)
    assert result.exit_code != 0 and (said in str(result.exception) or said in result.output)
