"""Tables fit the screen, and nothing that names or counts is cut."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from reelquant.cli import app, console
from reelquant.cli.console import QUIET
from reelquant.cli.layout import Plain, facts, folded, share, table
from reelquant.cli.tables import evaluations
from reelquant.evidence.evaluation import Evaluation
from reelquant.evidence.gate import Failure, Verdict
from reelquant.evidence.several import Evaluations
from tests.tiny.stock import stored_pipeline
from tests.unit.evidence.report import several

WIDTHS = (80, 100, 120)
SHORT = ("--set", "calibrate.prompts=1", "--set", "search.prompts=1", "--set", "search.steps=1")


def drawn(made: Plain, width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(made)
    return file.getvalue().splitlines()


def bare(text: Any) -> str:
    return "".join(str(text).split())


def check(made: Plain, width: int) -> None:
    """Every line fits, the first column stands, what is hidden may be, and what is shown is whole, also on the screen."""
    lines = drawn(made, width)
    assert max(len(line) for line in lines) <= width
    fitted = made.fitted(width)
    headings = [bare(column.header) for column in made.columns]
    kept = [headings.index(bare(column.header)) if made.show_header else number for number, column in enumerate(fitted.columns)]
    hidden = [heading for number, heading in enumerate(headings) if number not in kept]
    assert kept[0] == 0 and set(hidden) <= {bare(name) for name in made.hides}
    on_screen = "\n".join(lines)
    for column, number in zip(fitted.columns, kept, strict=True):
        for cell, whole in zip(column.cells, made.columns[number].cells, strict=True):
            assert bare(cell) == bare(whole)
            assert all(line in on_screen for line in str(cell).splitlines())
    assert bare(made.caption or "") in bare(on_screen) and "…" not in on_screen


# ------------------------------------------------------------------------------------------------------------------------- parts


def test_columns_that_say_least_go_first_and_the_caption_names_them() -> None:
    made = table("figures", ["metric"], ["value", "95 % interval", "floor: bf16"], hides=["floor: bf16", "95 % interval"])
    made.add_row("psnr", "42.3", "41.1 to 43.4", "48.7")
    assert [column.header.plain.split()[0] for column in made.fitted(60).columns] == ["metric", "value", "95", "floor:"]
    narrow = "\n".join(drawn(made, 38))
    assert "interval" in narrow and "48.7" not in narrow and "hidden at this width: floor: bf16" in " ".join(narrow.split())
    narrower = drawn(made, 22)
    assert any("psnr" in line and "42.3" in line for line in narrower) and not any("41.1" in line for line in narrower)


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("blocks.0.attn1.to_out.0", 16, ["blocks.0.attn1.", "to_out.0"]),
        ("condition_embedder.time_embedder", 22, ["condition_embedder.", "time_embedder"]),
        ("checkerboard_deviation", 22, ["checkerboard_deviation"]),
        ("int8|log_uniform_8|power_8", 14, ["int8|", "log_uniform_8|", "power_8"]),
        ("least 0.05, power 0.5", 11, ["least 0.05,", "power 0.5"]),
        ("abcdefgh", 3, ["abc", "def", "gh"]),
        ("two\nlines", 20, ["two", "lines"]),
        ("日本語 text", 6, ["日本語", "text"]),
    ],
)
def test_words_break_where_they_may(text: str, width: int, lines: list[str]) -> None:
    assert folded(Text(text), width).plain.split("\n") == lines


def test_figures_do_not_give_way_and_words_do() -> None:
    assert share([30, 10], [30, 10], [False, True], 30) == [20, 10]
    assert share([5, 5], [20, 6], [False, False], 22) == [16, 6]
    assert share([5, 5], [5, 5], [False, False], 40) == [5, 5]


def test_a_caption_is_not_cut() -> None:
    made = table("t", ["layer", "numbers"], ["error", "coverage", "TDScore"])
    made.add_row(
        "condition_embedder.time_embedder.linear_1", "int8 channel, input uint8|log_uniform_8|power_8 tensor", "1e-4", "5%", "1.000"
    )
    made.caption = "error: squared output error over the output's variance; coverage: share of the input's codes that a channel uses"
    check(made, 80)


def test_names_of_facts_stand_in_a_screen_that_is_narrow() -> None:
    check(facts("Skipped", [("first and last layer stay float", "patch_embedding, proj_out"), ("a", "b" * 30)]), 40)


# ------------------------------------------------------------------------------------------------------------------------- verbs


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Plain]]:
    """The tables of every verb that prints some, from tiny random pipelines."""
    found: dict[str, list[Plain]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        folder = tmp_path_factory.mktemp("tables")
        model = stored_pipeline(folder / "wan")
        for verb, words in _commands(model, folder).items():
            seen: list[Any] = []
            patch.setattr(console.out, "print", lambda *parts, seen=seen, **_: seen.extend(parts))
            result = CliRunner().invoke(app, [str(word) for word in words])
            assert result.exit_code == 0, result.output
            found[verb] = [part for part in seen if isinstance(part, Plain)]
    demo = importlib.import_module("reelquant.cli.demo")
    figures = {"bytes": 3_950_000, "bytes_float": 15_400_000, "ratio": 3.89, "psnr": 36.9, "psnr_low": 30.1, "psnr_high": 41.2}
    more = {"tdscore": 0.999, "seconds_quantize": 74.9, "seconds_sample": 4.4} | {f"judge_{kind}": 1.0 for kind in demo.KINDS}
    return found | {"demo": [demo.results_table("tiny-unet", [figures | more | {"variant": name} for name in demo.VARIANTS], 4)]}


def _commands(model: Path, folder: Path) -> dict[str, tuple[object, ...]]:
    out = folder / "out"
    call = ("--reference", model, "--steps", 2)
    return {
        "dry run": ("quantize", model, "-r", "qvd-w8a8", "--dry-run"),
        "quantize": ("quantize", model, "-r", "qvd-w8a8", "-o", out, *SHORT),
        "inspect": ("inspect", model, "--steps", 2),
        "inspect quantized": ("inspect", out, "--steps", 2),
        "recipes": ("recipes",),
        "a recipe": ("recipes", "qvd-w8a8"),
        "metrics": ("metrics",),
        "weights": ("weights",),
        "export": ("export", out, "-f", "comfyui", "-o", folder / "out.safetensors"),
        "evaluate": ("evaluate", out, *call, "-n", 1, "-m", "image,motion,fvd", "--gate", "default", "-o", folder / "proof"),
        "tune": ("tune", out, "-o", folder / "fast", "--steps", 4, "--clips", 1, "--fail-under", "psnr=1"),
        "benchmark": ("benchmark", out, *call, "--rounds", 1, "--no-memory"),
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_every_table_of_every_verb_fits(tables: dict[str, list[Plain]], width: int) -> None:
    counts = {verb: len(made) for verb, made in tables.items()}
    assert all(counts.values()) and counts["quantize"] > 2 and counts["inspect"] > 3 and counts["evaluate"] > 2, counts
    for made in (one for parts in tables.values() for one in parts):
        check(made, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_of_several_tests_fits(width: int) -> None:
    data = several(("qvd-w8a8", "a-rather-long-name-of-a-folder", "w4a16"))
    missed = Verdict("default", False, (Failure("psnr", 20.5, "at least 25", "PSNR is 20.5 dB and misses the limit (at least 25) by 4.5"),))
    made = Evaluations({test["name"]: Evaluation({}, test, missed) for test in data["tests"]}, data)
    rows, limits, notes = evaluations(made)
    for part in (rows, limits, notes):
        check(part, width)
    assert any("qvd-w8a8" in line and "49.0 dB" in line and "passed" in line for line in drawn(rows, 80))


def test_names_of_metrics_are_whole_words_at_80_columns(tables: dict[str, list[Plain]]) -> None:
    """``evaluate -m`` takes them."""
    lines = [line for made in tables["metrics"] for line in drawn(made, 80)]
    for name in ("checkerboard_deviation", "lpips_alex", "psnr"):
        assert any(name in line.split() for line in lines)


def test_nothing_is_hidden_of_an_evaluation_that_fits(tables: dict[str, list[Plain]]) -> None:
    assert "hidden" not in "\n".join(drawn(tables["evaluate"][0], 120))
    heads = [column.header.plain for column in tables["evaluate"][0].columns]
    assert heads[0] == "metric" and heads[1] == "value" and tables["evaluate"][0].hides[0].startswith("floor")
