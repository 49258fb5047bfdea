"""Evaluating a quantized bundled pipeline end to end, at few steps: what is written, resumed, refused, and caught."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import reelquant
from reelquant import CalibrationError, CheckpointError, RecipeError, UnsupportedError
from reelquant.cli import app
from reelquant.evidence import defects, media
from reelquant.evidence import store as evidence_store
from reelquant.evidence.clips import find_clips
from reelquant.evidence.distribution import frechet
from reelquant.evidence.machine import multiplies_bf16
from reelquant.evidence.networks import weights as published
from reelquant.models.shapes import random_clip

CALL = {"num_inference_steps": 3, "num_frames": 5}
FLOOR = "bf16" if multiplies_bf16("cpu") else "rounded"
SAME = {"clips": 2, "metrics": "quick", "batch": 1}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny-dit`` with int8 weights, in a folder."""
    folder = tmp_path_factory.mktemp("evaluate") / "out"
    pipe = reelquant.open_pipeline("tiny-dit")
    report = reelquant.quantize(pipe, "w8a16")
    return reelquant.save(pipe, folder, report)


@pytest.fixture(scope="module")
def evaluated(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One evaluation with a floor, kept."""
    output = tmp_path_factory.mktemp("proof") / "proof"
    return reelquant.evaluate(quantized, "tiny-dit", output=output, gate="default", **SAME, **CALL)


def test_figures_stand_beside_the_floor_and_the_gate_passes(evaluated: Any) -> None:
    assert evaluated["psnr"] > 35
    assert set(evaluated.metrics["psnr"].floor) == {FLOOR}
    assert evaluated.data["floors"][FLOOR].startswith("the float pipeline again")
    assert evaluated.passed
    assert evaluated.near_lossless is evaluated.data["near_lossless"]["holds"]
    assert evaluated.data["test"]["recipe"] == "w8a16"
    assert evaluated.data["quantization"]["simulated"] is False  # float products are what the recipe asks for
    assert evaluated.metrics["judge"].interval is not None  # captions of the bundled world


def test_everything_is_written(evaluated: Any) -> None:
    folder = evaluated.folder
    assert {one.name for one in folder.iterdir()} >= {"clips", "report.html", "report.json", "summary.md", "run.json"}
    assert json.loads((folder / "report.json").read_text())["schema"] == 1
    assert {name: list(find_clips(folder / "clips" / name)) for name in ("reference", "test", FLOOR)} == {
        name: ["0000", "0001"] for name in ("reference", "test", FLOOR)
    }
    assert "PSNR" in (folder / "summary.md").read_text()


def test_the_trajectory_shows_where_clips_part(evaluated: Any) -> None:
    course = evaluated.data["trajectory"]
    assert course["steps"] == [1, 2, 3]
    assert 0 < course["test"]["mean"][0] < course["test"]["mean"][-1] < 0.2
    assert evaluated["latent_error"] == pytest.approx(course["test"]["mean"][-1])


def test_a_run_that_was_stopped_gives_the_same_figures(
    evaluated: Any, quantized: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped after the first clip of the quantized pipeline; the second run makes the rest only."""
    made: list[str] = []
    write = media.write_video

    def stopping(clip: torch.Tensor, path: Path, *args: Any, **options: Any) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(f"{path.parent.name}/{path.stem.removeprefix('.writing-')}")
        return write(clip, path, *args, **options)

    monkeypatch.setattr(evidence_store, "write_video", stopping)
    with pytest.raises(KeyboardInterrupt):
        reelquant.evaluate(quantized, "tiny-dit", output=tmp_path / "o", **SAME, **CALL)
    assert made == ["reference/0000", "reference/0001", "test/0000"]
    monkeypatch.setattr(evidence_store, "write_video", lambda *args, **options: made.append(args[1].parent.name) or write(*args, **options))
    again = reelquant.evaluate(quantized, "tiny-dit", output=tmp_path / "o", resume=True, **SAME, **CALL)
    assert made[3:] == ["test", FLOOR, FLOOR]
    assert {name: one.interval for name, one in again.metrics.items()} == {name: one.interval for name, one in evaluated.metrics.items()}


def test_float_clips_of_another_evaluation_are_reused(
    evaluated: Any, quantized: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []
    write = media.write_video
    monkeypatch.setattr(evidence_store, "write_video", lambda *args, **options: made.append(args[1].parent.name) or write(*args, **options))
    words = ["evaluate", quantized, "--reference", "tiny-dit", "-n", 2, "-m", "quick", "--steps", 3, "--frames", 5, "--batch", 1]
    result = CliRunner().invoke(app, [str(word) for word in (*words, "-o", tmp_path / "o", "--reuse", evaluated.folder, "--json")])
    assert result.exit_code == 0, result.output
    assert made == ["test", "test"]
    assert json.loads(result.stdout)["metrics"]["psnr"]["value"] == pytest.approx(evaluated["psnr"])
    other = CliRunner().invoke(app, [str(word) for word in (*words, "--seed", 1, "-o", tmp_path / "p", "--reuse", evaluated.folder)])
    assert other.exit_code == 1
    assert "seeds is" in other.stderr


def test_several_tests_share_float_clips_and_a_page_and_go_on_where_they_stopped(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []
    write = media.write_video

    def counting(clip: torch.Tensor, path: Path, *args: Any, **options: Any) -> Any:
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(f"{path.parent.parent.parent.name}/{path.parent.name}")
        return write(clip, path, *args, **options)

    monkeypatch.setattr(evidence_store, "write_video", counting)
    other = Path(shutil.copytree(quantized, tmp_path / "copy"))
    words = ["evaluate", quantized, other, "-n", 2, "-m", "psnr,motion_deviation", "--steps", 2, "--frames", 5, "--batch", 1]
    words += ["--gate", "default", "-o", tmp_path / "o", "--json"]
    invoke = lambda *more: CliRunner().invoke(app, [str(word) for word in (*words, *more)])  # noqa: E731
    assert invoke().exit_code == 130  # in the middle of the first test's floor
    made.clear()
    assert invoke().exit_code == 1  # neither --resume nor --force
    monkeypatch.setattr(evidence_store, "write_video", lambda *args, **options: made.append(str(args[1])) or write(*args, **options))
    result = invoke("--resume")
    assert result.exit_code == 0, result.output
    assert [Path(place).parent.relative_to(tmp_path / "o") for place in made] == [
        Path("out/clips") / FLOOR, Path("copy/clips/test"), Path("copy/clips/test"),
    ]  # fmt: skip
    document = json.loads(result.stdout)
    assert document["figures"]["out"] == document["figures"]["copy"]  # the same weights
    assert {one.name for one in (tmp_path / "o").iterdir()} == {"out", "copy", "several.json", "report.html", "report.json", "summary.md"}
    assert "2 quantized pipelines against tiny-dit" in (tmp_path / "o" / "report.html").read_text()
    assert "about" in result.stderr and "in all" in result.stderr


@pytest.mark.parametrize(
    ("tests", "says"),
    [(["OUT"], "at least two"), (["OUT", "OUT"], "given twice"), (["OUT", "tiny-dit"], "holds no quantized layer")],
)
def test_tests_that_make_no_page_are_refused_before_sampling(
    tests: list[str], says: str, quantized: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("reelquant.evidence.sampling.open_pipeline", lambda *_, **__: pytest.fail("a pipeline was opened"))
    with pytest.raises(reelquant.ReelQuantError, match=says):
        reelquant.evaluate_several([str(quantized) if one == "OUT" else one for one in tests], "tiny-dit", output=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_resumed_run_of_another_pipeline_is_refused(evaluated: Any, quantized: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(quantized, tmp_path / "other"))
    os.utime(other / "model_index.json", (0, 0))  # written at another time
    with pytest.raises(CheckpointError, match="test was"):
        reelquant.evaluate(other, "tiny-dit", output=evaluated.folder, resume=True, **SAME, **CALL)


def test_pipelines_in_memory_and_nothing_kept(quantized: Path) -> None:
    pipe = reelquant.open_pipeline("tiny-dit")
    made = reelquant.evaluate(pipe, pipe, "a small red star spinning", clips=1, metrics="image,motion", floor=["none"], **CALL)
    assert made.folder is None
    assert (made["psnr"], made["ssim"], made["motion_deviation"]) == (100.0, 1.0, 0.0)
    assert made.near_lossless is None
    assert made["length_deviation"] == 0


def test_fail_under_ends_with_code_1_and_a_sentence(quantized: Path, tmp_path: Path) -> None:
    words = ["evaluate", quantized, "--reference", "tiny-dit", "-n", 1, "-m", "psnr,ssim", "--steps", 2, "--frames", 5, "--floor", "none"]
    limits = ["--fail-under", "psnr=99", "--fail-under", "ssim=0.5", "--fail-under", "fvd_data=5"]
    result = CliRunner().invoke(app, [str(word) for word in (*words, "-o", tmp_path / "o", *limits)])
    assert result.exit_code == 1
    assert "PSNR is" in result.stderr and "misses the limit (at least 99)" in result.stderr
    assert "FVD to data was not measured: needs" in result.stderr
    assert "SSIM" not in result.stderr
    assert (tmp_path / "o" / "report.html").is_file()


def test_quantize_can_end_with_a_gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules["reelquant.cli.request"], "GATE_CLIPS", 2)
    words = ["quantize", "tiny-dit", "--steps", "2", "-o"]
    good = CliRunner().invoke(app, [*words, str(tmp_path / "good"), "-r", "w8a16", "--gate", "default", "--json"])
    assert good.exit_code == 0, good.output
    gate = json.loads(good.stdout)["evaluation"]["gate"]
    assert {check["metric"] for check in gate.pop("checks") if check["passed"]} >= {"psnr", "ssim", "defects"}
    assert gate == {"preset": "default", "passed": True, "failures": [], "skipped": ["lpips_alex"]}
    bad = CliRunner().invoke(
        app, [*words, str(tmp_path / "bad"), "-r", "w4a16", "--set", "defaults.weight.format=int2", "--gate", "strict"]
    )
    assert bad.exit_code == 1
    assert "reelquant: gate strict: PSNR is" in bad.stderr
    assert (tmp_path / "bad" / "model_index.json").is_file()  # what was quantized is kept


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"floor": ["bf17"]}, RecipeError, "did you mean 'bf16'"),
        ({"floor": ["float32"]}, UnsupportedError, "runs in float32 itself"),
        ({"metrics": "fdv"}, RecipeError, "did you mean 'fvd'"),
        ({"gate": "strickt"}, RecipeError, "did you mean 'strict'"),
        ({"clips": 0}, RecipeError, "at least 1"),
        ({"prompts": []}, CalibrationError, "no prompts"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_sampling(changes: dict[str, Any], kind: type, says: str) -> None:
    with pytest.raises(kind, match=says):
        reelquant.evaluate("tiny-dit", "tiny-dit", **({"clips": 1} | changes))


def test_nan_stops_the_run_at_the_first_step_with_its_place(quantized: Path) -> None:
    pipe = reelquant.open_pipeline("tiny-dit")
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"latents of clip 'quantized, clips 0 to 0' after step 0: .*NaN"):
        reelquant.evaluate(pipe, "tiny-dit", clips=1, metrics="quick", floor=["none"], batch=1, **CALL)


def test_a_clip_of_one_colour_stops_the_run_when_the_reference_shows_something() -> None:
    pipe = reelquant.open_pipeline("tiny-dit")
    with torch.no_grad():
        for parameter in pipe.vae.decoder.parameters():
            parameter.zero_()
    with pytest.raises(CalibrationError, match="constant"):
        reelquant.evaluate(pipe, "tiny-dit", clips=1, metrics="quick", floor=["none"], batch=1, **CALL)


@pytest.mark.parametrize("how", ["gone", "damaged", "file"])
def test_counts_of_what_is_clipped_that_are_lost_are_made_again(tmp_path: Path, how: str) -> None:
    pipe = reelquant.open_pipeline("tiny-dit")
    reelquant.quantize(
        pipe, "minmax-w8a8", ["a red circle"], num_inference_steps=1, overrides={"calibrate.steps": 1, "calibrate.prompts": 1}
    )
    folder = reelquant.save(pipe, tmp_path / "q")
    options: dict[str, Any] = dict(clips=2, metrics="psnr", floor=["none"], batch=1, output=tmp_path / "o", **CALL)
    before = reelquant.evaluate(folder, "tiny-dit", **options).data["saturation"]
    rows = tmp_path / "o" / "saturation" / "test.jsonl"
    first, second = rows.read_text().splitlines(keepends=True)
    if how == "file":
        rows.unlink()
    else:
        rows.write_text(first + (second.replace("1", "2") if how == "damaged" else ""))
    assert before["layers"] and reelquant.evaluate(folder, "tiny-dit", resume=True, **options).data["saturation"] == before


@pytest.mark.full
def test_grain_is_measured_against_steps(quantized: Path) -> None:
    made = reelquant.evaluate(quantized, "tiny-dit", clips=1, metrics="psnr", floor=["none"], grain_steps=(1, 2), num_frames=5)
    grain = made.data["grain_growth"]
    assert grain["steps"] == [1, 2]
    assert len(grain["reference"]) == len(grain["test"]) == 2
    assert all(value > 0 for value in grain["reference"] + grain["test"])


# ------------------------------------------------------------------------------------------------------------------------ compare


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that writes rendered clips, and the same with a defect planted in some, into two folders."""
    clips = {f"{i:02d}": random_clip(500 + i, frames=13)[0] for i in range(4)}

    def make(plant: str | None, only: tuple[str, ...] = ()) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp("folders")
        for name, clip in clips.items():
            media.write_video(clip, root / "reference" / f"{name}.mp4", lossless=True)
            changed = clip if plant is None or (only and name not in only) else defects.PLANT[plant](clip)
            media.write_video(changed, root / "test" / f"{name}.mp4", lossless=True)
        return root / "test", root / "reference"

    return make


def test_equal_folders_pass_the_strict_gate(folders: Any) -> None:
    made = reelquant.compare(*folders(None), metrics="image,motion", gate="strict")
    assert made.passed
    assert made["psnr"] == 100


@pytest.mark.parametrize("plant", ["slowed_repeated", "slowed_blended", "dropped", "frozen", "black_frame", "checkerboard", "color_shift"])
def test_a_planted_defect_fails_every_gate_and_is_named(folders: Any, plant: str) -> None:
    made = reelquant.compare(*folders(plant), metrics="image,motion", gate="loose")
    assert not made.passed
    name = defects.CALLED.get(plant, plant)
    assert name in {failure.looks_like for failure in made.verdict.failures}
    assert name in {found["name"] for found in made.data["defects"]}


def test_one_black_frame_in_one_clip_fails_the_loosest_gate(folders: Any) -> None:
    made = reelquant.compare(*folders("black_frame", only=("02",)), metrics="motion", gate="loose")
    assert made.verdict.failures[0].sentence == "black_frame in 1 of 4 clips (02): black frames: 1 that the reference does not have"
    assert "black_frames" in {failure.metric for failure in made.verdict.failures}


def test_missing_frames_are_seen_although_the_rest_is_equal(folders: Any, tmp_path: Path) -> None:
    _, reference = folders(None)
    for name, clip in find_clips(reference).items():
        media.write_video(clip.read()[::2], tmp_path / f"{name}.mp4", lossless=True)
    made = reelquant.compare(tmp_path, reference, metrics="quick", gate="default", output=tmp_path / "proof")
    assert (tmp_path / "proof" / "report.html").is_file()
    assert made["length_deviation"] == pytest.approx(7 / 13 - 1)
    assert "length_deviation" in {failure.metric for failure in made.verdict.failures}


def test_any_clip_of_transformers_scores_clips_against_their_texts(folders: Any, tiny_clip: Path, tmp_path: Path) -> None:
    test, reference = folders("blur")
    (tmp_path / "texts.txt").write_text("a red circle\n" * 4)
    words = ["compare", test, reference, "--prompts", tmp_path / "texts.txt", "-m", "clipsim,clip_consistency", "--clip-model", tiny_clip]
    result = CliRunner().invoke(app, [str(word) for word in (*words, "--json")])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert -1 <= found["clipsim"] <= 1
    assert 0 < found["clip_consistency"] <= 1
    assert found["metrics"]["clipsim"]["reference"] != found["clipsim"]
    (tmp_path / "texts.txt").write_text("a red circle\n")
    short = CliRunner().invoke(app, [str(word) for word in words])
    assert "1 texts and" in short.stderr and "4 clips" in short.stderr


def test_folders_without_common_names_can_only_be_compared_as_sets(folders: Any, tmp_path: Path) -> None:
    _, reference = folders(None)
    media.write_video(random_clip(1)[0], tmp_path / "other.mp4")
    with pytest.raises(CalibrationError, match="paired by name"):
        reelquant.compare(tmp_path, reference, metrics="psnr")


def test_pairs_of_different_sizes_are_refused_with_both_sizes(folders: Any, tmp_path: Path) -> None:
    _, reference = folders(None)
    media.write_video(torch.rand(13, 3, 32, 64), tmp_path / "00.mp4")
    with pytest.raises(CheckpointError, match="64x32 pixels and its reference 64x64"):
        reelquant.compare(tmp_path, reference, metrics="psnr")


def test_the_command_compares_and_names_each_metric_plainly(folders: Any) -> None:
    test, reference = folders("blur")
    result = CliRunner().invoke(app, ["compare", str(test), str(reference), "--metrics", "psnr,ssim,latent_error", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    found = document["metrics"]
    assert (document["psnr"], document["latent_error"]) == (found["psnr"]["value"], None)
    assert list(found) == ["psnr", "ssim", "latent_error"]
    assert 15 < found["psnr"]["value"] < 40
    assert found["latent_error"]["missing"].startswith("clips on disk have no latents")


@pytest.fixture(scope="module")
def real(material: Path) -> dict[str, torch.Tensor]:
    """Six real clips of 9 frames at 64x64."""
    found = find_clips(material / "clips")
    return {name: _small(found[name].read()) for name in sorted(found)[::45][:6]}


def _written(clips: dict[str, torch.Tensor], folder: Path, change: Any = lambda clip: clip) -> Path:
    for name, clip in clips.items():
        media.write_video(change(clip), folder / f"{name}.mp4", lossless=True)
    return folder


@pytest.mark.full
def test_fvd_of_folders_is_the_distance_of_their_features(material: Path, real: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Clips of other names too: only sets are compared."""
    generator = torch.Generator().manual_seed(0)
    reference = _written(real, tmp_path / "a")
    noised = _written(real, tmp_path / "b", lambda clip: (clip + 0.1 * torch.randn(clip.shape, generator=generator)).clamp(0, 1))
    renamed = _written({f"other-{name}": clip for name, clip in real.items()}, tmp_path / "c")
    weights = material / "metrics"
    features = [torch.cat([_i3d(weights, clip.read()) for clip in find_clips(folder).values()]) for folder in (reference, noised)]
    made = reelquant.compare(noised, reference, metrics="fvd,psnr", weights=weights)
    assert made["fvd"] == pytest.approx(frechet(*features), rel=1e-5)
    assert made["fvd"] > 100
    assert "FVD of 6 clips" in made.data["warnings"][0]
    same = reelquant.compare(renamed, reference, metrics="fvd", weights=weights)
    assert same["fvd"] == pytest.approx(0, abs=1e-2)


def _i3d(weights: Path, clip: torch.Tensor) -> torch.Tensor:
    return published.load("i3d", weights).features(clip[None])


def test_shuffled_frames_raise_the_warping_error_of_real_clips_where_frame_by_frame_figures_see_nothing(
    real: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Both folders shuffled alike: PSNR is that of equal clips, grain that of the clips in order; the warping error tells."""
    order = torch.tensor([4, 0, 7, 2, 8, 5, 1, 6, 3])
    shuffled = _written(real, tmp_path / "a", lambda clip: clip[order])
    whole = _written(real, tmp_path / "b")
    figures = "psnr,grain,warping_error_dis"
    before, after = (reelquant.compare(folder, folder, metrics=figures) for folder in (whole, shuffled))
    assert before["psnr"] == after["psnr"] == 100
    assert after["grain"] == pytest.approx(before["grain"], rel=1e-6)
    assert after["warping_error_dis"] > 2 * before["warping_error_dis"]  # type: ignore[operator]


def _small(clip: torch.Tensor) -> torch.Tensor:
    chosen = clip[torch.linspace(0, len(clip) - 1, 9).round().long()]
    return torch.nn.functional.interpolate(chosen, (64, 64), mode="bilinear", antialias=True).clamp(0, 1)
