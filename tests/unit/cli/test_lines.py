"""Progress as lines of JSON, for programs that run a verb."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from reelquant.cli import app, console
from reelquant.cli.lines import Lines
from reelquant.serve.jobs import progress_in


def said(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    lines = capsys.readouterr().err.splitlines()
    assert all(progress_in(line.encode()) for line in lines), "the page reads them"
    return [json.loads(line)["progress"] for line in lines]


def test_a_line_for_each_phase_and_for_its_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_chosen", {"progress": "json"})
    with console.Bars() as bars:
        bars.phase("calibrate", 2)
        bars.advance()  # at once: it is not told
        bars.advance()
        bars.phase("a [b] c", 3)
    told = [(one["bar"], one["phase"], one["done"], one["total"]) for one in said(capsys)]
    assert told == [
        (0, "sampling calibration clips", 0, 2),
        (0, "sampling calibration clips", 2, 2),
        (1, "a [b] c", 0, 3),
        (1, "a [b] c", 3, 3),
    ]


def test_lines_are_written_at_most_every_pause(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("reelquant.cli.lines.time.monotonic", lambda: now[0])
    lines = Lines()
    task = lines.add_task("x", 100)
    for _ in range(20):
        now[0] += 0.11
        lines.advance(task)
    assert [one["done"] for one in said(capsys)] == list(range(0, 21, 2))


def test_the_option_chooses_and_the_next_command_begins_anew() -> None:
    for words, style in ((["--progress", "json"], "json"), ([], "bars")):
        assert CliRunner().invoke(app, [*words, "recipes"]).exit_code == 0
        assert console._chosen == {"progress": style}


def test_an_unknown_style_is_one_clear_error() -> None:
    made = CliRunner().invoke(app, ["--progress", "jsn", "recipes"])
    assert made.exit_code == 1 and made.stderr == "reelquant: --progress: no 'jsn'; did you mean 'json'?\n"
