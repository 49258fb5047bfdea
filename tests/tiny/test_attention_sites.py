"""Places of attention: how they are found, which numbers they get at which step, and what comes back from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, WanTransformer3DModel
from torch import Tensor, nn

import reelquant
from reelquant._errors import CheckpointError, RecipeError, SiteError
from reelquant.checkpoint.stored import Stored
from reelquant.clock import Clock
from reelquant.discover import discover
from reelquant.kernels.attention import REFERENCE, STOCK, AttentionQuant, parse_asked
from reelquant.nn import asked_attention, attention_facts, best, compare_attention, placed, round_attention, start_clock
from reelquant.nn.around.attention import PROTECTED, UNROUNDED
from reelquant.nn.around.attention_running import SITE
from reelquant.recipes.recipe import load_recipe
from reelquant.sites import AttentionSite, select
from tests.tiny.configs import TINY
from tests.tiny.pipelines import call
from tests.tiny.stock import CALL, PROMPTS, frames, room, wan_pipeline

TIMES = (900.0, 500.0, 100.0)
BASE = {"calibrate.prompts": 2, "search.prompts": 1}
INT4, LOG2 = AttentionQuant("int4", "e4m3"), AttentionQuant("float", "log2_4", first_key="float")
RULES: list[dict[str, Any]] = [
    {"on": "*attn1*", "scores": "int4", "values": "e4m3"},
    {"on": "role:cross", "scores": "float", "values": "log2_4", "first_key": "float", "steps": [0.3, 1.0]},
]


def wan(rules: Any = RULES, protected: tuple[int, ...] = ()) -> nn.Module:
    model = TINY["WanTransformer3DModel"]().eval()
    start_clock(model, Clock(TIMES, protected), "timestep")
    round_attention(model, placed(parse_asked(rules), discover(model).attention, TIMES))
    return model


def facts(model: nn.Module) -> Any:
    found = attention_facts(model)
    assert found is not None
    return found


# --- places -------------------------------------------------------------------------------------------------------------------------


def test_places_are_the_modules_that_ask_and_roles_follow_the_keys() -> None:
    sites = discover(TINY["WanTransformer3DModel"]()).attention
    assert [(one.name, one.role) for one in sites[:2]] == [("blocks.0.attn1", "self"), ("blocks.0.attn2", "cross")]
    assert {one.kind for one in sites} == {"WanAttention"} and len(sites) == 4


def test_motion_modules_attend_to_themselves_though_their_module_is_called_attn2() -> None:
    sites = discover(TINY["UNetMotionModel"]()).attention
    second = {one.name: one.role for one in sites if one.name.endswith("attn2")}
    assert second and all(role == ("self" if "motion" in name else "cross") for name, role in second.items())


class Plain(nn.Module):
    """A denoiser that calls attention itself, with joint keys of latent and text."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.text = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x, text = self.main(sample * timestep), self.text(encoder_hidden_states)
        joint = torch.cat([text, x], 1)[:, None]
        return F.scaled_dot_product_attention(joint, joint, joint)[:, 0, text.shape[1] :]


def test_joint_attention_of_the_denoiser_itself_is_a_place_without_a_name() -> None:
    model = Plain()
    inputs = {"sample": torch.randn(1, 4, 8), "timestep": torch.tensor(3.0), "encoder_hidden_states": torch.randn(1, 5, 8)}
    sites = discover(model, inputs).attention
    assert sites == (AttentionSite("", "Plain", "self"),)
    round_attention(model, placed(parse_asked([{"on": "role:self", "scores": "int4"}]), sites))
    with torch.no_grad():
        model(**inputs)
    assert facts(model).rounded == {"int4 scores, float values": 1}


def test_patterns_name_places_as_they_name_layers() -> None:
    sites = discover(TINY["WanTransformer3DModel"]()).attention
    assert select("role:cross & blocks.1", sites) == ("blocks.1.attn2",) and len(select("class:WanAttention", sites)) == 4
    with pytest.raises(SiteError, match=r"attention.0.on: pattern '\*attn3\*' matches none of 4 attention sites"):
        placed(parse_asked([{"on": "*attn3*"}]), sites)
    with pytest.raises(SiteError, match=r"unknown role in pattern 'role:main'; .*self, cross"):
        placed(parse_asked([{"on": "role:main"}]), sites)


# --- numbers by place and step ------------------------------------------------------------------------------------------------------


def test_every_place_gets_the_numbers_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser with its attention exchanged by hand: self, cross, self, cross."""
    model, plain = wan(), TINY["WanTransformer3DModel"]().eval()
    found = [call(model, time) for time in TIMES]
    assert facts(model).rounded == {str(INT4): 6, str(LOG2): 4} and facts(model).calls == {REFERENCE.name: 10, UNROUNDED: 2}
    made = 0

    def by_hand(query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
        nonlocal made
        numbers = INT4 if made % 2 == 0 else LOG2 if made >= 4 else None  # the first step of cross attention is float
        made += 1
        if numbers is None:
            return STOCK(query, key, value)
        return REFERENCE.attention(query, key, value, options.get("scale"), numbers, None)

    monkeypatch.setattr(F, "scaled_dot_product_attention", by_hand)
    for time, expected in zip(TIMES, found, strict=True):
        assert torch.equal(call(plain, time), expected)


def test_the_last_rule_that_fits_holds_and_places_without_one_stay_float() -> None:
    rules = [
        {"on": "role:self", "scores": "int8"},
        {"on": "role:self", "scores": "int4", "steps": [0, 0.6]},
        {"on": "blocks.1", "scores": "float"},
    ]
    model = wan(rules)
    for time in TIMES:
        call(model, time)
    assert facts(model).rounded == {"int4 scores, float values": 2, "int8 scores, float values": 1}
    assert facts(model).calls[UNROUNDED] == 9
    assert facts(model).asked == "int8 scores, float values (2 sites); int4 scores, float values (2 sites, 2 steps); float (2 sites)"


def test_protected_steps_are_exact_and_nothing_is_left_behind() -> None:
    plain, model = TINY["WanTransformer3DModel"]().eval(), wan(protected=(1,))
    assert [torch.equal(call(model, time), call(plain, time)) for time in TIMES] == [False, True, False]
    assert facts(model).calls[PROTECTED] == 4
    round_attention(model, None)
    assert torch.equal(call(model, TIMES[0]), call(plain, TIMES[0]))
    assert not any(SITE in vars(one) for one in model.modules()) and not model.get_submodule("blocks.0.attn1")._forward_pre_hooks


def test_compiled_graphs_follow_places_and_steps_with_one_compilation() -> None:
    model = wan(protected=(2,))
    expected = [call(model, time) for time in TIMES]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    call(compiled, TIMES[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for time, wanted in zip(TIMES, expected, strict=True):
            torch.testing.assert_close(call(compiled, time), wanted)


def test_blocks_that_are_compiled_one_by_one_know_their_places() -> None:
    model = wan([{"on": "blocks.1.attn1", "scores": "int4", "values": "e4m3"}])
    expected = [call(model, time) for time in TIMES]
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend="aot_eager", fullgraph=True)
    for time, wanted in zip(TIMES, expected, strict=True):
        torch.testing.assert_close(call(model, time), wanted)
    assert facts(model).rounded == {str(INT4): 6}


def test_steps_are_shares_of_the_whole_trajectory_for_two_experts() -> None:
    sites = discover(TINY["WanTransformer3DModel"]()).attention
    asked = parse_asked([{"on": "*", "steps": [0.5, 1.0]}])
    sampled = [900.0, 700.0, 500.0, 300.0]
    first, second = (placed(asked, sites, times, sampled) for times in (sampled[:3], sampled[3:]))
    assert first is not None and second is not None
    assert first.placed[0].slots == (2,) and second.placed[0].slots == (0,)
    for times, steps, words in (([], [0.5, 1.0], "no denoising step is known"), (sampled, [0.0, 0.1], "hold none of the 4 steps")):
        with pytest.raises(RecipeError, match=words):
            placed(parse_asked([{"on": "*", "steps": steps}]), sites, times)
    with pytest.raises(RecipeError, match="nothing is known of those of this model"):
        placed(asked, [], sampled)


# --- recipes, reports, folders ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A pipeline whose recipe has rules, its report, and its folder."""
    pipe = wan_pipeline()
    report = reelquant.quantize(pipe, "minmax-w8a8", PROMPTS, overrides=BASE | {"attention": RULES, "protect_steps": [0]}, **CALL)
    return pipe, report, reelquant.save(pipe, tmp_path_factory.mktemp("sites") / "out", report)


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]


def test_the_report_counts_what_was_rounded_by_its_numbers(made: tuple[Any, Any, Path]) -> None:
    found = made[1].attention
    assert found.simulated and found.kernel == REFERENCE.name and not [one for one in made[1].warnings if "attention" in one]
    assert set(found.rounded) == {str(INT4), str(LOG2)} and sum(found.rounded.values()) == found.calls[REFERENCE.name]
    assert found.calls[PROTECTED] and made[1].to_json()["attention"]["rounded"] == found.rounded


def test_folders_hold_places_and_slots_and_stock_diffusers_opens_them(made: tuple[Any, Any, Path], tmp_path: Path) -> None:
    pipe, _, folder = made
    config = stored(folder)
    assert config["recipe"]["attention"] == RULES
    assert [one["sites"][0] for one in config["attention"]] == ["blocks.0.attn1", "blocks.0.attn2"]
    assert "slots" not in config["attention"][0] and config["attention"][1]["slots"] == [1, 2]
    opened = DiffusionPipeline.from_pretrained(folder)
    assert torch.equal(frames(opened), frames(pipe)) and set(facts(opened.transformer).rounded) == {str(INT4), str(LOG2)}
    reelquant.configure(opened, attention="float")
    assert stored(reelquant.save(opened, tmp_path / "again")) == config


def test_configure_looks_for_places(made: tuple[Any, Any, Path]) -> None:
    pipe = DiffusionPipeline.from_pretrained(made[2])
    rounded = frames(pipe)
    reelquant.configure(pipe, attention={"scores": "int8"})
    assert not torch.equal(frames(pipe), rounded)
    reelquant.configure(pipe, attention=RULES)
    assert torch.equal(frames(pipe), rounded)
    with pytest.raises(SiteError, match="matches none of 4 attention sites"):
        reelquant.configure(pipe, attention=[{"on": "*attn9*"}])
    assert torch.equal(frames(pipe), rounded)
    with pytest.raises(RecipeError, match=r"attention.0: attention has no key 'scoers'"):
        reelquant.configure(pipe, attention=[{"on": "*", "scoers": "int8"}])


def test_damaged_places_are_refused(made: tuple[Any, Any, Path]) -> None:
    config = stored(made[2])
    for attention, words in (
        ([{"scores": "int8"}], "names no sites"),
        ([{"sites": ["a"], "slots": [-1]}], "attention.slots are the numbers of steps"),
        ([{"sites": ["a"], "scores": "int2"}], "attention.scores is one of"),
    ):
        with pytest.raises(CheckpointError, match=f"{words}.*written by a newer version"):
            Stored.from_json(config | {"attention": attention})


def test_models_that_are_quantized_while_they_load_get_places(tmp_path: Path) -> None:
    import yaml

    folder = reelquant.save(wan_pipeline(), tmp_path / "float")
    recipe = tmp_path / "sites.yaml"
    recipe.write_text(yaml.safe_dump({"extends": "w8a16", "name": "sites", "attention": [RULES[0]]}))
    config = reelquant.ReelQuantConfig(recipe=str(recipe))
    model = WanTransformer3DModel.from_pretrained(folder / "transformer", quantization_config=config)
    plan = asked_attention(model)
    assert plan is not None and plan.sites == ("blocks.0.attn1", "blocks.1.attn1")
    with torch.no_grad():
        call(model, 500.0)
    assert facts(model).rounded == {str(INT4): 2} and facts(model).calls[UNROUNDED] == 2


def test_streamed_folders_hold_the_same_places(made: tuple[Any, Any, Path], tmp_path: Path) -> None:
    reelquant.save(wan_pipeline(), tmp_path / "float")
    options = {"overrides": BASE | {"attention": RULES, "protect_steps": [0]}, **CALL}
    report = reelquant.quantize_folder(tmp_path / "float", tmp_path / "disk", "minmax-w8a8", PROMPTS, max_memory=room(), **options)
    assert report.attention is not None and set(report.attention.rounded) == {str(INT4), str(LOG2)}
    assert stored(tmp_path / "disk")["attention"] == stored(made[2])["attention"]


def test_a_recipe_explains_its_rules_and_refuses_numbers_beside_them() -> None:
    from reelquant.cli.recipes import explain

    recipe = load_recipe("w8a16", {"attention": RULES})
    assert "role:cross" in dict(explain(recipe))["step 1"]
    assert load_recipe("w8a16", {"attention": []}).digest() == load_recipe("w8a16").digest() != recipe.digest()
    with pytest.raises(RecipeError, match="attention has rules, and scores: int4 beside them"):
        load_recipe("w8a16", {"steps": [{"policy": "attention", "scores": "int4", "rules": RULES}]})


# --- choices ------------------------------------------------------------------------------------------------------------------------


def test_every_place_and_step_gets_the_numbers_with_the_least_error() -> None:
    sites = ("blocks.0.attn1", "blocks.0.attn2")
    candidates = (AttentionQuant("float", "uint8"), AttentionQuant("float", "log2_3"))
    model = TINY["WanTransformer3DModel"]().eval()
    before = call(model, 500.0)
    errors = compare_attention(model, sites, candidates, [(slot, lambda: call(model, 500.0)) for slot in (0, 2, 2)])
    assert torch.equal(call(model, 500.0), before) and attention_facts(model) is None
    assert all(known.keys() == {0, 2} and known[2] == pytest.approx([2 * one for one in known[0]]) for known in errors.values())
    assert best(errors, 4) == dict.fromkeys(sites, [0] * 4)  # eight even bits are finer than three of powers
    by_hand: dict[str, Any] = {"a": {1: [2.0, 1.0], 3: [1.0, 2.0]}, "b": {}}
    assert best(by_hand, 5) == {"a": [1, 1, 1, 0, 0], "b": [0] * 5}


def test_choices_are_made_from_recorded_calls_and_stored() -> None:
    rule = {"on": "role:self", "scores": "float", "values": ["log2_3", "uint8", "log2_4"]}
    pipe = wan_pipeline()
    report = reelquant.quantize(pipe, "minmax-w8a8", PROMPTS, overrides=BASE | {"attention": [rule]}, **CALL)
    assert report.attention is not None and set(report.attention.rounded) == {"float scores, uint8 values"}
    plan = asked_attention(pipe.transformer)
    assert plan is not None and plan.to_json() == [{"sites": ["blocks.0.attn1", "blocks.1.attn1"], "scores": "float", "values": "uint8"}]
    with pytest.raises(RecipeError, match="are a choice, which is made while a recipe that calibrates"):
        reelquant.configure(pipe, attention=[rule])
    with pytest.raises(RecipeError, match=r"attention.0: values that are a choice are two or more"):
        parse_asked([rule | {"values": ["uint8"]}])


def test_places_are_divided_by_the_slots_of_what_they_got() -> None:
    sites = discover(TINY["WanTransformer3DModel"]()).attention
    asked = parse_asked([{"on": "role:self", "scores": "float", "values": ["uint4", "log2_4"]}])
    picks = {"blocks.0.attn1": [0, 1, 1], "blocks.1.attn1": [0, 0, 0]}
    plan = placed(asked, sites, TIMES, choose=lambda names, candidates: picks)
    assert plan is not None
    assert [(one.numbers and one.numbers.values, one.sites, one.slots) for one in plan.placed] == [
        ("uint4", ("blocks.0.attn1",), (0,)),
        ("log2_4", ("blocks.0.attn1",), (1, 2)),
        ("uint4", ("blocks.1.attn1",), None),
    ]
    assert str(plan) == "float scores, uint4 values (2 sites, at some steps); float scores, log2_4 values (1 sites, 2 steps)"
