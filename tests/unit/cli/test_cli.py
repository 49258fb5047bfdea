"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import reelquant
from reelquant import ReelQuantError
from reelquant.cli import app
from reelquant.cli.console import QUIET, figure, plain, size
from reelquant.cli.options import call_options, settings
from reelquant.evidence import read_video
from reelquant.evidence.networks.published import WEIGHTS
from reelquant.kernels.cpu import int8, int8_tiles, int16_madd
from tests.tiny.stock import stored_pipeline

VERBS = ("demo", "quantize", "generate", "evaluate", "compare", "export", "verify", "inspect", "recipes", "metrics", "weights", "serve")
SHORT = ["--set", "calibrate.prompts=1", "--set", "search.prompts=1", "--set", "search.steps=1"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command line sets in the environment goes with the test."""
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random pipeline on disk that says how it likes to be called."""
    return stored_pipeline(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder that `reelquant quantize` wrote, and what it printed."""
    out = tmp_path_factory.mktemp("quantized") / "deep" / "out"
    return out, invoke("quantize", model, "-r", "minmax-w8a8", "-o", out, "--seed", 3, *SHORT)


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def fails(*words: object) -> str:
    """Run a command that must fail: its one line on stderr."""
    result = invoke(*words)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("reelquant: ")
    return lines[0]


def module(name: str) -> ModuleType:
    """A module of the command line; the package names the function of the same name."""
    return sys.modules[f"reelquant.cli.{name}"]


# ------------------------------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches_with_examples(verb: str) -> None:
    result = invoke(verb, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"reelquant {verb}" in result.stdout.split("Examples")[1]


def test_the_help_names_every_verb() -> None:
    result = invoke("--help")
    assert all(verb in result.stdout for verb in VERBS)


def test_version() -> None:
    assert invoke("--version").stdout == f"reelquant {reelquant.__version__}\n"


def test_python_m_is_the_same_command_and_loads_nothing_heavy() -> None:
    code = """
import sys, runpy
sys.argv = ["reelquant", "--version"]
try:
    runpy.run_module("reelquant", run_name="__main__")
finally:
    heavy = sorted({"torch", "diffusers", "transformers", "av", "PIL", "matplotlib"} & set(sys.modules))
    print(heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"reelquant {reelquant.__version__}\n[]\n"


def test_unknown_verb_and_missing_option_are_errors_of_usage() -> None:
    assert invoke("quantise").exit_code == 2
    assert invoke("quantize", "tiny-dit").exit_code == 2
    assert "--output" in invoke("quantize", "tiny-dit", "-r", "w8a16").stderr


# ---------------------------------------------------------------------------------------------------------------------- quantize


def test_dry_run_prints_the_plan_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    result = invoke("quantize", model, "-r", "w4a16", "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "blocks.0.attn1.to_q" in result.stdout
    assert "float: first and last layer" in result.stdout
    assert "nothing was changed or written" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_as_json_needs_no_output(model: Path) -> None:
    result = invoke("quantize", model, "-r", "w8a16", "--dry-run", "--json", "--skip", "blocks.0.attn1")
    plan = json.loads(result.stdout)
    skipped = {layer["name"]: layer["skipped"] for layer in plan["layers"]}
    assert skipped["blocks.0.attn1.to_q"] == "skipped by you (blocks.0.attn1)"
    assert skipped["blocks.1.attn1.to_q"] is None
    assert plan["bytes_before"] > 2 * plan["bytes_after"]


def test_exclude_is_a_hidden_name_of_skip(model: Path) -> None:
    def float_layers(*words: str) -> list[str]:
        plan = json.loads(invoke("quantize", model, "-r", "w8a16", "--dry-run", "--json", *words).stdout)
        return [layer["name"] for layer in plan["layers"] if layer["weight"] is None]

    first, second = ("--skip", "blocks.0.attn1"), "blocks.1.attn1"
    assert float_layers(*first, "--exclude", second) == float_layers(*first, "--skip", second) != float_layers(*first)
    shown = invoke("quantize", "--help").stdout
    assert "--skip" in shown and "--exclude" not in shown


def test_notes_of_a_verb_are_paragraphs_and_commands_keep_their_lines() -> None:
    from reelquant.cli.options import more_help

    @more_help("""
        [bold]Examples[/bold]

        [cyan]one[/cyan]
        [cyan]two[/cyan]

        A note over
        two lines.
    """)
    def verb() -> None:
        """Does something."""

    assert verb.__doc__ == ("Does something.\n\n[bold]Examples[/bold]\n\n[cyan]one[/cyan]\n[cyan]two[/cyan]\n\nA note over two lines.")


KERNELS = ("int8 tiles", int8_tiles), ("int8 quads", int8), ("int16 pairs", int16_madd)


def test_quantize_ends_with_the_proof(quantized: tuple[Path, Any]) -> None:
    out, result = quantized
    assert result.exit_code == 0, result.output
    kernel = next(name for name, here in KERNELS if here.available() is None)
    layers = "quantized, 2 skipped (they stay float)"
    for words in (layers, "smaller than float32", kernel, "simulated", "Largest errors", "TDScore", str(out)):
        assert words in result.stdout
    assert result.stderr == ""
    assert json.loads((out / "report.json").read_text())["seed"] == 3


def test_the_folder_opens_again(quantized: tuple[Path, Any]) -> None:
    from diffusers import DiffusionPipeline

    from reelquant.nn import quantized_layers

    assert len(quantized_layers(DiffusionPipeline.from_pretrained(quantized[0]).transformer)) > 10


def test_json_is_one_document_and_nothing_else(model: Path, tmp_path: Path) -> None:
    result = invoke("quantize", model, "-r", "w8a16", "-o", tmp_path / "out", "--json")
    report = json.loads(result.stdout)
    assert report["output"] == str(tmp_path / "out")
    assert report["ratio"] > 2
    assert result.stderr == ""


def test_force_replaces_an_earlier_folder(model: Path, tmp_path: Path) -> None:
    words = ("quantize", model, "-r", "w8a16", "-o", tmp_path / "out")
    assert invoke(*words).exit_code == 0
    assert "already exists" in fails(*words)
    assert invoke(*words, "--force").exit_code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


BAD_WORDS = {
    "unknown recipe": (["-r", "qvd-w8a9"], "did you mean 'qvd-w8a8'?"),
    "unknown key": (["-r", "w8a16", "--set", "calibrat.steps=3"], "did you mean 'calibrate'?"),
    "value that cannot be": (["-r", "qvd-w8a8", "--set", "calibrate.prompts=many"], "calibrate.prompts"),
    "unknown format": (["-r", "w8a16", "--set", "defaults.weight.format=int44"], "did you mean 'int4'?"),
    "no value": (["-r", "w8a16", "--set", "calibrate"], "key=value"),
    "no yaml": (["-r", "w8a16", "--set", "name=[1"], "not a YAML value"),
    "unknown layer": (["-r", "w8a16", "--skip", "blocks.0.atn1.to_q"], "did you mean 'blocks.0.attn1.to_q'?"),
    "nothing left": (["-r", "w8a16", "--skip", "*"], "quantizes none"),
    "unknown dtype": (["-r", "w8a16", "--dtype", "float61"], "did you mean 'float16'?"),
    "unknown device": (["-r", "w8a16", "--device", "gpu"], "it has cpu"),
    "no prompt file": (["-r", "minmax-w8a8", "--prompts", "/nowhere/texts.txt"], "does not exist"),
}


@pytest.mark.parametrize(("words", "expected"), BAD_WORDS.values(), ids=list(BAD_WORDS))
def test_bad_words_are_one_clear_line_and_leave_nothing(model: Path, tmp_path: Path, words: list[str], expected: str) -> None:
    assert expected in fails("quantize", model, "-o", tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_file_with_nothing_in_it(model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n  \n# a comment\n")
    assert "holds no prompt" in fails("quantize", model, "-r", "minmax-w8a8", "-o", tmp_path / "out", "--prompts", texts)
    assert [file.name for file in tmp_path.iterdir()] == ["texts.txt"]


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "already exists" in fails("quantize", "no-such-model", "-r", "no-such-recipe", "-o", tmp_path / "out")


def test_a_folder_that_is_no_pipeline_survives_force(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert "not a pipeline folder" in fails("quantize", model, "-r", "w8a16", "-o", tmp_path / "out", "--force")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["tiny-dot", "/nowhere/model"])
def test_an_unknown_model_names_the_bundled_ones(tmp_path: Path, name: str) -> None:
    assert "tiny-" in fails("quantize", name, "-r", "w8a16", "-o", tmp_path / "out")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline to damage."""
    import shutil

    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_truncated_weights(copy: Path, tmp_path: Path) -> None:
    file = next((copy / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    line = fails("quantize", copy, "-r", "w8a16", "-o", tmp_path / "out")
    assert "truncated or corrupt" in line
    assert file.name in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["cp1252", pytest.param("ascii", marks=pytest.mark.full)])
def test_a_console_that_lacks_characters_does_not_fail_a_finished_run(encoding: str, model: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "reelquant", "quantize", str(model), "-r", "w8a16", "-o", str(tmp_path / "ö✓")]
    done = subprocess.run(words, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}, check=False)
    assert done.returncode == 0, done.stderr
    assert b"? " in done.stdout
    assert (tmp_path / "ö✓" / "model_index.json").is_file()


def test_a_reader_that_goes_does_not_fail_a_finished_run(quantized: tuple[Path, Any]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "reelquant", "inspect", str(quantized[0]), "--all"]
    with os.fdopen(writer, "wb") as gone:
        done = subprocess.run(words, stdout=gone, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_files_are_read_as_utf8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "reelquant.json").write_text('{"prompts": ["une étoile ✓"]}', encoding="utf-8")
    code = f"from reelquant.models.sampling import folder_notes; print(ascii(folder_notes({str(tmp_path)!r})['prompts'][0]))"
    env = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, check=True, text=True)
    assert done.stdout.strip() == ascii("une étoile ✓")


def test_pickled_weights_are_refused(copy: Path, tmp_path: Path) -> None:
    next((copy / "transformer").glob("*.safetensors")).unlink()
    (copy / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "pickle file and is refused" in fails("quantize", copy, "-r", "w8a16", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["w8a16", "minmax-w8a8"])
def test_weights_that_are_not_finite(copy: Path, tmp_path: Path, recipe: str) -> None:
    from safetensors.torch import load_file, save_file

    file = next((copy / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["blocks.0.ffn.net.2.weight"][0, 0] = float("nan")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    assert "NaN" in fails("quantize", copy, "-r", recipe, "-o", tmp_path / "out", *([] if recipe == "w8a16" else SHORT))
    assert not (tmp_path / "out").exists()


def test_interrupting_exits_130_and_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reelquant.engine.report.Report.save", interrupted)  # in the middle of writing
    result = invoke("quantize", model, "-r", "w8a16", "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(reelquant.RecipeError):
        CliRunner().invoke(app, ["--debug", "recipes", "qvd"], catch_exceptions=False)


def test_errors_that_are_not_ours_are_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr("reelquant.recipes.recipe.load_recipe", broken)
    assert fails("recipes", "w8a16") == "reelquant: unexpected ZeroDivisionError: first second (`reelquant --debug ...` shows where)"


# ---------------------------------------------------------------------------------------------------------------------- generate


def test_generate_from_a_quantized_folder(quantized: tuple[Path, Any], tmp_path: Path) -> None:
    result = invoke("generate", quantized[0], "-p", "a red ball", "-o", tmp_path / "a.mp4", "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "5 frames of 16x16" in result.stdout
    assert read_video(tmp_path / "a.mp4").shape == (5, 3, 16, 16)


def test_generate_takes_sizes_and_repeats_itself(model: Path, tmp_path: Path) -> None:
    words = ["-p", "a red ball", "--steps", 1, "--frames", 9, "--height", 16, "--width", 32, "--guidance", 1, "--seed", 4, "--json"]
    first = json.loads(invoke("generate", model, *words, "-o", tmp_path / "a.png").stdout)
    assert (first["frames"], first["height"], first["width"], len(first["files"])) == (9, 16, 32, 9)
    invoke("generate", model, *words, "-o", tmp_path / "b.png")
    assert (tmp_path / "a-008.png").read_bytes() == (tmp_path / "b-008.png").read_bytes()


def test_generate_refuses_what_cannot_be(model: Path, tmp_path: Path) -> None:
    words = ("generate", model, "-p", "a red ball", "--steps", 1)
    assert "end it in .mp4, .gif, .png" in fails(*words, "-o", tmp_path / "a.avi")
    assert "prompt is empty" in fails("generate", model, "-p", "  ", "-o", tmp_path / "a.gif")
    (tmp_path / "a-000.png").write_text("")
    assert "already exists" in fails(*words, "-o", tmp_path / "a.png")
    assert [file.name for file in tmp_path.iterdir()] == ["a-000.png"]


# ----------------------------------------------------------------------------------------------------------- inspect and recipes


def test_inspect_shows_roles_ranges_and_temporal_features(model: Path) -> None:
    result = invoke("inspect", model, "--steps", 3)
    assert result.exit_code == 0, result.output
    for words in ("WanTransformer3DModel", "temporal", "condition_embedder.time_proj", "coverage", "TDScore 8 bit", "timestep = timestep"):
        assert words in result.stdout


def test_inspect_as_json_without_sampling(model: Path) -> None:
    found = json.loads(invoke("inspect", model, "--no-run", "--json").stdout)
    assert {layer["role"] for layer in found["layers"]} == {"entry", "main", "temporal", "prompt", "exit"}
    assert ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_v"] in [group["layers"] for group in found["groups"]]
    assert "activations" not in found


def test_inspect_a_quantized_folder(quantized: tuple[Path, Any]) -> None:
    found = json.loads(invoke("inspect", quantized[0], "--json").stdout)
    assert found["quantized_layers"] > 10


def test_recipes_are_listed_and_explained(tmp_path: Path) -> None:
    assert "qvd-w8a8" in invoke("recipes").stdout
    listed = {one["name"]: one for one in json.loads(invoke("recipes", "--json").stdout)}
    assert listed["w8a16"]["needs_data"] is False and listed["qvd-w8a8"]["needs_data"] is True
    one = invoke("recipes", "minmax-w4a8").stdout
    assert "int4, a scale per group-64, range by minmax" in one
    assert "summary: Plain static" in one  # the YAML itself
    assert json.loads(invoke("recipes", "w8a16", "--json").stdout)["calibrate"] is None


def test_a_recipe_file_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("name: mine\ndefaults: {weight: {format: int8, granularity: chanel}}\n")
    assert "chanel" in fails("recipes", file)
    assert "did you mean 'w8a16'?" in fails("recipes", "w8a61")


# -------------------------------------------------------------------------------------------------------------------------- demo


@pytest.fixture
def small_demo(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on the tiny random pipeline with two variants."""
    demo = module("demo")
    monkeypatch.setattr("reelquant.models.pipelines.bundled_path", lambda name: model)
    monkeypatch.setattr(demo, "VARIANTS", ("minmax-w8a8", "qvd-w8a8"))
    monkeypatch.setattr(demo, "SHORTER", {"calibrate.prompts": 1, "search.prompts": 1, "search.steps": 1})
    monkeypatch.setattr(demo, "_cores", lambda: 1)


@pytest.mark.usefixtures("small_demo")
def test_demo_writes_pictures_figures_and_a_pipeline_that_opens_again(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "results.json").write_text('{"made_by": "reelquant demo"}')  # an earlier demo is replaced
    result = invoke("demo", "--pipeline", "tiny-dit", "--clips", 2, "--steps", 2, "-o", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    names = {"results.json", "tiny-dit-sheet.png", "tiny-dit.mp4", "tiny-dit.gif", "tiny-dit-qvd-w8a8"}
    assert {file.name for file in (tmp_path / "demo").iterdir()} == names
    found = json.loads((tmp_path / "demo" / "results.json").read_text())["pipelines"]["tiny-dit"]
    assert found["reopened"]["equal"] is True
    assert [one["variant"] for one in found["variants"]] == ["float", "minmax-w8a8", "qvd-w8a8"]
    assert all(one["psnr_low"] <= one["psnr"] <= one["psnr_high"] for one in found["variants"][1:])
    assert "gives the same clips" in result.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["demo"]


@pytest.mark.usefixtures("small_demo")
def test_a_demo_that_is_stopped_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reelquant.evidence.variants.Comparison.measure_float", interrupted)
    assert invoke("demo", "--pipeline", "tiny-dit", "-o", tmp_path / "demo").exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_demo_replaces_no_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "results.json").write_text("{}")
    assert "not written by reelquant demo" in fails("demo", "-o", tmp_path / "demo")


# ------------------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(("count", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (15_540_000, "15.5 MB"), (3e12, "3e+03 GB")])
def test_sizes_in_words(count: float, words: str) -> None:
    assert size(count) == words


def test_figures_that_are_missing_are_dashes() -> None:
    assert [figure(None), figure(float("nan")), figure(0.5)] == ["-", "-", "0.500"]


def test_json_has_no_nan() -> None:
    assert plain({"a": (1.0, float("inf")), "b": Path("x")}) == {"a": [1.0, None], "b": "x"}


def test_settings_are_yaml() -> None:
    found = settings(["a.b=10", "c=[0.5, 1.0]", "d=null", "e=on", "f=int4", "g=a=b"])
    assert found == {"a.b": 10, "c": [0.5, 1.0], "d": None, "e": "on", "f": "int4", "g": "a=b"}


def test_options_become_the_names_of_diffusers() -> None:
    assert call_options(steps=3, frames=None, height=8, guidance=0.0) == {"num_inference_steps": 3, "height": 8, "guidance_scale": 0.0}


def test_bars_fill_up_and_follow_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from reelquant.cli import console

    monkeypatch.setattr(console, "err", Console(force_terminal=True, width=100, file=io.StringIO()))
    with console.Bars() as bars:
        bars.about("tiny")
        bars.phase("calibrate", 3)
        bars.advance()
        bars.phase("build", 2)
    assert [(task.description, task.completed, task.total) for task in bars._bars.tasks] == [
        ("tiny: sampling calibration clips", 3, 3),
        ("tiny: building quantized layers", 2, 2),
    ]


def test_typer_is_new_enough_to_say_what_an_error_of_usage_is() -> None:
    assert issubclass(typer.BadParameter, module("errors")._USAGE)
    assert module("errors")._USAGE.__name__ == "ClickException"


def test_another_runtime_makes_the_clip_or_says_what_is_wrong(model: Path, quantized: tuple[Path, Any], tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="pip install openvino", exc_type=ImportError)
    words = ("generate", quantized[0], "-p", "a star", "-o", tmp_path / "clip.mp4", "--steps", 2)
    made = invoke(*words, "--runtime", "openvino")
    assert made.exit_code == 0, made.output
    assert "unknown runtime 'openvin'; did you mean 'openvino'" in fails(*words, "--force", "--runtime", "openvin")
    assert "no quantized layers" in fails("generate", model, *words[2:], "--force", "--runtime", "openvino")


def test_a_broken_file_of_weights_does_not_count_as_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELQUANT_CACHE", str(tmp_path))
    (tmp_path / "weights").mkdir()
    broken = tmp_path / "weights" / WEIGHTS["lpips-alex"].files[0]
    broken.write_bytes(b"cut")
    assert "broken" in invoke("weights").stdout.replace("\n", " ")
    assert json.loads(invoke("weights", "--json").stdout)["lpips-alex"] is None
    asked = list[str]()
    monkeypatch.setattr("reelquant.evidence.networks.download.fetch", asked.append)
    invoke("weights", "lpips-alex")
    assert asked == ["lpips-alex"]


@pytest.mark.parametrize("words", [("recipes", "--json"), ("evaluate", "--help")], ids=" ".join)
def test_output_that_is_not_read_to_its_end_is_no_error(words: tuple[str, ...]) -> None:
    """As with ``| head``: the other end of the pipe is closed."""
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-m", "reelquant", *words], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert ended.stderr == b"" and ended.returncode in (1, 141)  # 1 is what rich makes of it


def test_n_means_clips_and_benchmark_still_takes_it_for_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: dict[str, Any] = {}

    def measured(*_: Any, **how: Any) -> None:
        heard.update(how)
        raise ReelQuantError("enough")

    monkeypatch.setattr(sys.modules["reelquant.cli.benchmark"], "_measure", measured)
    old = invoke("benchmark", "tiny-dit", "--reference", "tiny-unet", "-n", 7)
    assert heard["rounds"] == 7 and "write --rounds" in old.stderr
    new = invoke("benchmark", "tiny-dit", "--reference", "tiny-unet", "--rounds", 3)
    assert heard["rounds"] == 3 and "write --rounds" not in new.stderr
