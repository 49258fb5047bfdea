"""The examples run as they stand: the scripts with the smallest clips, the notebooks as they are stored."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from nbformat.v4 import new_code_cell

from tests.tiny.stock import stored_pipeline

EXAMPLES = Path(__file__).parents[3] / "examples"
SMALL = ["--frames", "5", "--size", "16", "16", "--steps", "2"]
SCRIPTS = {
    "quantize_pipeline": (["--prompts", "1", *SMALL], "PSNR of one clip to float, 2 steps: "),
    "choose_recipe": (["--recipes", "w8a16", "w4a16", "--clips", "1", "--steps", "1", "--megabytes", "0.017"], "take w4a16: the best"),
    "while_loading": (SMALL, "a clip of 5 frames of 16x16, finite: True"),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_pipeline(tmp_path_factory.mktemp("examples") / "wan")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(
    name: str, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, said = SCRIPTS[name]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--pipeline", str(pipeline), *options])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert said in capsys.readouterr().out
    assert not any(tmp_path.iterdir())  # nothing is left where it was started


def test_every_example_is_listed_and_run() -> None:
    files = {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".ipynb")}
    assert {f"{name}.py" for name in SCRIPTS} | {f"{name}.ipynb" for name in NOTEBOOKS} == files
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"({name})" in listed for name in files)


NOTEBOOKS = ("quantize_and_look", "own_solver")


def test_the_notebooks_run_and_are_stored_without_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one kernel, whose names are forgotten in between: importing the libraries takes longer than all the rest."""
    books = [nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4) for name in NOTEBOOKS]
    codes = [[cell for cell in book.cells if cell.cell_type == "code"] for book in books]
    assert not any(cell.outputs or cell.execution_count for cells in codes for cell in cells)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # of this process; notebooks show their figures
    whole = books[0]
    whole.cells = [*codes[0], new_code_cell("%reset -f"), *codes[1]]
    made = nbclient.NotebookClient(whole, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = "".join(output.get("text", "") for cell in made.cells if cell.cell_type == "code" for output in cell.outputs)
    pictures = [output for cell in made.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert "w4a16: " in told and "clipped: " in told and len(pictures) == 1
