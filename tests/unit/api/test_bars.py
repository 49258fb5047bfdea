"""The progress of a verb: bars in a terminal and a notebook, nothing elsewhere, and never two of them."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import reelquant
from reelquant._progress import Silent
from reelquant.api import asked, bars
from reelquant.cli import app
from tests.tiny.stock import stored_pipeline, wan_pipeline


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def quantized(**how: Any) -> None:
    reelquant.quantize(wan_pipeline(), "w8a16", **how)


def test_a_terminal_sees_a_bar_on_stderr_and_nothing_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    quantized()
    assert "building quantized layers" in err.getvalue() and not out.getvalue()
    err.truncate(0)
    quantized(progress=False)
    assert not err.getvalue().strip("\0")


def test_a_pipe_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    err = Terminal()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", err)
    quantized()
    assert "building" not in err.getvalue()


def test_a_notebook_gets_one_line_that_is_renewed_and_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    place = types.SimpleNamespace(update=shown.append)

    def display(text: str, display_id: bool) -> Any:
        assert display_id
        shown.append(f"first {text}")
        return place

    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(HTML=str, display=display))
    with bars.shown() as bar:
        bar.phase("<b>sample", 2)
        bar.advance()
        bar.advance()
    assert [one for one in shown if one.startswith("first")] == ['first <progress value="0" max="2"></progress> 0/2 &lt;b&gt;sample']
    assert shown[-1] == '<progress value="2" max="2"></progress> 2/2 &lt;b&gt;sample'
    shell.__dict__.clear()  # IPython in a terminal has no kernel
    assert not bars.in_notebook()


def test_who_listens_gets_no_second_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Heard(Silent):
        phases: list[str]

        def phase(self, name: str, total: int) -> None:
            self.phases.append(name)

    def refuse() -> None:
        raise AssertionError("bars were drawn")

    monkeypatch.setattr(asked, "shown", refuse)
    heard = Heard()
    heard.phases = []
    quantized(progress=heard)
    assert heard.phases == ["build"]


def test_the_command_line_draws_its_own_bars_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("bars were drawn")

    monkeypatch.setattr(asked, "shown", refuse)
    folder, out = stored_pipeline(tmp_path / "wan"), tmp_path / "out"
    made = CliRunner().invoke(app, ["quantize", str(folder), "-r", "w8a16", "-o", str(out), "--components", "transformer"])
    assert made.exit_code == 0, made.output
