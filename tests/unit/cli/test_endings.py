"""How commands end: errors as data, what an interrupted run keeps, what can be pasted, and nothing from the libraries on the way."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from reelquant.cli import app, console, signals
from reelquant.cli.console import QUIET
from reelquant.recipes.recipe import load_recipe, names
from tests.tiny.stock import stored_pipeline

VERBS: Any = typer.main.get_command(app)
SHORT = ["--set", "calibrate.prompts=1", "--set", "search.prompts=1", "--set", "search.steps=1"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_pipeline(tmp_path_factory.mktemp("model") / "wan")


def invoke(*words: object, **options: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], **options)


def module(name: str) -> Any:
    """A module of the command line; the package names the function of the same name."""
    return importlib.import_module(f"reelquant.cli.{name}")


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def python(code: str, *words: str, **options: Any) -> Any:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False, **options)


# ------------------------------------------------------------------------------------------------------------------------ errors


def broken(*_: Any) -> Any:
    raise ZeroDivisionError("first\nsecond")


@pytest.mark.parametrize(
    ("words", "kind", "message", "code"),
    [
        (("recipes", "qvd-w8a9"), "RecipeError", "did you mean 'qvd-w8a8'?", 1),
        (("quantize", "tiny-dit", "-r", "w8a16"), "UsageError", "say where to write", 2),
        (("quantize", "tiny-dit"), "UsageError", "--recipe", 2),
        (("nonsense",), "UsageError", "No such command 'nonsense'", 2),
        (("verify", "/nowhere"), "CheckpointError", "/nowhere", 1),
        (("recipes",), "ZeroDivisionError", "first second", 1),
        (("metrics",), "interrupted", "nothing is left behind", 130),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_errors_are_json_where_the_answer_would_be(
    words: tuple[str, ...], kind: str, message: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "ZeroDivisionError":
        monkeypatch.setattr("reelquant.recipes.recipe.names", broken)
    if kind == "interrupted":
        monkeypatch.setattr("reelquant.evidence.mechanisms.Tools", interrupted)
    result = invoke(*words, "--json")
    (error,) = json.loads(result.stdout).values()
    assert (error["kind"], error["exit_code"], result.exit_code) == (kind, code, code)
    assert message in error["message"] and not error["message"].startswith("reelquant")
    assert message in " ".join(result.stderr.replace("│", " ").split())  # people read that one
    assert invoke(*words).stdout == ""


def test_a_short_option_means_one_thing() -> None:
    long = {verb: {option.opts[0] for option in command.params if "-r" in option.opts} for verb, command in VERBS.commands.items()}
    assert set().union(*long.values()) == {"--recipe"} and long["quantize"]
    for verb in ("evaluate", "benchmark"):
        result = invoke(verb, "out", "-r", "tiny-dit")
        assert result.exit_code == 2 and "--reference" in result.stderr


# -------------------------------------------------------------------------------------------------------------------- interrupted


def test_an_interrupted_quantization_says_how_to_keep_what_is_done(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reelquant.engine.report.Report.save", interrupted)
    result = invoke("quantize", model, "-r", "w8a16", "-o", tmp_path / "out")
    assert (result.exit_code, list(tmp_path.iterdir())) == (130, [])
    assert result.stderr == "reelquant: interrupted, nothing is left behind: begin with --resume, and what is done by then is kept\n"
    again = invoke("quantize", model, "-r", "w8a16", "-o", tmp_path / "out", "--resume")
    assert again.stderr == f"reelquant: interrupted, finished work is in '{tmp_path / 'out.partial'}': continue with --resume\n"


def test_a_folder_that_is_complete_is_named_if_its_gate_is_interrupted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(module("request").Request, "evaluate", interrupted)
    result = invoke("quantize", model, "-r", "w8a16", "-o", out, "--gate", "strict")
    assert result.exit_code == 130 and (out / "model_index.json").is_file()
    assert f"'{out}' is complete: go on with `reelquant evaluate {out} --reference {model} --gate strict`" in result.stderr


def test_clips_that_are_made_are_kept_and_not_made_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def one(pipe: Any, condition: Any, seed: int, call: Any, path: Path, fps: int) -> dict[str, Any]:
        if len(made) == 2 and not path.parent.joinpath("go").exists():
            raise KeyboardInterrupt
        made.append(seed)
        path.write_bytes(b"clip")
        return {"files": [path], "frames": 5, "width": 16, "height": 16, "seconds": 0.0, "warning": None}

    monkeypatch.setattr(module("generate"), "_make", one)
    monkeypatch.setattr(module("generate"), "opened", lambda *_: None)
    (tmp_path / "texts.txt").write_text("a\nb\nc\n")
    words = ("generate", model, "--prompts", tmp_path / "texts.txt", "-o", tmp_path / "clip.mp4")
    result = invoke(*words)
    assert result.stderr == f"reelquant: interrupted, 2 of 3 clips are in '{tmp_path}': continue with --resume\n"
    (tmp_path / "go").touch()
    assert "pass --force to replace it or --resume to keep it" in invoke(*words).stderr
    assert invoke(*words, "--resume").exit_code == 0 and made == [0, 1, 2]
    assert "is there already" in invoke(*words, "--resume").stdout


@pytest.mark.parametrize("words", ["", " "])
def test_nothing_to_say_is_said(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(*_: Any, **__: Any) -> None:
        with signals.keeping(lambda: words):
            raise KeyboardInterrupt

    monkeypatch.setattr("reelquant.recipes.recipe.names", kept)
    assert invoke("recipes").stderr == "reelquant: interrupted, nothing is left behind: run the same command again\n"


def test_the_inner_words_win() -> None:
    with pytest.raises(signals.Terminated) as stopped, signals.keeping(lambda: "outer"), signals.keeping(lambda: "inner"):
        raise signals.Terminated
    assert signals.told(stopped.value) == "inner"


def test_ctrl_c_before_a_verb_listens_is_answered_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["reelquant", "metrics"])
    monkeypatch.setattr("reelquant.cli.errors.Verbs.invoke", interrupted)  # typer makes a silent end of it
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("reelquant.__main__").main()
    assert ended.value.code == 130 and capsys.readouterr().err.startswith("reelquant: interrupted, nothing is left behind")


# ------------------------------------------------------------------------------------------------------------------------- paste


@pytest.mark.parametrize("name", names())
def test_a_printed_recipe_is_read_back(name: str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(invoke("recipes", name, "--yaml").stdout, encoding="utf-8")
    assert load_recipe(file).digest() == load_recipe(name).digest()


def test_a_recipe_that_extends_a_file_beside_it_is_printed_whole(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text(invoke("recipes", "w8a16", "--yaml").stdout)
    (tmp_path / "child.yaml").write_text("extends: parent.yaml\nname: child\n")
    (tmp_path / "elsewhere").mkdir()
    alone = tmp_path / "elsewhere" / "alone.yaml"
    alone.write_text(invoke("recipes", tmp_path / "child.yaml", "--yaml").stdout)
    assert load_recipe(alone).digest() == load_recipe(tmp_path / "child.yaml").digest()


def test_yaml_is_of_one_recipe() -> None:
    assert invoke("recipes", "--yaml").exit_code == invoke("recipes", "w8a16", "--yaml", "--json").exit_code == 2


def test_the_yaml_of_an_explained_recipe_keeps_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "width", 80)
    yaml, shown = (invoke("recipes", "qvd-w8a8", *more).stdout for more in (["--yaml"], []))
    assert max(map(len, yaml.splitlines())) > 80 and yaml.rstrip() in shown


@pytest.mark.parametrize("verb", sorted(VERBS.commands))
def test_no_word_of_an_example_is_broken(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = invoke(verb, "--help").stdout.split()
    examples = [line for line in VERBS.commands[verb].help.splitlines() if line.startswith("[cyan]reelquant")]
    words = [word for line in examples for word in line.partition("]")[2].partition("[/cyan]")[0].split()]
    assert words and not set(words) - set(shown)


def test_something_to_paste_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console.out, "width", 40)
    console.whole("opens with", "a" * 100)
    assert capsys.readouterr().out == f"opens with  {'a' * 100}\n"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("quantize tiny-dit --recipe qvd-w", {"qvd-w8a8", "qvd-w6a6", "qvd-w4a8"}),
        ("qua", {"quantize"}),
        ("quantize tiny", {"tiny-dit", "tiny-unet"}),
        ("evaluate out --gate ", {"strict", "default", "loose"}),
        ("recipes w8a", {"w8a16", "w8a16-fp8"}),
    ],
)
def test_the_shell_completes(words: str, found: set[str]) -> None:
    env = {"_REELQUANT_COMPLETE": "complete_bash", "COMP_WORDS": f"reelquant {words}", "COMP_CWORD": str(len(words.split(" ")))}
    result = CliRunner().invoke(app, [], prog_name="reelquant", env=env)
    assert set(result.stdout.split()) == found
    assert "--install-completion" in invoke("--help").stdout


# -------------------------------------------------------------------------------------------------------------------------- quiet

NOISY = """
import logging, warnings
logging.getLogger("torchao").warning("Skipping import of cpp extensions due to incompatible torch version")
logging.getLogger("torchao.kernel").info("told")
warnings.warn("deprecated", FutureWarning)
warnings.warn("an operator is slow")
"""
IMPORTS = """
from reelquant.cli.console import quiet_libraries
quiet_libraries()
import logging, torchao, torch
logging.getLogger("torch.utils.flop_counter").warning("triton not found")
logging.getLogger("torch._dynamo").warning("a lot")
logging.getLogger("reelquant").warning("ours")
"""


def test_libraries_are_quiet_before_a_verb_and_we_are_not(tmp_path: Path) -> None:
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text(NOISY)
    env = {name: value for name, value in os.environ.items() if name not in QUIET}
    done = python(IMPORTS, env=env | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "reelquant: ours\n")


WORKERS = """
import multiprocessing, multiprocessing.util, sys, time

def work(job, lane):
    global kept
    kept = multiprocessing.get_context("spawn").Lock()  # as progress bars of libraries have one
    multiprocessing.util.Finalize(None, time.sleep, (0.5,), exitpriority=100)  # it takes a while to end
    if job == 2:
        time.sleep(60)
    if job == 3:
        raise ValueError("three")
    return job

if __name__ == "__main__":
    from reelquant.cli.parallel import run_each
    class Lane:
        pass
    try:
        print(run_each(work, [int(word) for word in sys.argv[1:]], [Lane(), Lane()], 2))
    except ValueError:
        print("failed")
"""


@pytest.mark.parametrize(("jobs", "said"), [("01", "[0, 1]\n"), ("03", "failed\n"), ("23", "failed\n")])
def test_workers_leave_no_semaphores(jobs: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "workers.py").write_text(WORKERS)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "workers.py", *jobs], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (said, "")


@pytest.mark.parametrize("words", [("no-such-verb", "--json"), ("quantize", "--help")], ids=" ".join)
def test_nobody_reads_the_output(words: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    for streams in ({"stdout": write, "stderr": subprocess.PIPE}, {"stdout": subprocess.PIPE, "stderr": write}):
        ended = subprocess.run([sys.executable, "-m", "reelquant", *words], **streams, check=False)
        assert b"Traceback" not in (ended.stderr or b"") and b"BrokenPipe" not in (ended.stderr or b"")
        assert ended.returncode in (0, 1, 2, 141)
    os.close(write)


# --------------------------------------------------------------------------------------------------------------------------- demo


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder that must not be replaced: it may be a mount, or where the user stands."""
    target = tmp_path / "demo"
    target.mkdir()
    number = target.stat().st_ino
    yield target
    assert target.stat().st_ino == number and list(tmp_path.iterdir()) == [target]


def test_demo_fills_an_existing_empty_folder(folder: Path) -> None:
    demo = module("demo")
    with demo._replacing(demo._target(folder)) as fresh:
        (fresh / "results.json").write_text('{"made_by": "reelquant demo"}')
    assert [file.name for file in folder.iterdir()] == ["results.json"]
    (folder / "of-before").mkdir()
    with demo._replacing(demo._target(folder)) as fresh:
        (fresh / "new.gif").touch()
    assert [file.name for file in folder.iterdir()] == ["new.gif"]


def test_a_demo_that_is_stopped_leaves_an_existing_folder_as_it_was(folder: Path) -> None:
    demo = module("demo")

    def stopped() -> None:
        with demo._replacing(demo._target(folder)) as fresh:
            (fresh / "half.gif").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(folder.iterdir()) == []
    (folder / f"{demo.PARTIAL}7").mkdir()  # one that was killed
    assert demo._target(folder) == folder


# -------------------------------------------------------------------------------------------------------------- before any work


@pytest.mark.parametrize(
    "words",
    [
        ("quantize", "MODEL", "-r", "w8a16", "-o", "OUT"),
        ("quantize", "MODEL", "-r", "w8a16", "-o", "OUT", "--resume"),
        ("evaluate", "MODEL", "--reference", "MODEL", "-o", "OUT"),
        ("compare", "CLIPS", "CLIPS", "-o", "OUT"),
        ("generate", "MODEL", "-p", "a", "-o", "OUT.mp4"),
        ("export", "MODEL", "-f", "gguf", "-o", "OUT.gguf"),
        ("demo", "-o", "OUT"),
    ],
    ids=lambda words: words[0] + (" --resume" if "--resume" in words else ""),
)
def test_a_place_that_takes_no_files_is_refused_before_any_work(
    words: tuple[str, ...], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    places = {"MODEL": str(model), "CLIPS": str(tmp_path), "OUT": str(tmp_path / "file" / "out")}
    for verb in ("request", "generate"):
        monkeypatch.setattr(module(verb), "opened", lambda *_: pytest.fail("the pipeline was opened"))
    for work in (
        "evidence.run.evaluate",
        "evidence.run.compare",
        "streaming.Source.open",
        "checkpoint.export.export",
        "cli.parallel.run_each",
    ):
        monkeypatch.setattr(f"reelquant.{work}", lambda *_, work=work, **__: pytest.fail(f"{work} was called"))
    given = [next((word.replace(name, place) for name, place in places.items() if word.startswith(name)), word) for word in words]
    result = invoke(*given)
    assert result.exit_code == 1 and "cannot write" in result.stderr and str(tmp_path / "file") in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "option", [("--steps", 3), ("--seed", 1), ("--prompts", "texts.txt"), ("--guidance", 2)], ids=lambda option: option[0]
)
def test_options_of_clips_are_refused_where_no_clip_is_made(option: tuple[str, object], model: Path, tmp_path: Path) -> None:
    words = ("quantize", model, "-r", "w8a16", "-o", tmp_path / "out", *option)
    assert f"{option[0]} says nothing here: w8a16 needs no data" in invoke(*words).stderr
    assert list(tmp_path.iterdir()) == []
    if option[0] != "--prompts":
        assert invoke(*words, "--dry-run").exit_code == 0


@pytest.mark.parametrize("verb", ["evaluate", "benchmark"])
def test_pairs_that_say_nothing_are_refused_before_any_work(
    verb: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke("quantize", model, "-r", "w8a16", "-o", tmp_path / "out").exit_code == 0
    for place in ("evidence.sampling", "evidence.speed"):
        monkeypatch.setattr(f"reelquant.{place}.open_pipeline", lambda *_, **__: pytest.fail("a pipeline was opened"))
    for test, reference, says in (
        (model, model, "holds no quantized layer"),
        (tmp_path / "out", tmp_path / "out", "both the pipeline under test and its reference"),
        (tmp_path / "out", "tiny-unet", "is of type WanPipeline and its reference 'tiny-unet' of type AnimateDiffPipeline"),
        (tmp_path / "out", "tiny-dit", "is another model than that of its reference 'tiny-dit'"),
    ):
        result = invoke(verb, test, "--reference", reference, *(("-o", tmp_path / "proof") if verb == "evaluate" else ()))
        assert result.exit_code == 1 and result.stdout == "" and says in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("words", "says"), [(("--data", "empty"), "no clip in"), (("--clip-model", "/nowhere"), "no CLIP model at '/nowhere'")], ids=str
)
def test_what_is_read_last_is_looked_for_first(words: tuple[str, str], says: str, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("reelquant.evidence.sampling.open_pipeline", lambda *_, **__: pytest.fail("a pipeline was opened"))
    assert says in invoke("evaluate", model, "--reference", model, *words, "-o", "proof").stderr
    assert not (tmp_path / "proof").exists()
