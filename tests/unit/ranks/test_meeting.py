"""Processes agree over gloo, and a process that is gone is an error of the others."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from reelquant import RanksError
from reelquant.ranks import Meeting, Rank, Units, claimed, meeting
from reelquant.ranks.meeting import VARIABLE, timeout
from tests import processes

MEET = """
import json, os, sys
from pathlib import Path
from tests.processes import as_rank
number, count, port = (int(word) for word in sys.argv[1:4])
as_rank(number, count, port, {"REELQUANT_RANK_TIMEOUT": "5"})
from reelquant.ranks import Units, claimed, meeting
folder = Path(sys.argv[4])
facts = {"recipe": "a", "prompts": "some"}
try:
    from contextlib import ExitStack
    with ExitStack() as stack, meeting(folder / "work", facts, lambda: stack.enter_context(claimed(folder / "work", facts))) as here:
        units = Units(here, here.folder / "phase")
        told = units.each(5, lambda n, place: (place / "by").write_text(f"{n} by {number}"), lambda place: (place / "by").read_text())
except Exception as error:
    told = [type(error).__name__, str(error), error.consequence]
(folder / f"told-{number}.json").write_text(json.dumps(told))
"""


def met(folder: Path, count: int = 2) -> list[list[str]]:
    port = processes.free_port()
    started = [processes.begin(MEET, number, count, port, folder) for number in range(count)]
    for process in started:
        process.join()
    return [json.loads((folder / f"told-{number}.json").read_text()) for number in range(count)]


def test_processes_of_gloo_share_what_is_left_of_an_earlier_run_and_make_again_what_is_damaged(tmp_path: Path) -> None:
    facts = {"recipe": "a", "prompts": "some"}
    with claimed(tmp_path / "work", facts):
        units = Units(Meeting(tmp_path / "work", Rank(), "before"), tmp_path / "work" / "phase")
        for number in (0, 1, 2):
            with units.making(number) as place:
                (place / "by").write_text(f"{number} by an earlier run")
    units.place(2).joinpath("by").write_text("something else")
    told = met(tmp_path)
    assert told[0] == told[1] == ["0 by an earlier run", "1 by an earlier run", "2 by 0", "3 by 1", "4 by 0"]


def test_work_that_is_refused_ends_all_processes_before_anything_is_done(tmp_path: Path) -> None:
    with claimed(tmp_path / "work", {"recipe": "b", "prompts": "some"}):
        (tmp_path / "work" / "001-sampled").mkdir()
    first, second = met(tmp_path)
    assert "holds an interrupted run with another recipe; start that command again" in first[1] and first[1] == second[1]
    assert [first[2], second[2]] == [False, True]  # the first process says it


def meetings(folder: Path, run: str = "now") -> tuple[Meeting, Meeting]:
    (folder / "alive").mkdir()
    return Meeting(folder, Rank(0, 2, 0), run), Meeting(folder, Rank(1, 2, 1), run)


def test_a_process_without_a_sign_of_life_is_an_error_of_the_others_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1.2")
    first, second = meetings(tmp_path)
    second.say(0)
    began = time.monotonic()
    with pytest.raises(RanksError, match=r"process 1 of 2 gave no sign of life for 1.2 s .* start the same command again"):
        first.wait(lambda: False, "part 1")
    assert 1.2 < time.monotonic() - began < 6


def test_a_process_that_failed_says_why_to_the_others(tmp_path: Path) -> None:
    first, second = meetings(tmp_path)
    second.say(3, failed="no space left")
    with pytest.raises(RanksError, match="process 1 of 2 failed: no space left") as caught:
        first.wait(lambda: False, "part 1")
    assert caught.value.consequence


def test_what_a_process_of_an_earlier_run_said_counts_for_nothing(tmp_path: Path) -> None:
    first, _ = meetings(tmp_path)
    Meeting(tmp_path, Rank(1, 2, 1), "before").say(3, failed="no space left")
    there = iter([False, False, True])
    first.wait(lambda: next(there), "part 1")


def test_a_folder_of_other_work_is_refused_unless_it_is_given_up(tmp_path: Path) -> None:
    with claimed(tmp_path / "work", {"recipe": "a"}):
        (tmp_path / "work" / "001-sampled").mkdir()
        with pytest.raises(RanksError, match="another process works in"), claimed(tmp_path / "work", {"recipe": "a"}):
            pass
    with pytest.raises(RanksError, match="holds an interrupted run with another recipe"), claimed(tmp_path / "work", {"recipe": "b"}):
        pass
    with claimed(tmp_path / "work", {"recipe": "b"}, force=True):
        assert not (tmp_path / "work" / "001-sampled").exists()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RanksError, match="is in the way"), claimed(tmp_path, {"recipe": "a"}, force=True):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_unit_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    units = Units(Meeting(tmp_path, Rank(), "now"), tmp_path / "phase")

    def half(number: int, place: Path) -> None:
        (place / "by").write_text("half")
        raise OSError("disk is full")

    with claimed(tmp_path, {}):
        with pytest.raises(OSError, match="disk"):
            units.each(1, half, Path.exists)
        assert not units.done(0) and not any(units.folder.iterdir())
        (units.folder / ".unfinished-000001-left").mkdir()
    with claimed(tmp_path, {}):
        assert not any(units.folder.iterdir())


def test_processes_that_cannot_find_each_other_say_what_to_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RanksError, match=r"MASTER_ADDR is not set.*under srun, export"), ExitStack() as stack:
        stack.enter_context(meeting(tmp_path, {}, lambda: None, Rank(0, 2, 0)))


@pytest.mark.parametrize("text", ["soon", "0", "inf"])
def test_the_time_without_a_sign_of_life_is_a_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(RanksError, match=f"is a number of seconds, got '{text}'"):
        timeout()
