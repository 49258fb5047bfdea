"""Attention with few-bit operands in whole denoisers: who asks for it, what computes it, what is said, and what comes back from disk."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import reelquant
from reelquant._errors import CalibrationError, CheckpointError, RecipeError
from reelquant.checkpoint.stored import Stored
from reelquant.clock import Clock
from reelquant.kernels import attention as kernels
from reelquant.kernels.attention import REFERENCE, STOCK, AttentionQuant
from reelquant.nn import attention_facts, dequantized, quantized_layers, round_attention, set_module, start_clock
from reelquant.nn.around.attention import PROTECTED, rounded_attention
from reelquant.nn.around.attention import STOCK as STOCK_NAME
from reelquant.recipes.recipe import load_recipe
from tests.tiny.configs import TINY
from tests.tiny.pipelines import call
from tests.tiny.stock import CALL, PROMPTS, frames, realigned, room, wan_pipeline

INT8 = {"scores": "int8"}
INT8_SCORES = AttentionQuant()
TIMES = (900.0, 500.0, 100.0)
BASE = {"calibrate.prompts": 2, "search.prompts": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A pipeline whose recipe asks for rounded attention, its report, and its folder."""
    pipe = wan_pipeline()
    report = reelquant.quantize(pipe, "minmax-w8a8", PROMPTS, overrides=BASE | {"attention": INT8, "protect_steps": [0]}, **CALL)
    return pipe, report, reelquant.save(pipe, tmp_path_factory.mktemp("attention") / "out", report)


def wan(protected: tuple[int, ...] = (0,), numbers: AttentionQuant | None = INT8_SCORES) -> nn.Module:
    model = TINY["WanTransformer3DModel"]().eval()
    start_clock(model, Clock(TIMES, protected), "timestep")
    round_attention(model, numbers)
    return model


def calls(model: nn.Module) -> dict[str, int]:
    found = attention_facts(model)
    assert found is not None
    return found.calls


# --- what is computed ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["float", "e4m3"])
def test_attention_is_rounded_at_all_but_protected_steps(values: Any) -> None:
    plain, model = wan(numbers=None), wan((1,), AttentionQuant(values=values))
    for slot, time in enumerate(TIMES):
        exact, found = call(plain, time), call(model, time)
        assert torch.equal(found, exact) == (slot == 1)
        torch.testing.assert_close(found, exact, rtol=0.2 if values == "e4m3" else 0.02, atol=0.02)
    attentions = 2 * len(model.blocks)  # self and cross
    assert calls(model) == {REFERENCE.name: 2 * attentions, PROTECTED: attentions}


def test_what_runs_is_the_reference_of_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser with its attention exchanged by hand."""
    model, plain = wan(()), wan((), None)
    found = call(model, 500.0)

    def by_hand(query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
        return REFERENCE.attention(query, key, value, options.get("scale"), AttentionQuant(), None)

    monkeypatch.setattr(F, "scaled_dot_product_attention", by_hand)
    assert torch.equal(call(plain, 500.0), found)


def test_compiled_graphs_follow_protected_steps_with_one_compilation() -> None:
    model = wan((0, 2))
    expected = [call(model, time) for time in TIMES]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    call(compiled, TIMES[0])
    rounded: Any = rounded_attention(model)
    rounded.calls.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for time, wanted in zip(TIMES, expected, strict=True):
            torch.testing.assert_close(call(compiled, time), wanted)
    attentions = 2 * len(model.blocks)  # type: ignore[arg-type]
    assert calls(model) == {PROTECTED: 2 * attentions, REFERENCE.name: attentions}


def test_blocks_that_are_compiled_one_by_one_follow_the_denoiser() -> None:
    model = wan((0,))
    expected = [call(model, time) for time in TIMES]
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend="aot_eager", fullgraph=True)
    for time, wanted in zip(TIMES, expected, strict=True):
        torch.testing.assert_close(call(model, time), wanted)


def test_a_copy_counts_for_itself() -> None:
    model = wan(())
    twin = copy.deepcopy(model)
    assert torch.equal(call(twin, 500.0), call(model, 500.0))
    assert calls(twin) == calls(model) == {REFERENCE.name: 2 * len(model.blocks)}  # type: ignore[arg-type]
    round_attention(twin, None)
    assert attention_facts(twin) is None and not torch.equal(call(twin, 500.0), call(model, 500.0))


def test_other_models_in_the_same_process_are_left_alone() -> None:
    model, other = wan(()), wan((), None)
    before = call(other, 500.0)
    call(model, 500.0)
    assert torch.equal(call(other, 500.0), before)
    q = torch.randn(1, 2, 5, 8)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), STOCK(q, q, q))


# --- what is not computed, and that it is said --------------------------------------------------------------------------------------


class Attending(nn.Module):
    """A denoiser that is nothing but one attention."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, **self.options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()}, "a mask"),
        ({"is_causal": True}, "causal"),
        ({"enable_gqa": True}, "share keys"),
    ],
)
def test_calls_with_more_than_products_are_exact_and_said(options: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Attending(**options), torch.randn(1, 2, 5, 8)
    round_attention(model, AttentionQuant())
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model(x), STOCK(x, x, x, **options)) and torch.equal(model(x), model(x))
    assert [count for name, count in calls(model).items() if reason in name] == [3]
    assert len([record for record in caplog.records if reason in record.message]) == 1


def test_masks_of_padded_texts_are_no_reason_to_be_exact() -> None:
    """HunyuanVideo masks the keys of every block; in graphs the mask is an input of the operator."""
    model = Masked(torch.tensor([True, True, False, True, False]).view(1, 1, 1, 5))
    round_attention(model, INT8_SCORES)
    x = torch.randn(1, 2, 5, 8)
    found = model(x)
    assert torch.equal(found, REFERENCE.attention(x, x, x, None, INT8_SCORES, model.mask)) and calls(model) == {REFERENCE.name: 1}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), found)
    assert calls(model) == {REFERENCE.name: 2}
    round_attention(model, None)
    assert torch.equal(model(x), STOCK(x, x, x, model.mask))


class Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask)


def test_gradients_pass_through_exact_attention() -> None:
    model, x = Attending(), torch.randn(1, 2, 5, 8, requires_grad=True)
    round_attention(model, AttentionQuant())
    model(x).sum().backward()
    assert x.grad is not None and calls(model) == {f"{STOCK_NAME}: gradients are wanted": 1}


def test_a_device_without_a_kernel_is_named_and_computes_in_float(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(kernels.ROUNDED, "cpu")
    model, x = Attending(), torch.randn(1, 2, 5, 8)
    round_attention(model, AttentionQuant())
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model(x), STOCK(x, x, x))
    found = attention_facts(model)
    assert found is not None and found.kernel == STOCK_NAME and found.refused == "there is no kernel for cpu" and not found.simulated
    assert found.by == "not used: there is no kernel for cpu; stock attention in float instead" and "no kernel for cpu" in caplog.text


# --- recipes, reports, folders ------------------------------------------------------------------------------------------------------


def test_a_recipe_without_attention_keeps_its_digest_and_a_wrong_word_is_refused() -> None:
    plain = load_recipe("minmax-w8a8")
    asked = load_recipe("minmax-w8a8", {"attention": INT8})
    assert load_recipe("minmax-w8a8", {"attention": None}).digest() == plain.digest() != asked.digest()
    assert [entry.stage.asked for entry in asked.entries if entry.name == "attention"] == [AttentionQuant()]
    assert not [entry for entry in plain.entries if entry.name == "attention"]
    for value, words in (
        ({"score": "int8"}, "did you mean 'scores'"),
        ({"values": "fp8"}, "attention.values is one of float, e4m3, uint8"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_recipe("minmax-w8a8", {"attention": value})


def test_the_report_says_what_computed_the_check(made: tuple[Any, Any, Path]) -> None:
    from reelquant.cli.tables import summary

    _, report, _ = made
    found = report.attention
    assert found.asked == "int8 scores, float values" and found.kernel == REFERENCE.name and found.simulated
    assert found.calls[PROTECTED] * 2 == found.calls[REFERENCE.name] > 0  # one step of three is protected
    assert report.to_json()["attention"]["simulated"] and not report.warnings
    rows = dict(zip(*(map(str, column.cells) for column in summary(report).columns), strict=True))
    assert "simulated" in rows["attention"] and f"{PROTECTED} ({found.calls[PROTECTED]})" in rows["attention"]


def test_the_figures_of_the_report_include_it() -> None:
    def psnr(**more: Any) -> float:
        found = reelquant.quantize(wan_pipeline(), "minmax-w8a8", PROMPTS, overrides=BASE | more, **CALL).latent_psnr
        assert found is not None
        return found

    assert psnr() != psnr(attention={"values": "e4m3"})


def test_a_folder_asks_for_what_its_recipe_asked_for(made: tuple[Any, Any, Path]) -> None:
    pipe, _, folder = made
    config = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["attention"] == {"scores": "int8", "values": "float"}
    opened = DiffusionPipeline.from_pretrained(folder)
    found = attention_facts(opened.transformer)
    assert found is not None and found.asked == "int8 scores, float values" and not found.calls
    assert torch.equal(frames(opened), frames(pipe)) and calls(opened.transformer)[PROTECTED]
    again = reelquant.save(opened, folder.parent / "again")
    assert json.loads((again / "transformer" / "config.json").read_text())["quantization_config"] == config


def test_a_damaged_or_newer_wish_is_refused(made: tuple[Any, Any, Path]) -> None:
    config = json.loads((made[2] / "transformer" / "config.json").read_text())["quantization_config"]
    with pytest.raises(CheckpointError, match=r"attention\.scores is one of int8, int4, float, got 'int2'; written by a newer version"):
        Stored.from_json(config | {"attention": {"scores": "int2"}})
    assert Stored.from_json({key: value for key, value in config.items() if key != "attention"}).attention is None


def test_configure_switches_it_and_stores_nothing(made: tuple[Any, Any, Path], tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(made[2])
    rounded = frames(pipe)
    reelquant.configure(pipe, attention="float")
    exact = frames(pipe)
    assert attention_facts(pipe.transformer) is None and not torch.equal(exact, rounded)
    reelquant.configure(pipe, attention={"values": "e4m3"})
    assert str(rounded_attention(pipe.transformer).plan) == "int8 scores, e4m3 values"  # type: ignore[union-attr]
    saved = json.loads((reelquant.save(pipe, tmp_path / "out") / "transformer" / "config.json").read_text())["quantization_config"]
    assert saved["attention"] == {"scores": "int8", "values": "float"}
    reelquant.configure(pipe, attention=INT8)
    assert torch.equal(frames(pipe), rounded)
    with pytest.raises(RecipeError, match="did you mean 'scores'"):
        reelquant.configure(pipe, attention={"scoers": "int8"})


def test_the_oracle_of_the_layers_rounds_attention_too(made: tuple[Any, Any, Path]) -> None:
    pipe = DiffusionPipeline.from_pretrained(made[2])
    reelquant.configure(pipe, kernels="reference")
    frames(pipe)
    assert calls(pipe.transformer)[REFERENCE.name]
    reelquant.configure(pipe, kernels="auto")
    assert rounded_attention(pipe.transformer).kernels == "auto"  # type: ignore[union-attr]


def test_dequantized_models_have_float_attention(made: tuple[Any, Any, Path]) -> None:
    pipe = DiffusionPipeline.from_pretrained(made[2])
    model = copy.deepcopy(pipe.transformer)
    for name, layer in quantized_layers(model).items():
        set_module(model, name, dequantized(layer, torch.float32))
    round_attention(model, None)
    pipe.transformer.dequantize()
    assert attention_facts(pipe.transformer) is None
    for time in TIMES:
        torch.testing.assert_close(call(pipe.transformer, time), call(model, time))


def test_a_failed_run_leaves_float_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from reelquant.engine import run as engine

    pipe = wan_pipeline()
    before = frames(pipe)

    def fail(*args: Any) -> None:
        raise CalibrationError("broken")

    monkeypatch.setattr(engine, "_check", fail)
    with pytest.raises(CalibrationError, match="broken"):
        reelquant.quantize(pipe, "minmax-w8a8", PROMPTS, overrides=BASE | {"attention": INT8}, **CALL)
    assert attention_facts(pipe.transformer) is None and torch.equal(frames(pipe), before)


def test_plans_say_what_a_device_would_compute() -> None:
    from reelquant.cli.tables import plan_json

    plan = reelquant.plan(wan_pipeline(), "w8a16", overrides={"attention": INT8})
    outlooks = {device: [stage["outlook"] for stage in plan_json(plan, device)["stages"]] for device in ("cpu", "mps:0")}
    assert outlooks["cpu"] == [f"by {REFERENCE.name}, simulated: codes are multiplied in float"]
    assert outlooks["mps:0"] == [f"not used: there is no kernel for mps; {STOCK_NAME} attention in float instead"]
    assert plan_json(reelquant.plan(wan_pipeline(), "w8a16"))["stages"] == []


def test_streamed_folders_are_those_of_memory(tmp_path: Path) -> None:
    reelquant.save(wan_pipeline(), tmp_path / "float")
    options = {"overrides": BASE | {"attention": INT8}, **CALL}
    report = reelquant.quantize_folder(tmp_path / "float", tmp_path / "disk", "minmax-w8a8", PROMPTS, max_memory=room(), **options)
    assert report.attention is not None and report.attention.kernel == REFERENCE.name
    pipe = reelquant.load(tmp_path / "float")
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        realigned(part)
    reelquant.save(pipe, tmp_path / "memory", reelquant.quantize(pipe, "minmax-w8a8", PROMPTS, **options))
    disk, memory = (json.loads((tmp_path / name / "transformer" / "config.json").read_text()) for name in ("disk", "memory"))
    assert disk["quantization_config"] == memory["quantization_config"] and disk["quantization_config"]["attention"]


def test_commands_say_it(made: tuple[Any, Any, Path]) -> None:
    import re

    from typer.testing import CliRunner

    from reelquant.cli import app

    def said(*words: str) -> str:
        found = CliRunner().invoke(app, list(words))
        assert found.exit_code == 0, found.output
        return re.sub(r"\s+", " ", found.output)

    inspected = said("inspect", str(made[2]), "--no-run")
    assert "attention int8 scores, float values, by reference, simulated" in inspected and "calls" not in inspected
    data = json.loads(CliRunner().invoke(app, ["inspect", str(made[2]), "--no-run", "--json"]).stdout)
    assert data["attention"]["simulated"] and data["attention"]["calls"] == {}
    planned = json.loads(
        CliRunner().invoke(app, ["quantize", "tiny-dit", "-r", "w8a16", "--set", "attention.scores=int8", "--dry-run", "--json"]).stdout
    )
    assert [(one["name"], one["outlook"]) for one in planned["stages"]] == [
        ("attention", f"by {REFERENCE.name}, simulated: codes are multiplied in float")
    ]


def test_a_recipe_explains_it() -> None:
    from reelquant.cli.recipes import explain

    rows = dict(explain(load_recipe("w8a16", {"attention.values": "e4m3"})))
    assert rows["step 1"].startswith("run with attention (scores int8, values e4m3)")
    assert "step 1" not in dict(explain(load_recipe("w8a16")))


def test_the_page_says_it() -> None:
    from reelquant.evidence.report.data import ReportData
    from reelquant.evidence.report.sentences import arithmetic

    attention = {"asked": "int8 scores, float values", "kernel": "triton int8 attention", "refused": None, "simulated": False}
    data = {"quantization": {"simulated": False, "kernel": {}, "attention": attention}}
    assert "attention with int8 scores, float values: computed so, by triton int8 attention" in str(arithmetic(ReportData.from_json(data)))
    refused = {"quantization": {"simulated": False, "attention": attention | {"refused": "there is no kernel for mps"}}}
    assert "was asked for and not used: there is no kernel for mps" in str(arithmetic(ReportData.from_json(refused)))
