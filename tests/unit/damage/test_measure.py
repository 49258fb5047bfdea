"""Three ways to measure sensitivity on a tiny pipeline: against direct computation, resumed, and without a trace."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from reelquant._errors import CheckpointError, RecipeError, UnsupportedError
from reelquant.allocate import SensitivityTable, allocate_steps, load_table
from reelquant.allocate.exchange import together
from reelquant.clock import FIRST, SECOND
from reelquant.damage import Wanted, measure
from reelquant.damage.kept import Kept
from reelquant.damage.rounding import inputs_by_step, on_input, rounded_weight, rows_of, weights_by_step, weights_rounded
from reelquant.damage.run import cut, scene_of
from reelquant.damage.scene import HALVES, SEED, Scene, following, typical
from tests.tiny.configs import TINY
from tests.tiny.pipelines import FRAMES, FakePipeline

FORMATS, INPUTS = ("int3/channel", "int6/channel"), ("int4/token", "int8/token")
WANTED = Wanted(recipe="w8a16", formats=FORMATS, inputs=INPUTS, clips=2, ranges=2, noise_calls=4)
CALL = FakePipeline.__dict__["__call__"]
TEXTS = ["a red circle", "a blue square"]


def pipeline() -> FakePipeline:
    torch.manual_seed(0)
    return FakePipeline(TINY["WanTransformer3DModel"](), guided=True)


@pytest.fixture(scope="module")
def scene() -> Scene:
    made = scene_of(pipeline(), WANTED, TEXTS, call={"num_inference_steps": 3})
    made.record()
    return made


def test_a_sampler_without_gradients_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pipeline()
    monkeypatch.setattr(FakePipeline, "denoise", torch.no_grad()(FakePipeline.denoise))
    with pytest.raises(UnsupportedError, match="no gradient comes back through the sampler of FakePipeline"):
        measure(made, made, None, WANTED, TEXTS, call={"num_inference_steps": 2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything is measured once, in all three ways."""
    made = tmp_path_factory.mktemp("map")
    wanted = replace(WANTED, measures=("trajectory", "gradient", "noise"), configurations=4)
    measure(pipeline(), "tiny-dit", made, wanted, TEXTS, call={"num_inference_steps": 3})
    return made


@pytest.fixture(scope="module")
def table(folder: Path) -> SensitivityTable:
    return load_table(folder)


def test_a_trajectory_is_the_error_of_the_pipeline_with_that_layer_rounded(table: SensitivityTable) -> None:
    pipe = pipeline()
    layer = next(layer.name for layer in table.layers if layer.name.endswith("ffn.net.2"))
    generators = lambda: [torch.Generator().manual_seed(seed) for seed in (1000, 1001)]  # noqa: E731
    with torch.no_grad():
        before = pipe(TEXTS, generators()).frames
        weight = pipe.denoiser.get_submodule(layer).weight
        scale = (weight.abs().amax(1, keepdim=True) / 4).bfloat16().float()  # int3 reaches from -4 to 3
        weight.copy_((weight / scale).round().clamp(-4, 3) * scale)
        after = pipe(TEXTS, generators()).frames
    errors = (after - before).square().flatten(1).mean(1) / before.flatten(1).var(1, correction=0)
    row = table.select("trajectory")["transformer", layer, "int3/channel"]
    assert row.damage == pytest.approx(float(errors.log().mean().exp()), rel=0.5)  # the range rule of the scale may differ by a level
    assert row.low <= row.damage <= row.high


def test_gradients_and_noise_rank_layers_as_trajectories_do(table: SensitivityTable) -> None:
    alone = table.select("trajectory")
    for way, least in (("gradient", 0.8), ("noise", 0.6)):
        other = table.select(way)  # type: ignore[arg-type]
        keys = [key for key in alone if key[1] != "*"]
        assert spearmanr([alone[key].damage for key in keys], [other[key].damage for key in keys]).statistic > least  # type: ignore[attr-defined]


def test_a_gradient_predicts_the_error_of_small_changes(table: SensitivityTable) -> None:
    alone, predicted = table.select("trajectory"), table.select("gradient")
    ratios = [
        predicted[key].damage / row.damage
        for key, row in alone.items()
        if key[2] == "int6/channel" and key[1] != "*" and row.damage > 1e-12
    ]
    assert len(ratios) > 10 and all(0.1 < ratio < 10 for ratio in ratios), ratios  # rows are summed apart, and probes are few
    assert 0.5 < sorted(ratios)[len(ratios) // 2] < 2.5


def test_all_inputs_at_a_step_are_predicted_by_their_gradients(table: SensitivityTable) -> None:
    for step in range(3):
        key, steps = ("transformer", "*", "int8/token"), (step, step)
        found, true = (table.select(way, "input", steps)[key].damage for way in ("gradient", "trajectory"))  # type: ignore[arg-type]
        assert 0.2 < found / true < 5


def test_layers_that_are_called_by_the_name_of_their_input_are_measured(tmp_path: Path) -> None:
    """Motion modules of diffusers call their first layer so."""
    pipe, ways = FakePipeline(TINY["UNetMotionModel"]()), ("trajectory", "gradient", "noise")
    own = dict(measures=ways, formats=FORMATS[:1], inputs=INPUTS[:1], clips=1, ranges=1, noise_calls=1)
    wanted = Wanted(recipe="w8a16", skip=("re:^(?!.*motion_modules.*proj_in).*",), **own)  # type: ignore[arg-type]
    table = measure(pipe, "tiny-unet", tmp_path, wanted, TEXTS[:1], call={"num_inference_steps": 1}).table
    assert table.layers and all(layer.name.endswith("proj_in") for layer in table.layers)
    for way in ways:
        for part in ("weight", "input"):
            rows = table.select(way, part)  # type: ignore[arg-type]
            assert all(row.damage > 1e-12 for key, row in rows.items() if key[1] != "*"), (way, part)


def test_ranges_of_steps_and_halves_of_guidance_are_apart(table: SensitivityTable) -> None:
    for way in ("gradient", "noise"):
        assert table.step_ranges("transformer", way) == ((0, 1), (2, 2))  # type: ignore[arg-type]
    whole = table.select("noise")
    cuts = ([table.select("noise", steps=steps) for steps in ((0, 1), (2, 2))], [table.select("noise", half=half) for half in HALVES])
    for key in whole:
        if key[1] != "*":
            for parts in cuts:  # noise of different steps and halves is independent, so it adds up
                assert sum(one[key].damage for one in parts) == pytest.approx(whole[key].damage, rel=1e-3)
    halves = [table.select("gradient", half=half) for half in HALVES]
    assert all(one.keys() == table.select("gradient").keys() for one in halves)
    assert any(halves[0][key].damage != halves[1][key].damage for key in halves[0])
    parts = [table.select("gradient", steps=steps) for steps in ((0, 1), (2, 2))]
    for one in (*halves, *parts):  # every call gives its own share
        assert sum(row.damage > 0 for row in one.values()) > 0.8 * len(one)
    for written in ("int4/token", "int3/channel"):
        single = [row for row in table.rows if row.layer == "*" and row.measure == "gradient" and row.format == written]
        assert [row.steps for row in single] == [(0, 0), (1, 1), (2, 2)]


def test_errors_of_steps_add_up_as_vectors(table: SensitivityTable, scene: Scene) -> None:
    """All weights rounded at all steps: damages and cosines of single steps say how much that is, by trajectories and by gradients."""
    (target,), key = scene.targets, ("transformer", "*", "int6/channel")
    weights = {layer.name: rounded_weight(target, layer.name, "int6/channel") for layer in target.layers}
    with following(scene.targets), weights_rounded(target, weights):
        true = typical(scene.damages())
    predicted, cosines = {}, {}
    for way in ("trajectory", "gradient"):
        damages = [table.select(way, steps=(step, step))[key].damage for step in range(3)]  # type: ignore[arg-type]
        cosines[way] = np.array(table.together["transformer", "weight", way])  # type: ignore[index]
        predicted[way] = together(cosines[way][None] * np.sqrt(np.outer(damages, damages)), [0, 0, 0])
        assert np.allclose(cosines[way], cosines[way].T, atol=2e-3) and np.allclose(np.diag(cosines[way]), 1, atol=2e-3)
    assert predicted["trajectory"] == pytest.approx(true, rel=0.25) and 0.2 < predicted["gradient"] / true < 5
    assert np.abs(cosines["trajectory"] - cosines["gradient"]).max() < 0.4
    assert ("transformer", "input", "trajectory") in table.together


def test_rounding_holds_at_the_steps_that_are_named_and_nowhere_else(scene: Scene) -> None:
    (target,) = scene.targets
    layer = target.layers[3].name
    rounded = rounded_weight(target, layer, "int3/channel")
    seen: list[tuple[int, bool]] = []
    handle = target.module(layer).register_forward_hook(lambda module, *_: seen.append((target.step, torch.equal(module.weight, rounded))))
    with following(scene.targets), weights_rounded(target, {layer: rounded}, (1, 1)):
        scene.latents()
    handle.remove()
    assert {step for step, _ in seen} == {0, 1, 2} and all(changed == (step == 1) for step, changed in seen)
    assert not torch.equal(target.module(layer).weight, rounded)


def test_an_input_that_is_given_by_name_is_rounded_as_one_that_is_given_by_place() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    handle = on_input(layer, lambda given: given.round())
    assert torch.equal(layer(input=x), layer(x)) and torch.equal(layer(x), nn.functional.linear(x.round(), layer.weight, layer.bias))
    handle.remove()
    assert not torch.equal(layer(x), nn.functional.linear(x.round(), layer.weight, layer.bias))


def test_layers_have_the_bits_of_a_plan_at_every_step(scene: Scene) -> None:
    (target,) = scene.targets
    one, other = (layer.name for layer in target.layers[3:5])
    plan = {one: ["int3/channel", "int8/channel", "int3/channel"], other: ["int8/channel"] * 3}
    seen: list[tuple[int, str, str]] = []
    rounded = {(name, fmt): rounded_weight(target, name, fmt) for name in plan for fmt in ("int3/channel", "int8/channel")}

    def look(name: str) -> Any:
        formats = {fmt: weight for (of, fmt), weight in rounded.items() if of == name}
        return lambda module, *_: seen.extend((target.step, name, fmt) for fmt, one in formats.items() if torch.equal(module.weight, one))

    handles = [target.module(name).register_forward_hook(look(name)) for name in plan]
    before = target.module(one).weight.clone()
    with following(scene.targets), weights_by_step(target, plan):
        scene.latents()
    for handle in handles:
        handle.remove()
    assert set(seen) == {(step, name, fmt) for name, written in plan.items() for step, fmt in enumerate(written)}
    assert torch.equal(target.module(one).weight, before)


def test_plans_for_a_budget_are_sampled_on_other_texts(tmp_path: Path) -> None:
    call: dict[str, Any] = {"num_inference_steps": 3}
    inputs = tuple(f"int{bits}/token" for bits in (4, 5, 6, 8))
    wanted = replace(WANTED, inputs=inputs, ranges=3, budgets={"input": 6}, trials=2)
    table = measure(pipeline(), "tiny-dit", tmp_path, wanted, [*TEXTS, "a green star", "a grey box"], call=call).table
    assert load_table(tmp_path).tried == table.tried
    uniform = next(one for one in table.tried if one.groups == ((("*",), (6, 6, 6)),))
    pipe = pipeline()
    other = scene_of(pipe, wanted, ["a green star", "a grey box"], call=call)
    other.seed = SEED + 2
    other.record()
    (target,) = other.targets
    with following(other.targets), inputs_by_step(target, {layer.name: ["int6/token"] * 3 for layer in target.layers}):
        assert typical(other.damages()) == pytest.approx(uniform.damage, rel=1e-3)
    plan = allocate_steps(table, 6.0)
    assert plan.tried is not None and plan.tried[0] == min(one.damage for one in table.tried) <= plan.tried[1] == uniform.damage
    assert allocate_steps(load_table(tmp_path), 6.0) == plan


def test_multiplications_are_counted_for_a_clip_and_step(scene: Scene) -> None:
    (target,) = scene.targets
    facts = {layer.name: layer for layer in target.layers}
    layer = next(one for name, one in facts.items() if name.endswith("attn1.to_q"))
    tokens = 2 * FRAMES * 4 * 4  # both halves of guidance; patches of 1 x 2 x 2 of 8 x 8 latents
    assert layer.products == tokens * layer.weights


@pytest.mark.parametrize("calls", [1, 2])
def test_noise_of_fewer_calls_than_there_are_halves_and_steps(calls: int) -> None:
    made = pipeline()
    table = measure(made, made, None, replace(WANTED, measures=("noise",), noise_calls=calls), TEXTS, call={"num_inference_steps": 2}).table
    whole, halves = table.select("noise"), [table.select("noise", half=half) for half in HALVES]
    for key in whole:
        if key[1] != "*":
            assert sum(one[key].damage for one in halves) == pytest.approx(whole[key].damage, rel=1e-3)


def test_a_stopped_run_goes_on_where_it_was(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (folder / "measured.jsonl").read_text().splitlines()
    copy = tmp_path / "map"
    copy.mkdir()
    (copy / "measured.jsonl").write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:40])  # killed while it wrote
    sampled: list[int] = []
    real = Scene.damages
    monkeypatch.setattr(Scene, "damages", lambda self: sampled.append(1) or real(self))
    wanted = replace(WANTED, measures=("trajectory", "gradient", "noise"), configurations=4)
    measure(pipeline(), "tiny-dit", copy, wanted, TEXTS, call={"num_inference_steps": 3})
    assert len(sampled) == 3  # the last three configurations
    one, other = (load_table(place) for place in (folder, copy))
    assert one.rows == other.rows and one.configurations == other.configurations


def test_what_people_wrote_stays_and_another_measurement_is_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"
    (tmp_path / "measured.jsonl").write_text((folder / "measured.jsonl").read_text())
    file.write_text(json.dumps(json.loads((folder / "sensitivity.json").read_text()) | {"fixed": {"blocks.0": "int8/channel"}}))
    call: dict[str, Any] = {"num_inference_steps": 3}
    again = measure(pipeline(), "tiny-dit", tmp_path, WANTED, TEXTS, call=call).table
    assert again.fixed == load_table(file).fixed == {"blocks.0": "int8/channel"}
    with pytest.raises(CheckpointError, match="was measured with another prompts"):
        measure(pipeline(), "tiny-dit", tmp_path, WANTED, ["a red circle", "a green circle"], call=call)
    assert (folder / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"


def test_the_pipeline_stays_as_it_was() -> None:
    pipe = pipeline()
    before = {name: value.clone() for name, value in pipe.denoiser.state_dict().items()}
    asked = [parameter.requires_grad for parameter in pipe.denoiser.parameters()]
    measure(pipe, pipe, None, replace(WANTED, measures=("gradient", "noise")), TEXTS, call={"num_inference_steps": 2})
    assert all(torch.equal(value, before[name]) for name, value in pipe.denoiser.state_dict().items())
    assert asked == [parameter.requires_grad for parameter in pipe.denoiser.parameters()]
    assert all(parameter.grad is None for parameter in pipe.denoiser.parameters())
    assert not any(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in pipe.denoiser.modules())
    assert "forward" not in vars(pipe.denoiser) and FakePipeline.__dict__["__call__"] is CALL


def test_notes_of_other_settings_are_not_used(tmp_path: Path) -> None:
    assert Kept(tmp_path, {"seed": 1}).of("a", lambda: [1.0]) == [1.0]
    assert Kept(tmp_path, {"seed": 1}).of("a", lambda: [2.0]) == [1.0]
    assert Kept(tmp_path, {"seed": 2}).of("a", lambda: [3.0]) == [3.0]


def test_halves_and_ranges_cut_without_gaps() -> None:
    assert (rows_of(FIRST, 4), rows_of(SECOND, 4), rows_of(0, 4)) == (slice(0, 2), slice(2, 4), slice(0, 4))
    assert cut(10, 3) == [(0, 2), (3, 6), (7, 9)] and cut(2, 5) == [(0, 0), (1, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ("gradients",)}, "did you mean 'gradient'"),
        ({"formats": ("int4",)}, "FORMAT/GRANULARITY"),
        ({"inputs": ("int4/group-64",)}, "formats of inputs are written FORMAT/GRANULARITY with tensor, token"),
        ({"clips": 0}, "clips is at least 1"),
        ({"configurations": -1}, "configurations is at least 0"),
    ],
)
def test_wrong_wishes_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Wanted(**options)
