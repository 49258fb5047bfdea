"""Wishes that a pipeline does not follow to the letter are said by every verb, and stand in every report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import reelquant
from reelquant import _remarks
from reelquant.cli import app, console
from reelquant.models.sampling import sample
from tests.tiny.stock import PROMPTS, room, stored_pipeline, wan_pipeline

RECIPE = {
    "name": "test",
    "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": {"format": "uint8"}},
    "calibrate": {"prompts": 1, "steps": 2, "probes": 0},
}
FOUR = {"num_frames": 4, "height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": 8}
"""The VAE makes an odd number of frames."""
ROUNDED, MADE = "WanPipeline: `num_frames - 1` has to be divisible by 2", "asked for num_frames=4 and made 5"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process, in which nothing was said yet."""
    monkeypatch.setattr(_remarks, "_logged", set())
    for name, value in console.QUIET.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_pipeline(tmp_path_factory.mktemp("remarks") / "wan")


def test_frames_are_rounded_during_calibration(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of latents nobody can tell the size of the clip, so the pipeline's own words are passed on."""
    pipe = wan_pipeline()
    in_memory = reelquant.quantize(pipe, RECIPE, PROMPTS, **FOUR)
    on_disk = reelquant.quantize_folder(folder, tmp_path / "out", RECIPE, PROMPTS, max_memory=room(), **FOUR)
    for report in (in_memory, on_disk):
        (told,) = [sentence for sentence in report.warnings if sentence.startswith(ROUNDED)]
    assert [record.getMessage() for record in caplog.records if ROUNDED in record.getMessage()] == [told]
    as_wished = reelquant.quantize(wan_pipeline(), RECIPE, PROMPTS, **FOUR | {"num_frames": 5})
    assert "num_frames" not in str(as_wished.warnings)


def test_a_level_of_diffusers_is_left_as_it_was() -> None:
    import logging

    pipe, own = wan_pipeline(), logging.getLogger("diffusers.pipelines.wan.pipeline_wan")
    own.setLevel(logging.ERROR)
    try:
        with _remarks.remarks() as told:
            sample(pipe, PROMPTS[:1], output="latent", **FOUR)
        assert len(told) == 1 and (own.level, own.propagate, own.handlers) == (logging.ERROR, True, [])
    finally:
        own.setLevel(logging.NOTSET)


def test_the_verbs_say_it(folder: Path, tmp_path: Path) -> None:
    short = ("--frames", "4", "--steps", "1")
    generated = invoke("generate", folder, "-p", "a red ball", "-o", tmp_path / "a.mp4", *short)
    assert MADE in generated.stderr and "5 frames" in generated.stdout
    _remarks._logged.clear()
    pipe = reelquant.open_pipeline(folder)
    reelquant.quantize(pipe, "w8a16")
    made = reelquant.save(pipe, tmp_path / "same")
    words = ("evaluate", made, "--reference", folder, "-n", 1, "-m", "psnr", "--floor", "none", "-o", tmp_path / "proof", *short)
    evaluated = invoke(*words)
    assert MADE in evaluated.stderr
    assert MADE in (tmp_path / "proof" / "report.json").read_text()


def invoke(*words: object) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def test_remarks_reach_all_who_listen() -> None:
    with _remarks.remarks() as outer, _remarks.remarks() as inner:
        _remarks.remark("a")
        _remarks.remark("a")
    _remarks.remark("b")
    assert outer == inner == ["a"]
