"""Text of others on the terminal and in pages, and how a command ends when it is told to."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import reelquant
from reelquant._errors import printable
from reelquant.cli import app, console, signals
from reelquant.cli.layout import facts, table
from reelquant.evidence.report.markdown import summary
from tests.grids import ALL

ROOT = Path(__file__).parents[2]
KEPT = "nothing is left behind: begin with --resume, and what is done by then is kept"
HOSTILE = ["[/bold]", "[link=file:///etc]x", "[red", "\x1b[2J\x1b]0;title\x07", "\u202egnp.exe", "\x9b31m", "<script>alert(1)</script>"]


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def clean(text: str) -> bool:
    return all(one.isprintable() or one in "\n\t" for one in text)


NAMES = ["[/bold] [red \x1b[31mred\x1b]0;a\x07 \u202eb", "[/bold] [red", "\x1b[31mred", "a\u202eb"]


@pytest.mark.parametrize("name", NAMES if ALL else NAMES[:1])
def test_hostile_names_of_folders(source: Path, tmp_path: Path, name: str) -> None:
    model, out = Path(shutil.copytree(source, tmp_path / f"in {name}")), tmp_path / f"out {name}"
    for words in (
        ("quantize", model, "-r", "w8a16", "-o", out),
        ("generate", out, "-p", "a ball", "-o", tmp_path / f"{name}.mp4", "--steps", 1),
        ("verify", out),
        ("inspect", out, "--no-run"),
        ("quantize", out, "-r", "w8a16", "-o", tmp_path / "again"),  # quantized already: an error that names it
        ("verify", tmp_path / f"gone {name}"),
    ):
        result = invoke(*words)
        assert result.exit_code == (1 if words[1] == tmp_path / f"gone {name}" or words[-1] == tmp_path / "again" else 0), result.output
        assert "unexpected" not in result.stderr and clean(result.stdout) and clean(result.stderr)
        if result.exit_code == 0 and words[0] == "quantize":
            assert printable(f"out {name}") in result.stdout.replace("\n", "")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_in_tables(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = table(text, [text], [text])
    made.add_row(text, text)
    for part in (made, facts(text, [(text, text), ("ours", console.marked("[bold]x"))])):
        console.out.print(part)
    console.done(text, text)
    seen = capsys.readouterr().out
    assert clean(seen) and printable(text)[:8] in seen


def test_a_recipe_with_hostile_texts(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text('name: "[/red] \\e[2J"\nsummary: "<b>[bold"\ndefaults: {weight: {format: int8}}\n# \x1b[31m\ncalibrate: null\n')
    result = invoke("recipes", file)
    assert result.exit_code in (0, 1) and clean(result.output) and "unexpected" not in result.output
    file.write_text(file.read_text().replace("\x1b", ""))
    result = invoke("recipes", file)
    assert result.exit_code == 0 and clean(result.output) and "[/red]" in result.output


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a\x1b[31mb", "`code` [link](x)"])
def test_hostile_texts_in_the_summary(text: str) -> None:
    side = {"name": text, "dtype": text, "recipe": text}
    data = {
        "reference": side,
        "test": side,
        "warnings": [text],
        "defects": [{"name": text, "clips": ["a"], "sentence": text}],
        "quantization": {"recipe": text, "digest": text},
        "machine": {"cpu": text, "os": text},
        "versions": {text: text},
        "tool_version": text,
        "metrics": {text: {"title": text, "value": 1.0, "unit": text, "floor": {text: {"value": 1.0}}}, "b": {"missing": text}},
        "gate": {"preset": text, "passed": False, "failures": [{"metric": text, "sentence": text}]},
    }
    found = summary(data)
    assert "<script" not in found and "<img" not in found and clean(found)
    assert "[link](x)" not in found


# ------------------------------------------------------------------------------------------------------------------------- signals


def test_what_swallows_ctrl_c_does_not_keep_the_command_going() -> None:
    with signals.terminable():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            pass  # as a library may
        with pytest.raises(KeyboardInterrupt):
            signals.stop_if_asked()
        with pytest.raises(KeyboardInterrupt):
            console.Bars().phase("sample", 1)
    signals.stop_if_asked()


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_an_import_that_makes_another_error_of_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, word: str
) -> None:
    def importing(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        except BaseException as error:
            raise ImportError("DLL load failed") from error

    monkeypatch.setattr("reelquant.models.pipelines.locate", importing)
    result = invoke("quantize", source, "-r", "w8a16", "-o", tmp_path / "out")
    assert result.exit_code == code and result.stderr == f"reelquant: {word}, {KEPT}\n"


def test_sigterm_says_what_is_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("reelquant.checkpoint.save")  # the package has a function of that name
    monkeypatch.setattr(module, "write_manifest", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    result = invoke("quantize", source, "-r", "w8a16", "-o", tmp_path / "out")
    assert result.exit_code == 143 and result.stderr == f"reelquant: terminated, {KEPT}\n"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("reelquant.streaming.run.copy_others", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    again = invoke("quantize", source, "-r", "w8a16", "-o", tmp_path / "out", "--resume")
    assert "continue with --resume" in again.stderr and again.exit_code == 143
    monkeypatch.undo()
    assert invoke("quantize", source, "-r", "w8a16", "-o", tmp_path / "out", "--resume").exit_code == 0
    assert reelquant.verify(tmp_path / "out").layers


@pytest.mark.full
@pytest.mark.parametrize("wait", [0.05, 0.2, 0.5, 1.0, 2.0])
def test_ctrl_c_at_any_time(wait: float, source: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "reelquant", "quantize", str(source), "-r", "w8a16", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, stderr=subprocess.PIPE, text=True)
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert "unexpected" not in said
    assert process.returncode in (0, 130, -signal.SIGINT)  # before Python listens, the signal ends it
