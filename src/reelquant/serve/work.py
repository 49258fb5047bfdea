"""The queue: jobs one after the other, each in a process of its own, so that a crash or a cancelled job leaves the page as it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from reelquant._errors import CheckpointError, printable
from reelquant.serve import jobs
from reelquant.serve.commands import WORKS, Work
from reelquant.serve.folder import STATE, Folder
from reelquant.serve.jobs import Job, State

POLL = 0.1  # seconds between two looks at a process
GRACE = 30.0  # seconds that a cancelled process has to end before it is killed
TAIL = 65_536  # bytes of its stderr that are read at a time
LAST = 300  # letters of its last words


class Running(Protocol):
    """A process."""

    @property
    def pid(self) -> int | None: ...

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        ...


Launch = Callable[[list[str], Path, Path, Path], Running]
"""Starts ``reelquant`` with some words in a folder; its output and its errors go to two files, which are there when this returns."""


def launch(words: list[str], folder: Path, out: Path, err: Path) -> Running:
    """A new interpreter. It imports nothing from the folder that it works in, and asks no network."""
    cache = str(folder / STATE / "cache")
    own = {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": cache, "REELQUANT_CACHE": cache} | _search_path()
    command = [sys.executable, "-P", "-m", "reelquant", *words]
    with out.open("wb") as output, err.open("wb") as errors:
        return subprocess.Popen(
            command, cwd=folder, env=os.environ | own, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
        )


def _search_path() -> dict[str, str]:
    """``PYTHONPATH``, if it is set, with relative places (an empty one is the present folder) as this process means them."""
    places = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(os.path.abspath(one) for one in places.split(os.pathsep))} if places else {}


class Queue:
    """Jobs in the order in which they were added.

    Args:
        folder: the served one.
        start: starts a process.
    """

    def __init__(self, folder: Folder, start: Launch = launch) -> None:
        self._folder, self._start = folder, start
        self.records = folder.own("jobs")
        self._jobs = {job.number: job for job in jobs.read_all(self.records)}
        self._commands: dict[str, list[list[str]]] = {}
        self._changed = threading.Condition()
        self._stop: set[str] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------- asked by the page

    def add(self, work: Work, number: str | None = None) -> Job:
        """A new job behind the others.

        Args:
            work: what it does.
            number: its name; None for a new one.
        """
        job = Job.of(work, number)
        with self._changed:
            self._jobs[job.number], self._commands[job.number] = job, work.commands
            jobs.write(self.records, job)
            self._changed.notify_all()
        return job

    def cancel(self, number: str) -> None:
        """End a job that waits or runs.

        Raises:
            CheckpointError: if there is no such job.
        """
        with self._changed:
            job = self._get(number)
            if job.state is State.WAITING:
                self._finish(job, State.CANCELLED, "it had not begun")
            elif job.state is State.RUNNING:
                self._stop.add(number)
                job.phase, job.done, job.total = "stopping", 0, 0

    def again(self, number: str) -> Job:
        """Start a job again that did not end well: under its number, and going on where it can.

        Raises:
            ReelQuantError: if there is no such job, or its form is refused now.
        """
        with self._changed:
            job = self._get(number)
            if job.state not in jobs.AGAIN:
                raise CheckpointError(f"job '{job.title}' is {job.state}; only jobs that did not end well are started again")
            try:
                work = WORKS[job.kind](self._folder, job.form, again=True)
            except KeyError as error:
                raise CheckpointError(f"the record of job '{job.title}' lacks {error}; remove it and fill in the form again") from None
            del self._jobs[number]  # behind the others
            return self.add(work, number)

    def forget(self, number: str) -> None:
        """Delete the record of a job that has ended; what it made stays.

        Raises:
            CheckpointError: if there is no such job, or it has not ended.
        """
        with self._changed:
            job = self._get(number)
            if job.state in jobs.OPEN:
                raise CheckpointError(f"job '{job.title}' is {job.state}; cancel it first")
            del self._jobs[number]
            for file in self.records.glob(f"{number}.*"):
                file.unlink(missing_ok=True)

    def jobs(self) -> list[Job]:
        """All of them, the oldest first."""
        with self._changed:
            return list(self._jobs.values())

    def job(self, number: str) -> Job | None:
        """One of them."""
        with self._changed:
            return self._jobs.get(number)

    def close(self) -> None:
        """End the process that runs, and wait for it; the records say that what had not ended was interrupted."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _get(self, number: str) -> Job:
        if number not in self._jobs:
            raise CheckpointError(f"no job '{number:.60}'; refresh the page")
        return self._jobs[number]

    # ------------------------------------------------------------------------------------------------------- in the thread

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._run(job, self._commands.pop(job.number))
            except Exception as error:  # no process, no room for records: the jobs behind it go on
                with self._changed:
                    self._finish(job, State.FAILED, printable(str(error)))

    def _next(self) -> Job | None:
        with self._changed:
            while not self._closing:
                for job in self._jobs.values():
                    if job.state is State.WAITING:
                        job.state, job.started = State.RUNNING, time.time()
                        return job
                self._changed.wait()
        return None

    def _run(self, job: Job, commands: list[list[str]]) -> None:
        said = ""
        for part, words in enumerate(commands):
            out, err = (self.records / f"{job.number}.{part}.{end}" for end in ("out", "err"))
            with self._changed:
                if job.number in self._stop:
                    return self._finish(job, State.CANCELLED, "between two commands")
                job.part, job.phase, job.done, job.total, job.seconds = part, "starting", 0, 0, 0.0
                jobs.write(self.records, job)
            ended = self._watch(job, self._start(["--progress", "json", *words], self._folder.root, out, err), err)
            made = jobs.document(out)
            if self._closing and ended != 0:
                return None  # the record says `running`, which the next server reads as interrupted
            if (state := self._state(job, ended, made)) is not State.DONE:
                with self._changed:
                    return self._finish(job, state, reason(made, err, ended))
            said = jobs.summary(job.kind, made)
        with self._changed:
            return self._finish(job, State.DONE, said)

    def _state(self, job: Job, ended: int, made: dict[str, Any]) -> State:
        if ended == 0 or (made and "error" not in made):  # a missed gate is a result
            return State.DONE
        return State.CANCELLED if job.number in self._stop else State.FAILED

    def _watch(self, job: Job, process: Running, err: Path) -> int:
        """Follow the progress until the process ends; its exit code."""
        read, asked, rest = 0, 0.0, b""
        while (code := process.poll()) is None:
            if (job.number in self._stop or self._closing) and process.pid is not None:
                asked = _ask(process.pid, asked)
            with err.open("rb") as file:
                file.seek(read)
                text = file.read(TAIL)
            read += len(text)
            *lines, rest = (rest + text).split(b"\n")
            found = [one for one in map(jobs.progress_in, lines) if one is not None]
            with self._changed:
                if found and job.number not in self._stop:
                    vars(job).update(found[-1])
            time.sleep(POLL)
        return code

    def _finish(self, job: Job, state: State, said: str) -> None:
        job.state, job.said, job.ended = state, said, time.time()
        self._stop.discard(job.number)
        jobs.write(self.records, job)


def _ask(pid: int, asked: float) -> float:
    """Ask a process to stop, once; kill it if it does not end. When it was asked.

    By SIGTERM: a process of a server in the background begins its life deaf to Ctrl-C.
    """
    now = time.monotonic()
    try:
        if not asked:
            os.kill(pid, signal.SIGTERM)
            return now
        if now - asked > GRACE:
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return asked


def reason(made: dict[str, Any], err: Path, code: int) -> str:
    """Why a process ended, in its own words."""
    error = made.get("error")
    if isinstance(error, dict) and error.get("message"):
        return printable(str(error["message"]))
    words = err.read_bytes()[-TAIL:].decode("utf-8", "replace").splitlines()
    said = [line for line in words if line.strip() and not line.startswith('{"progress"')]
    last = f": {printable(said[-1].strip())[:LAST]}" if said else "; is there memory enough?"
    return f"its process ended with code {code} and no result{last}"
