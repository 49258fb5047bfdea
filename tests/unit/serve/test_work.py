"""The queue: jobs in turn, how each ends, and what a new server makes of what an old one left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reelquant._errors import CheckpointError
from reelquant.serve import jobs, work
from reelquant.serve.commands import Work
from reelquant.serve.folder import Folder
from reelquant.serve.jobs import Job, State
from reelquant.serve.work import Queue
from tests.unit.serve.models import pipeline

FORM = {"model": "./m", "recipe": "w8a16", "name": "out", "device": "cpu", "dtype": "float32", "resumable": True}
MADE = {"bytes_model_float": 400, "bytes_model": 100}
STOPPED = {"error": {"kind": "terminated", "message": "terminated, finished work is in 'x': continue with --resume", "exit_code": 143}}
PROGRESS = {"progress": {"bar": 0, "phase": "sampling", "done": 1, "total": 4, "seconds": 2.0}}


def ends(document: object, code: int = 0, errors: str = "") -> str:
    """Python code that ends like this."""
    return f"import sys; sys.stdout.write({json.dumps(document)!r}); sys.stderr.write({errors!r}); sys.exit({code})"


WAITS = f"""
import json, signal, sys, time
def stop(*_):
    sys.stdout.write({json.dumps(STOPPED)!r}); sys.stdout.flush(); sys.exit(143)
signal.signal(signal.SIGTERM, stop)
sys.stderr.write({json.dumps(PROGRESS)!r} + "\\n"); sys.stderr.flush()
time.sleep(60)
"""
DEAF = 'import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.stderr.write("up"); sys.stderr.flush(); time.sleep(60)'


class Scripts:
    """Starts Python code instead of the command line; remembers the words."""

    def __init__(self, *codes: str) -> None:
        self.codes, self.words = list(codes), list[list[str]]()

    def __call__(self, words: list[str], folder: Path, out: Path, err: Path) -> Any:
        self.words.append(words)
        with out.open("wb") as output, err.open("wb") as errors:
            return subprocess.Popen([sys.executable, "-S", "-c", self.codes.pop(0)], cwd=folder, stdout=output, stderr=errors)


Made = Callable[..., Queue]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    pipeline(tmp_path / "m")
    return Folder(tmp_path)


@pytest.fixture
def queue(folder: Folder) -> Iterator[Made]:
    made: list[Queue] = []

    def begin(*codes: str, start: Any = None) -> Queue:
        made.append(Queue(folder, start or Scripts(*codes)))
        return made[-1]

    yield begin
    for one in made:
        one.close()


def job(kind: str = "quantize", parts: int = 1) -> Work:
    return Work(kind, "a title", [["words"]] * parts, "out", dict(FORM))


def until(queue: Queue, number: str, *states: State, seconds: float = 20) -> Job:
    end = time.monotonic() + seconds
    while True:
        found = queue.job(number)
        assert found is not None and time.monotonic() < end, found
        if found.state in states:
            return found
        time.sleep(0.02)


def test_jobs_run_one_after_the_other_and_say_what_they_made(queue: Made) -> None:
    found = queue(ends(MADE), ends({"psnr": 51.2, "gate": {"preset": "default", "passed": False}}, code=1))
    first, second = found.add(job()), found.add(job("evaluate"))
    assert until(found, first.number, State.DONE).said == "400 bytes to 100 bytes, 4.00x smaller"
    ended = until(found, second.number, State.DONE)
    assert ended.said == "gate default failed; PSNR 51.2 dB", "a missed gate is a result, not a failure"
    assert first.ended and second.started and first.ended <= second.started


def test_progress_and_remaining_time_are_followed_and_cancel_says_what_is_kept(queue: Made) -> None:
    found = queue(WAITS)
    number = found.add(job()).number
    until(found, number, State.RUNNING)
    end = time.monotonic() + 20
    while found.job(number).done != 1:  # type: ignore[union-attr]
        assert time.monotonic() < end
        time.sleep(0.02)
    shown = found.job(number).shown()  # type: ignore[union-attr]
    assert (shown["phase"], shown["total"], shown["left"]) == ("sampling", 4, 6.0)
    found.cancel(number)
    assert until(found, number, State.CANCELLED).said == STOPPED["error"]["message"]


def test_a_waiting_job_is_cancelled_at_once_and_the_next_one_runs(queue: Made) -> None:
    found = queue(WAITS, ends(MADE))
    first, second, third = (found.add(job()).number for _ in range(3))
    found.cancel(second)
    assert found.job(second).state is State.CANCELLED  # type: ignore[union-attr]
    until(found, first, State.RUNNING)
    found.cancel(first)
    until(found, third, State.DONE)


def test_a_process_that_does_not_listen_is_killed(queue: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "GRACE", 0.3)
    found = queue(DEAF, ends(MADE))
    number, after = found.add(job()).number, found.add(job()).number
    until(found, number, State.RUNNING)
    while not (found.records / f"{number}.0.err").is_file() or not (found.records / f"{number}.0.err").read_bytes():
        time.sleep(0.02)
    found.cancel(number)
    until(found, number, State.CANCELLED)
    until(found, after, State.DONE)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (ends({"error": {"message": "no such thing"}}, 1), "no such thing"),
        (ends("", 3, "a warning\nkilled by \x1b[31mhand\n"), "its process ended with code 3 and no result: killed by \\x1b[31mhand"),
        (
            f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})",
            "its process ended with code -9 and no result; is there memory enough?",
        ),
    ],
)
def test_a_failed_job_says_why(queue: Made, code: str, said: str) -> None:
    found = queue(code)
    assert until(found, found.add(job()).number, State.FAILED).said == said


def test_a_process_that_cannot_start_fails_its_job_alone(queue: Made) -> None:
    scripts = Scripts(ends(MADE))

    def start(words: list[str], *rest: Any) -> Any:
        if not scripts.words:
            scripts.words.append(words)
            raise OSError("no process")
        return scripts(words, *rest)

    found = queue(start=start)
    first, second = found.add(job()).number, found.add(job()).number
    assert until(found, first, State.FAILED).said == "no process"
    until(found, second, State.DONE)


def test_the_second_command_of_a_job_does_not_run_if_the_first_failed(queue: Made) -> None:
    found = queue(ends({"error": {"message": "first"}}, 1))
    assert until(found, found.add(job("compare", parts=2)).number, State.FAILED).part == 0


def test_what_a_server_left_is_interrupted_for_the_next_one_and_starts_again(queue: Made, folder: Folder) -> None:
    old = queue(WAITS)
    running, waiting = old.add(job()).number, old.add(job()).number
    until(old, running, State.RUNNING)
    old.close()
    new = queue(ends(MADE))
    assert [(one.number, one.state) for one in new.jobs()] == [(running, State.INTERRUPTED), (waiting, State.INTERRUPTED)]
    new.again(running)
    until(new, running, State.DONE)
    words = new._start.words[0]  # type: ignore[attr-defined]
    assert words == [
        "--progress",
        "json",
        "quantize",
        "./m",
        "--recipe=w8a16",
        "--device=cpu",
        "--dtype=float32",
        "--output=./out",
        "--json",
        "--resume",
    ]


def test_a_record_that_came_with_the_folder_cannot_choose_what_is_run(queue: Made, folder: Folder) -> None:
    evil = Job.of(job())
    evil.state = State.FAILED
    evil.form = {"model": "--plugin=./evil.py", "recipe": "w8a16"}
    records = folder.own("jobs")
    jobs.write(records, evil)
    (records / f"{evil.number}.json").write_text(
        json.dumps(json.loads((records / f"{evil.number}.json").read_text()) | {"commands": [["x"]]})
    )
    (records / "20260101120000000000-0123abcd.json").write_text("[1]")
    for end, wrong in (("e", {"state": "flying"}), ("f", {"started": "noon"}), ("0", {"kind": "run"}), ("1", {"form": [1]})):
        whole = json.loads((records / f"{evil.number}.json").read_text())
        (records / f"20260101120000000000-0123abc{end}.json").write_text(json.dumps(whole | wrong))
    found = queue()
    assert [one.number for one in found.jobs()] == [evil.number]
    with pytest.raises(CheckpointError):
        found.again(evil.number)
    found.job(evil.number).form = {}  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="lacks 'model'"):
        found.again(evil.number)


def test_records_are_forgotten_once_a_job_has_ended(queue: Made) -> None:
    found = queue(ends(MADE), WAITS)
    first, second = found.add(job()).number, found.add(job()).number
    until(found, first, State.DONE)
    found.forget(first)
    assert found.job(first) is None and not list(found.records.glob(f"{first}*"))
    with pytest.raises(CheckpointError, match="cancel it first"):
        found.forget(second)
    with pytest.raises(CheckpointError, match="no job"):
        found.cancel("nonsense")


@pytest.mark.parametrize("places", ["", ".", "src::."])
def test_the_interpreter_of_a_job_imports_nothing_from_the_served_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", places)  # relative places are those of the server, not of the job
    for name in ("reelquant", "typer", "json", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    process = work.launch(["--version"], tmp_path, tmp_path / "out", tmp_path / "err")
    assert os.waitpid(process.pid or 0, 0)[1] == 0, (tmp_path / "err").read_text()
    process.poll()
    assert (tmp_path / "out").read_text().startswith("reelquant ") and not (tmp_path / "imported").exists()
