"""A quantized folder says what it was made from, and evaluation takes that where no reference is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import reelquant
from reelquant import CheckpointError
from reelquant.cli import app
from reelquant.evidence import run, speed
from reelquant.models.origin import float_original, origin_of, recorded, written_down
from reelquant.models.pipelines import bundled_path
from tests.tiny.stock import room, stored_pipeline, wan_pipeline


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return stored_pipeline(tmp_path / "wan")


def quantized(source: Path, out: Path, *, report: bool = True) -> Any:
    pipe = reelquant.open_pipeline(source)
    made = reelquant.quantize(pipe, "w8a16")
    reelquant.save(pipe, out, made if report else None)
    return pipe


def test_a_place_is_written_down_so_that_it_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert written_down("model") == str((tmp_path / "model").resolve())
    assert written_down("owner/name") == "owner/name"
    assert written_down("tiny-dit") == written_down(bundled_path("tiny-dit")) == "tiny-dit"


def test_all_ways_to_a_folder_record_the_source(source: Path, tmp_path: Path) -> None:
    pipe = quantized(source, tmp_path / "in-memory")
    reelquant.quantize_folder(source, tmp_path / "streamed", "w8a16", max_memory=room())
    reelquant.save(pipe, tmp_path / "no-report")
    reelquant.save(reelquant.open_pipeline(tmp_path / "in-memory"), tmp_path / "again")
    for name in ("in-memory", "streamed", "no-report", "again"):
        assert recorded(tmp_path / name) == float_original(tmp_path / name) == str(source.resolve()), name
        reelquant.verify(tmp_path / name)
    assert set(json.loads((tmp_path / "no-report" / "report.json").read_text())) == {"source", "sha256"}
    assert origin_of(pipe) == str(source.resolve())


def test_a_float_pipeline_is_saved_without_a_report(source: Path, tmp_path: Path) -> None:
    reelquant.save(reelquant.open_pipeline(source), tmp_path / "float")
    assert not (tmp_path / "float" / "report.json").exists()


def test_the_reference_of_an_evaluation_is_the_recorded_one(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = quantized(source, tmp_path / "out", report=False)
    seen: list[Any] = []
    monkeypatch.setattr(run, "evaluate", lambda test, reference, *_, **__: seen.append(reference))
    monkeypatch.setattr(speed, "benchmark", lambda test, reference, **_: seen.append(reference))
    reelquant.evaluate(tmp_path / "out")
    reelquant.evaluate(pipe)
    reelquant.benchmark(tmp_path / "out")
    reelquant.evaluate(tmp_path / "out", "owner/name")
    assert seen == [*[str(source.resolve())] * 3, "owner/name"]


def test_a_folder_that_names_its_source_alone_is_evaluated(source: Path, tmp_path: Path) -> None:
    quantized(source, tmp_path / "out", report=False)
    made = reelquant.evaluate(tmp_path / "out", clips=1, metrics="psnr", floor=["none"], num_inference_steps=1)
    assert made["psnr"] > 20
    assert made.data["reference"]["name"] == "wan" and made.data["quantization"] is None
    words = ["evaluate", tmp_path / "out", "-o", tmp_path / "proof", "-n", 1, "-m", "psnr", "--floor", "none", "--steps", 1, "--json"]
    told = CliRunner().invoke(app, [str(word) for word in words])
    assert told.exit_code == 0 and json.loads(told.stdout)["psnr"] == made["psnr"], told.output


def test_a_source_that_is_gone_or_was_never_known_is_said_to_be(source: Path, tmp_path: Path) -> None:
    quantized(source, tmp_path / "out")
    shutil.rmtree(source)
    for verb in (reelquant.evaluate, reelquant.benchmark):
        with pytest.raises(CheckpointError, match=r"quantized from is not at '.*wan' any more; name the float pipeline: reference="):
            verb(tmp_path / "out")
    for verb in ("evaluate", "benchmark"):
        said = CliRunner().invoke(app, [verb, str(tmp_path / "out")])
        assert said.exit_code and "--reference" in said.stderr
    with pytest.raises(CheckpointError, match=r"nothing says what 'WanPipeline' was quantized from"):
        reelquant.evaluate(wan_pipeline())
    (tmp_path / "out" / "report.json").unlink()
    with pytest.raises(CheckpointError, match=r"nothing says what '.*out' was quantized from \(no 'source' in a report.json\)"):
        reelquant.evaluate(tmp_path / "out")
