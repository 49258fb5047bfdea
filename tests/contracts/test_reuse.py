"""What every member of REUSES that is installed on a denoiser can be relied on for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import reelquant
from reelquant._errors import CalibrationError, CheckpointError, RecipeError
from reelquant.discover import discover
from reelquant.engine.calibration import calibrate
from reelquant.engine.plan import make_plan
from reelquant.engine.recorded import again, replay
from reelquant.models.sampling import sample
from reelquant.nn import quantized_layers
from reelquant.observe import RecordedCall, Recording
from reelquant.recipes.recipe import Recipe, load_recipe
from reelquant.reuse import REUSES, Reuse, install_stored, installed_reuse, remove_reuse, stored_reuse
from tests.tiny.stock import CALL, PROMPTS, contents, quantized_in_memory, realigned, stored_pipeline, wan_pipeline

STEPS = 4
RUN = CALL | {"num_inference_steps": STEPS}
CLIPS: list[tuple[int, dict[str, Any]]] = [(0, {}), (1, {"height": 32}), (2, {"num_inference_steps": 3})]
OFTEN: dict[str, dict[str, Any]] = {"blocks": {"every": 2, "stretch": [0.0, 1.0]}}
"""Parameters with which a member reuses something within four steps of a denoiser with two blocks, if its defaults do not."""
IN_A_CALL = {"attention": 2 * (48 * 48 + 48 * 8) * 24 * 2}
"""What is counted in a call of the denoiser, if not the call itself: both products of self and cross attention, two blocks, 24 channels."""
LEAVES_LAYERS = {"blocks"}
"""Members that leave quantized layers uncomputed."""
MEMBERS = [name for name, kind in REUSES.items() if issubclass(kind, Reuse)]


def recipe(*steps: dict[str, Any]) -> Recipe:
    return load_recipe(
        {
            "name": "reusing",
            "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": {"format": "int8", "slots": "per_step"}},
            "rules": [{"on": "role:entry | role:exit", "skip": True}],
            "calibrate": {"prompts": 2, "steps": STEPS},
            "steps": list(steps),
        }
    )


def step(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"reuse": name, **options}


def quantized(*steps: dict[str, Any]) -> tuple[Any, Any]:
    """A Wan pipeline that was quantized with these stages, and the report."""
    pipe = wan_pipeline()
    return pipe, reelquant.quantize(pipe, recipe(*steps), PROMPTS, **RUN)


def latents(pipe: Any, seed: int = 0, **call: Any) -> Tensor:
    for part in (pipe.text_encoder, pipe.transformer):
        realigned(part)
    return sample(pipe, PROMPTS[:1], seed=seed, output="latent", **RUN | call)


def counts(model: nn.Module, name: str) -> dict[str, int]:
    return installed_reuse(model)[name][0].counts()


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[int]]:
    """Counts the calls of a model."""
    made: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: made.append(1))
    yield made
    handle.remove()


@pytest.fixture(scope="module", params=MEMBERS)
def member(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(member: str) -> tuple[Any, Any]:
    """A pipeline that reuses; tests must leave it as it is."""
    return quantized(step(member, OFTEN.get(member, {})))


def test_told_to_compute_everything_it_changes_no_bit(member: str) -> None:
    plain, _ = quantized()
    always, report = quantized(step(member, dict(REUSES[member].always)))
    states = plain.transformer.state_dict(), always.transformer.state_dict()
    assert list(states[0]) == list(states[1]) and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(latents(plain), latents(always))
    assert report.reuse[member]["computed"] > 0 and report.reuse[member]["reused"] == 0


def test_it_reuses_and_counts_every_call(made: Any, member: str) -> None:
    pipe, report = made
    assert report.reuse[member]["computed"] > 0 and report.reuse[member]["reused"] > 0
    installed_reuse(pipe.transformer)[member][0].reset()
    with calls_of(pipe.transformer) as calls:
        latents(pipe)
    installed = installed_reuse(pipe.transformer)[member][0]
    whole = {step: sum(pair) for step, pair in installed.by_step().items()}
    assert len(calls) == 2 * STEPS  # Wan calls twice a step for guidance
    assert whole == dict.fromkeys(range(STEPS), 2 * IN_A_CALL.get(member, 1))
    assert sum(counts(pipe.transformer, member).values()) == sum(whole.values())
    assert all(pipe.transformer.get_submodule(part) for part in installed.parts)


def test_clips_in_a_row_equal_fresh_runs(made: Any, member: str) -> None:
    pipe, _ = made
    in_a_row = [latents(pipe, seed, **call) for seed, call in CLIPS]
    for found, (seed, call) in zip(in_a_row, CLIPS, strict=True):
        installed_reuse(pipe.transformer)[member][0].reset()
        assert torch.equal(found, latents(pipe, seed, **call))


def parts(model: nn.Module) -> dict[str, tuple[list[str], list[int]]]:
    """Attributes and hooks of every module."""
    return {name: (list(vars(module)), list(module._forward_pre_hooks)) for name, module in model.named_modules()}


def test_removal_leaves_the_model_as_it_was(made: Any, member: str) -> None:
    pipe = wan_pipeline()
    model, expected = pipe.transformer, latents(pipe)
    before = parts(model)
    install_stored(model, stored_reuse(made[0].transformer))
    assert not torch.equal(latents(pipe), expected)
    remove_reuse(model)
    assert parts(model) == before and torch.equal(latents(pipe), expected)


def test_a_failed_run_leaves_the_model_as_it_was(member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = wan_pipeline()
    latents(pipe)  # diffusers leaves a registry of hooks at the first call
    before = parts(pipe.transformer)
    monkeypatch.setattr("reelquant.engine.run._refuse_broken", _broken)
    with pytest.raises(CalibrationError, match="on purpose"):
        reelquant.quantize(pipe, recipe(step(member, OFTEN.get(member, {}))), PROMPTS, **RUN)
    assert not installed_reuse(pipe.transformer) and parts(pipe.transformer) == before


def _broken(*_: Any) -> None:
    raise CalibrationError("on purpose")


def test_a_saved_pipeline_reuses_the_same_way(made: Any, member: str, tmp_path: Path) -> None:
    pipe, _ = made
    expected = latents(pipe)
    folder = reelquant.save(pipe, tmp_path / "out")
    pipe = wan_pipeline()
    pipe.transformer = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    assert torch.equal(latents(pipe), expected)
    assert counts(pipe.transformer, member)["reused"] > 0
    pipe.transformer.dequantize()
    assert not installed_reuse(pipe.transformer) and bool(latents(pipe).isfinite().all())


def test_a_deep_copy_reuses_on_its_own(made: Any, member: str) -> None:
    pipe, _ = made
    expected = latents(pipe)
    before = counts(pipe.transformer, member)
    twin = copy.copy(pipe)
    twin.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(latents(twin), expected)
    assert counts(pipe.transformer, member) == before and counts(twin.transformer, member)["reused"] > 0
    remove_reuse(twin.transformer)
    assert installed_reuse(pipe.transformer) and torch.equal(latents(pipe), expected)


def test_calibration_sees_the_model_that_reuses(made: Any, member: str) -> None:
    """Some layer sees other inputs; if it runs at fewer steps than there are, it has a scale for each of them nevertheless."""
    pipe = wan_pipeline()
    plain_plan = make_plan(recipe(), discover(pipe.transformer), pipe.transformer)
    plain = calibrate(pipe, pipe.transformer, plain_plan, PROMPTS, seed=0, arguments=RUN, on_step=lambda: None)
    install_stored(pipe.transformer, stored_reuse(made[0].transformer))
    plan = make_plan(recipe(), discover(pipe.transformer), pipe.transformer)
    seen = calibrate(pipe, pipe.transformer, plan, PROMPTS, seed=0, arguments=RUN, on_step=lambda: None)
    ran = {name: len(inputs.range.seen) for name, inputs in seen.inputs.items()}
    assert (min(ran.values()) < STEPS) == (member in LEAVES_LAYERS) and max(ran.values()) == STEPS
    last = list(ran)[-1]
    assert not torch.equal(seen.inputs[last].range.envelope()[0], plain.inputs[last].range.envelope()[0])
    layers = quantized_layers(made[0].transformer)
    assert {layers[name].layout.slots for name in ran} == {STEPS}


@torch.no_grad()
def test_recorded_calls_are_computed_again(made: Any, member: str) -> None:
    pipe = wan_pipeline()
    model = pipe.transformer
    calls = Recording()
    handle = model.register_forward_hook(lambda module, args, kwargs, output: calls.append(_recorded(args, kwargs)), with_kwargs=True)
    latents(pipe)
    handle.remove()
    expected = replay(model, "blocks.1", calls, outputs=True)
    answers = [again(model, call)[0] for call in calls]
    install_stored(model, stored_reuse(made[0].transformer))
    found = replay(model, "blocks.1", calls, outputs=True)
    assert len(found) == len(expected) == 2 * STEPS
    assert all(torch.equal(one.output, other.output) for one, other in zip(found, expected, strict=True))
    assert all(torch.equal(again(model, call)[0], answer) for call, answer in zip(calls, answers, strict=True))
    assert installed_reuse(model)


def _recorded(args: Any, kwargs: Any) -> RecordedCall:
    return RecordedCall(args, kwargs)


def test_a_run_from_disk_to_disk_gives_the_same_bytes(member: str, tmp_path: Path) -> None:
    model = stored_pipeline(tmp_path / "model")
    chosen = recipe(step(member, OFTEN.get(member, {})))
    report = quantized_in_memory(model, chosen, tmp_path / "memory")
    streamed = reelquant.quantize_folder(model, tmp_path / "disk", chosen)
    assert contents(tmp_path / "disk" / "transformer") == contents(tmp_path / "memory" / "transformer")
    assert streamed.reuse == report.reuse and streamed.reuse[member]["reused"] > 0


def test_a_recipe_has_one_reuse_and_so_has_a_denoiser(made: Any, member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(REUSES[member]):  # type: ignore[misc]  (a reuse of a plug-in)
        pass

    monkeypatch.setitem(REUSES, "other", Other)
    for one, other in ((member, "other"), ("other", member), (member, member)):
        with pytest.raises(RecipeError, match=f"two reuse steps, '{one}' and '{other}', act on the whole denoiser: keep one"):
            recipe(step(one, {}), step(other, dict(REUSES[other].always)))
    pipe, stored = wan_pipeline(), stored_reuse(made[0].transformer)
    install_stored(pipe.transformer, stored)
    with pytest.raises(CheckpointError, match=f"reuse 'other' cannot be installed on .*: '{member}' is there already; keep one"):
        install_stored(pipe.transformer, {"other": stored[member]})


def test_tables_of_temporal_outputs_go_with_it(member: str) -> None:
    """Tables are read inside of layers, so a stage that leaves blocks uncomputed takes nothing from them."""
    states = []
    for steps in ([], [step(member, dict(REUSES[member].always))]):
        pipe = wan_pipeline()
        report = reelquant.quantize(pipe, recipe(*steps), PROMPTS, overrides={"temporal": "table"}, **RUN)
        assert report.bytes_tables > 0
        states.append((pipe.transformer.state_dict(), latents(pipe)))
    (plain, expected), (found, given) = states
    assert list(plain) == list(found) and all(torch.equal(plain[name], found[name]) for name in plain)
    assert torch.equal(given, expected)
    pipe = wan_pipeline()
    report = reelquant.quantize(pipe, recipe(step(member, OFTEN.get(member, {}))), PROMPTS, overrides={"temporal": "table"}, **RUN)
    assert report.bytes_tables > 0 and report.reuse[member]["reused"] > 0


def test_what_a_newer_version_stored_is_refused(made: Any, member: str) -> None:
    stored = stored_reuse(made[0].transformer)
    for broken in ({"newer": stored[member]}, {member: stored[member] | {"options": {"newer": 1}}}):
        with pytest.raises(CheckpointError, match=r"cannot be installed .*or upgrade reelquant"):
            install_stored(wan_pipeline().transformer, broken)


def test_a_budget_of_attention_is_kept_and_opens_as_it_was_planned(tmp_path: Path) -> None:
    pipe, report = quantized(step("attention", {"budget": 0.5}))
    made = report.reuse["attention"]
    assert 0 < made["computed"] <= made["reused"]
    expected = latents(pipe)
    reelquant.save(pipe, tmp_path / "out")
    facts = installed_reuse(pipe.transformer)["attention"].facts
    pipe.transformer = WanTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    assert installed_reuse(pipe.transformer)["attention"].facts == facts and len(facts["timesteps"]) == STEPS
    assert torch.equal(latents(pipe), expected) and counts(pipe.transformer, "attention")["reused"] > 0


def test_a_budget_of_blocks_is_kept_and_opens_as_it_was_planned(tmp_path: Path) -> None:
    pipe, report = quantized(step("blocks", {"budget": 0.5, "stretch": [0.0, 1.0], "order": 1}))
    made = report.reuse["blocks"]
    assert made["computed"] == made["reused"] > 0
    expected = latents(pipe)
    reelquant.save(pipe, tmp_path / "out")
    facts = installed_reuse(pipe.transformer)["blocks"].facts
    assert len(facts["at"]) == STEPS // 2 and len(facts["fitted"]) == 3 * STEPS // 2
    pipe.transformer = WanTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    assert installed_reuse(pipe.transformer)["blocks"].facts == facts
    assert torch.equal(latents(pipe), expected) and counts(pipe.transformer, "blocks")["reused"] > 0
