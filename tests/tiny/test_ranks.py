"""Two processes of gloo against one: the same bytes, also if one of them is killed and the command is started again."""

from __future__ import annotations

import functools
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import reelquant
from tests import processes
from tests.attack.outcomes import snapshot
from tests.tiny.stock import contents, stored_pipeline

GPTQ = """
name: shared
defaults: {weight: {format: int4, granularity: group-16}, input: {format: int8}}
rules: [{on: "role:entry | role:exit", keep: true}]
calibrate: {prompts: 4, steps: 2, probes: 1}
search: {prompts: 1, steps: 1}
steps:
  - {transform: range_integrate, power: [0.5, 1.0], on: "role:main"}
  - {solve: gptq, correct_bias: true, on: "role:main"}
"""
"""Static ranges, moments, and a choice between two candidates: five runs of the sampler calibrate, two trials choose."""
VARIES = ("report.json", "report.html", "summary.md", "SHA256SUMS")  # hold timings, or a line more after a kill
TIMEOUT = "3"


def prepared(number: int, port: int, made: str, dies_at: tuple[str, int] | None) -> None:
    """Make this process one of two, which notes the units that it makes, and dies while it makes one of them."""
    processes.as_rank(number, 2, port, {"REELQUANT_RANK_TIMEOUT": TIMEOUT})
    from reelquant.ranks import Units

    making = Units.making

    @contextmanager
    def noted(self: Units, unit: int) -> Iterator[Path]:
        with making(self, unit) as folder:
            yield folder
            if dies_at is not None and (self.folder.name.endswith(dies_at[0]) and unit == dies_at[1]):
                os.kill(os.getpid(), signal.SIGKILL)  # all is written, and the unit is not there yet
        with Path(made).open("a") as file:
            file.write(f"{self.folder.name} {unit}\n")

    Units.making = noted  # type: ignore[method-assign]


def two(
    words: Sequence[object], folder: Path, dies_at: tuple[str, int] | None = None, *, ended: bool = False
) -> tuple[list[Any], list[str], list[str]]:
    """Exit codes of two processes of a command, what they said on stderr, and the units that were made.

    Args:
        words: the command.
        folder: for what they say.
        dies_at: a phase and a unit; the second process is killed while it makes that one.
        ended: then the first one is ended, too, as torchrun does; else it has to find out.
    """
    port, made = processes.free_port(), folder / "made.txt"
    made.write_text("")
    said = [folder / f"said-{number}.txt" for number in (0, 1)]
    preparations = [functools.partial(prepared, number, port, str(made), dies_at if number else None) for number in (0, 1)]
    started = [processes.reelquant(words, said[number], preparations[number]) for number in (0, 1)]
    if ended:
        started[1].join()
        started[0].terminate()
    for process in started:
        process.join()
    return [process.exitcode for process in started], [file.read_text() for file in said], sorted(made.read_text().splitlines())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_pipeline(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("single")
    (folder / "recipe.yaml").write_text(GPTQ)
    pipe = reelquant.open_pipeline(model)
    reelquant.save(pipe, folder / "out", reelquant.quantize(pipe, folder / "recipe.yaml"))
    return folder


def test_a_killed_process_is_an_error_of_the_other_and_both_go_on_to_the_bytes_of_one(model: Path, single: Path, tmp_path: Path) -> None:
    words = ("quantize", model, "-r", single / "recipe.yaml", "-o", tmp_path / "out")
    codes, said, made = two(words, tmp_path, dies_at=("calibrate", 3))
    assert codes == [1, -signal.SIGKILL]
    assert f"process 1 of 2 gave no sign of life for {TIMEOUT} s" in said[0] and "start the same command again" in said[0]
    assert "003-calibrate 1" in made and "003-calibrate 3" not in made and not (tmp_path / "out").exists()

    codes, said, again = two(words, tmp_path)
    assert codes == [0, 0] and "reelquant" not in said[1]
    assert not set(made) & set(again)  # what was finished is not made again
    units = {"001-sampled": 1, "002-sampled": 1, "003-calibrate": 5, "004-trials": 2, "005-sampled": 1}
    assert sorted([*made, *again]) == [f"{phase} {number}" for phase, count in units.items() for number in range(count)]
    assert contents(tmp_path / "out") == contents(single / "out")
    assert not list(tmp_path.glob("out.*"))


def test_an_evaluation_that_two_began_is_ended_by_one(model: Path, single: Path, tmp_path: Path) -> None:
    words = ("evaluate", single / "out", "--reference", model, "-n", 4, "--batch", 1, "--steps", 2, "-m", "psnr", "--floor", "none")
    codes, said, made = two((*words, "-o", tmp_path / "both"), tmp_path, dies_at=("test", 3), ended=True)
    assert codes == [143, -signal.SIGKILL] and "test 1" in made and "test 3" not in made
    assert f"reelquant: terminated, finished work is in '{tmp_path / 'both'}': continue with --resume" in said[0]
    how = dict(clips=4, batch=1, num_inference_steps=2, metrics="psnr", floor=["none"])
    ended = reelquant.evaluate(single / "out", model, output=tmp_path / "both", resume=True, shared=True, **how)
    alone = reelquant.evaluate(single / "out", model, output=tmp_path / "one", **how)
    assert ended is not None and alone is not None and ended["psnr"] == alone["psnr"]
    found, expected = (
        {name: content for name, content in snapshot(tmp_path / folder).items() if Path(name).name not in VARIES}
        for folder in ("both", "one")
    )
    assert found == expected and any(name.endswith(".mp4") for name in found)


def test_a_run_in_a_folder_of_units_gives_the_bytes_of_one_in_memory(model: Path, single: Path, tmp_path: Path) -> None:
    pipe = reelquant.open_pipeline(model)
    report = reelquant.quantize(pipe, single / "recipe.yaml", shared=tmp_path / "work")
    reelquant.save(pipe, tmp_path / "out", report)
    assert contents(tmp_path / "out") == contents(single / "out")
    shutil.rmtree(tmp_path / "work" / "003-calibrate" / "000002")
    pipe = reelquant.open_pipeline(model)
    reelquant.save(pipe, tmp_path / "again", reelquant.quantize(pipe, single / "recipe.yaml", shared=tmp_path / "work"))
    assert contents(tmp_path / "again") == contents(single / "out")
