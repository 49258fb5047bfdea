"""Tuning a tiny quantized pipeline from beginning to end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

import reelquant
from reelquant._errors import CalibrationError, CheckpointError, RecipeError, SiteError, UnsupportedError
from reelquant._progress import Silent
from reelquant._remarks import remarks
from reelquant.models.sampling import sample
from reelquant.recipes.recipe import load_recipe
from reelquant.reuse import BlockReuse, installed_reuse
from reelquant.tuning import Tuned
from reelquant.tuning.material import HELD_OUT_SEED
from reelquant.tuning.recording import Clips, Seconds, reusing, site_of, timesteps_and_gram
from reelquant.tuning.trials import Trials
from tests.tiny.stock import CALL, PROMPTS, stored_pipeline, wan_pipeline
from tests.tiny.test_components import experts

STEPS = 6
RUN: dict[str, Any] = CALL | {"num_inference_steps": STEPS}
EASY = {"gate": None, "limits": {"psnr": 1.0}}
"""A limit that every schedule keeps, so the one with the fewest steps is chosen."""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    pipe = reelquant.open_pipeline(stored_pipeline(folder / "float"))
    report = reelquant.quantize(pipe, "w8a16")
    return reelquant.save(pipe, folder / "w8a16", report)


def tune(model: Path, output: Path, **options: Any) -> Tuned:
    return reelquant.tune(model, output, **{"clips": 2, "held_out": PROMPTS, **RUN, **options})


@pytest.fixture(scope="module")
def tuned(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return tune(quantized, tmp_path_factory.mktemp("tuned") / "out", **EASY)


def test_the_fastest_schedule_that_keeps_the_limits_is_chosen_and_saved(tuned: Tuned) -> None:
    assert tuned.chosen is not None and tuned.stage is not None and tuned.output is not None
    assert tuned.chosen.passed and len(tuned.chosen.computed) == 2  # the fewest that are tried
    assert all(len(trial.computed) >= len(tuned.chosen.computed) for trial in tuned.trials)
    pipe = DiffusionPipeline.from_pretrained(tuned.output)
    sample(pipe, PROMPTS[:1], **RUN)
    counts = installed_reuse(pipe.transformer)["blocks"].installed.counts()
    assert counts == {"computed": 2 * 2, "reused": 2 * (STEPS - 2)}  # Wan calls twice a step for guidance


def test_the_report_of_the_quantization_goes_along(tuned: Tuned, quantized: Path) -> None:
    assert tuned.output is not None
    assert (tuned.output / "report.json").read_bytes() == (quantized / "report.json").read_bytes()
    assert reelquant.verify(tuned.output)


def test_what_was_tried_is_kept_beside_the_output(tuned: Tuned) -> None:
    found = json.loads((tuned.work / "tuning.json").read_text())
    assert found["chosen"]["computed"] == list(tuned.chosen.computed) and len(found["trials"]) == len(tuned.trials)
    with Image.open(tuned.work / "curve.png") as picture:
        assert picture.size[0] > 500


def test_the_recipe_quantizes_with_the_schedule(tuned: Tuned, quantized: Path) -> None:
    chosen = load_recipe(str(tuned.work / "recipe.yaml"))
    pipe = reelquant.open_pipeline(quantized.parent / "float")
    reelquant.quantize(pipe, chosen, PROMPTS, **RUN)
    assert installed_reuse(pipe.transformer)["blocks"].stage == tuned.stage


def test_a_run_that_goes_on_makes_no_clip_twice(tuned: Tuned, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr("reelquant.tuning.trials.SamplingJob._chunk", lambda self, pipe, name, *_: made.append(name))
    monkeypatch.setattr("reelquant.tuning.run.KeptFigures.keep", lambda *_: made.append("single step or sampled schedule"))
    again = tune(quantized, tuned.output, force=True, **EASY)
    assert made == [] and again.chosen is not None and tuned.chosen is not None
    assert again.chosen.computed == tuned.chosen.computed and again.chosen.figures == tuned.chosen.figures


def test_limits_that_nothing_keeps_leave_no_output(quantized: Path, tmp_path: Path) -> None:
    made = tune(quantized, tmp_path / "out", gate=None, limits={"psnr": 99.0})
    assert made.output is None and made.chosen is None and made.speedup is None
    assert not (tmp_path / "out").exists() and made.trials and not any(trial.passed for trial in made.trials)


def test_a_speed_beyond_reach_says_what_is(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"no schedule of 6 steps makes a clip 50.00 times as fast: 2 computed steps, .* not spent"):
        tune(quantized, tmp_path / "out", target_speedup=50.0)


def test_a_wanted_speed_takes_the_best_schedule_that_reaches_it(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reelquant.tuning.recording._seconds", lambda *_: Seconds(1.0, 0.0, 0.0, 2))
    monkeypatch.setattr("reelquant.tuning.run.in_turns", lambda pipe, site, stage, *_: STEPS / len(stage.at))
    made = tune(quantized, tmp_path / "out", target_speedup=1.5)
    assert len(made.chosen.computed) == 4 and made.speedup == 1.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_inference_steps": 3}, UnsupportedError, "in 3 steps, and with fewer than 4 nothing can be left out"),
        ({"target_speedup": 1.0}, RecipeError, "above 1, like 1.8, got 1.0"),
        ({"stretch": (0.6, 0.5)}, RecipeError, r"a start and an end, like \[0.25, 0.75\], got \[0.6, 0.5\]"),
        ({"record": 0}, RecipeError, "at least one clip, got 0 to record and 2 to try"),
        ({"gate": "hard"}, RecipeError, "unknown gate 'hard'"),
        ({"limits": {"psnrr": 3}}, RecipeError, "unknown metric 'psnrr'"),
        ({"prompts": []}, CalibrationError, "give at least one to record"),
        ({"held_out": []}, CalibrationError, "and one to try"),
        ({"nummer": 3}, UnsupportedError, "takes no argument 'nummer'"),
    ],
)
def test_wrong_wishes_are_refused_before_sampling(
    quantized: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reelquant.tuning.recording.sample", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(error, match=message):
        tune(quantized, tmp_path / "out", **options)


def test_a_float_pipeline_and_an_existing_output_are_refused(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="is not quantized, and a schedule fits the model that it was found on"):
        tune(quantized.parent / "float", tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists"):
        tune(quantized, quantized)


@pytest.mark.parametrize(
    ("names", "message"), [((), "has no denoiser"), (("transformer", "transformer_2"), r"has 2 denoisers \(transformer, transformer_2\)")]
)
def test_one_denoiser_is_tuned_or_named(names: tuple[str, ...], message: str) -> None:
    pipe = SimpleNamespace(components={name: wan_pipeline().transformer for name in names})
    with pytest.raises(UnsupportedError, match=message):
        site_of(pipe)


def test_experts_are_tuned_one_after_the_other(tmp_path: Path) -> None:
    pipe = experts()
    reelquant.save(pipe, tmp_path / "w8a16", reelquant.quantize(pipe, {"transformer": "w8a16", "transformer_2": "w8a16"}))
    call = {"num_inference_steps": 10, "clips": 1, "record": 1, **EASY}  # five steps of each
    half = tune(tmp_path / "w8a16", tmp_path / "half", component="transformer", **call)
    both = tune(tmp_path / "half", tmp_path / "both", component="transformer_2", **call)
    assert half.chosen is not None and both.chosen is not None and half.chosen.steps == both.chosen.steps == 5
    found = DiffusionPipeline.from_pretrained(tmp_path / "both")
    sample(found, PROMPTS[:1], **RUN | {"num_inference_steps": 10})
    for one, made in ((found.transformer, half), (found.transformer_2, both)):
        counts = installed_reuse(one)["blocks"].installed.counts()
        assert counts["computed"] / (counts["computed"] + counts["reused"]) == len(made.chosen.computed) / 5  # type: ignore[union-attr]
    bases = [one.work / "trials" / "base" / "clips" / "reference" / "0000.mp4" for one in (half, both)]
    assert bases[0].read_bytes() == bases[1].read_bytes()  # limits are held against clips in which neither reuses anything


def test_an_expert_of_too_few_steps_and_a_wrong_name_are_refused(tmp_path: Path) -> None:
    pipe = experts()
    reelquant.save(pipe, tmp_path / "w8a16", reelquant.quantize(pipe, {"transformer": "w8a16", "transformer_2": "w8a16"}))
    with pytest.raises(UnsupportedError, match="'transformer' runs at 3 of the 6 steps, and with fewer than 4 nothing can be left out"):
        tune(tmp_path / "w8a16", tmp_path / "out", component="transformer", clips=1, record=1)
    with pytest.raises(SiteError, match=r"has no denoiser 'transformer_3'; .*'transformer"):
        tune(tmp_path / "w8a16", tmp_path / "out", component="transformer_3")


def test_a_wanted_speed_that_misses_a_limit_leaves_no_output(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reelquant.tuning.recording._seconds", lambda *_: Seconds(1.0, 0.0, 0.0, 2))
    monkeypatch.setattr("reelquant.tuning.run.in_turns", lambda pipe, site, stage, *_: STEPS / len(stage.at))
    made = tune(quantized, tmp_path / "out", target_speedup=1.5, limits={"psnr": 99.0})
    assert made.output is None and made.chosen is None and not (tmp_path / "out").exists()
    assert any(trial.failures for trial in made.trials)


def test_inside_reusing_the_model_reuses_and_afterwards_not(quantized: Path) -> None:
    site = site_of(reelquant.open_pipeline(quantized))
    with reusing(site, BlockReuse(every=2)):
        assert installed_reuse(site.denoiser)
    assert not installed_reuse(site.denoiser)


def test_seconds_give_the_speed_of_a_clip() -> None:
    seconds = Seconds(computed=0.4, reused=0.1, rest=2.0, calls=2)
    assert seconds.speedup(steps=10, computed=10) == 1.0
    assert seconds.speedup(steps=10, computed=5) == pytest.approx(10.0 / (2.0 + 4.0 + 1.0))
    assert seconds.outside(steps=10) == pytest.approx(0.2)


def test_trials_of_other_clips_are_not_mixed_up(tuned: Tuned, quantized: Path) -> None:
    pipe = reelquant.open_pipeline(quantized)
    trials = Trials(pipe, site_of(pipe), tuned.work / "trials", ("w8a16", "other weights"), PROMPTS, [1, 2], RUN)
    with pytest.raises(CheckpointError, match="holds another evaluation"):
        trials.base()


def test_recording_changes_no_bit(quantized: Path) -> None:
    pipe = reelquant.open_pipeline(quantized)
    site = site_of(pipe)
    expected = sample(pipe, PROMPTS, output="latent", **RUN)
    with reusing(site, BlockReuse(every=1, stretch=(0.0, 1.0))) as installed:
        seen: list[int] = []
        installed.watch(lambda trajectory, name, tensors: seen.append(trajectory.step))
        found = sample(pipe, PROMPTS, output="latent", **RUN)
    assert torch.equal(found, expected) and sorted(set(seen)) == list(range(STEPS))


@pytest.mark.parametrize("ancestral", [False, True])
def test_a_sampler_that_adds_fresh_noise_is_named_before_anything_is_tried(quantized: Path, ancestral: bool) -> None:
    pipe = reelquant.open_pipeline(quantized)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=ancestral)
    with remarks() as said:
        timesteps_and_gram(pipe, site_of(pipe), BlockReuse(every=1), Clips(PROMPTS[:1], [0], RUN), Silent())
    noisy = f"adds fresh noise at {STEPS - 1} of {STEPS} steps"
    assert [noisy in sentence for sentence in said] == [True] * ancestral
    assert "step" not in vars(pipe.scheduler)


def test_limits_against_the_float_pipeline_are_those_of_an_evaluation(quantized: Path, tmp_path: Path) -> None:
    reference = quantized.parent / "float"
    made = tune(quantized, tmp_path / "out", reference=reference, **EASY)
    call = {name: value for name, value in RUN.items() if name != "num_inference_steps"}
    how: dict[str, Any] = {"metrics": "psnr", "floor": [], "clips": 2, "num_inference_steps": STEPS, "seed": HELD_OUT_SEED, **call}
    assert made.chosen is not None and made.output is not None and made.reference == "float"
    both, alone = (reelquant.evaluate(made.output, one, PROMPTS, **how) for one in (reference, quantized))
    assert both is not None and made.chosen.figures["psnr"] == pytest.approx(both["psnr"], abs=1e-6)
    assert alone is not None and alone["psnr"] != pytest.approx(both["psnr"], abs=1e-3)


def test_the_float_pipeline_is_never_replaced_and_has_to_be_there(quantized: Path, tmp_path: Path) -> None:
    reference = quantized.parent / "float"
    with pytest.raises(CheckpointError, match="is read"):
        tune(quantized, reference, reference=reference, force=True, **EASY)
    with pytest.raises(CheckpointError, match="nowhere"):
        tune(quantized, tmp_path / "out", reference=tmp_path / "nowhere", **EASY)


def test_an_evaluation_says_which_blocks_were_computed_when(tuned: Tuned, quantized: Path, tmp_path: Path) -> None:
    call = {name: value for name, value in RUN.items() if name != "num_inference_steps"}
    how: dict[str, Any] = {"metrics": "psnr", "floor": [], "clips": 2, "num_inference_steps": STEPS, **call}
    found = reelquant.evaluate(tuned.output, quantized, PROMPTS, output=tmp_path / "proof", **how)
    reuse = found.to_json()["reuse"]
    assert reuse["parts"] == ["blocks.0", "blocks.1"] and reuse["share"] == pytest.approx(2 / STEPS)
    assert [step for step, computed, reused in reuse["steps"] if computed] == list(tuned.chosen.computed)
    page = (tmp_path / "proof" / "report.html").read_text()
    assert "33.3 % of the calls of 2 blocks (blocks.0 to blocks.1) were computed" in page
    plain = reelquant.evaluate(quantized, quantized.parent / "float", PROMPTS, **how)
    assert plain.to_json()["reuse"] is None
