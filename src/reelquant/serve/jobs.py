"""The record of a job: what it runs, how far it is, how it ended. One JSON file for each, in the served folder."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from reelquant._numbers import figure, size
from reelquant.serve.commands import NUMBER, Work, new_number
from reelquant.serve.files import read_object, write_object


class State(StrEnum):
    """Where a job stands. ``interrupted``: the server ended before it did."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"


OPEN = (State.WAITING, State.RUNNING)
AGAIN = (State.FAILED, State.CANCELLED, State.INTERRUPTED)  # can be started again


@dataclass
class Job:
    """One job.

    Attributes:
        number: its name, which begins with the time when it was added.
        kind, title, output, form: as in :class:`~reelquant.serve.commands.Work`.
        state: where it stands.
        started, ended: seconds since 1970; None before.
        parts, part: how many commands it runs one after the other, and the number of the present one.
        phase, done, total, seconds: what the command does now, how many steps of it are done, and for how long.
        said: its result: figures, the error, or what a cancelled run kept.
    """

    number: str
    kind: str
    title: str
    output: str
    form: dict[str, Any] = field(default_factory=dict)
    parts: int = 1
    state: State = State.WAITING
    started: float | None = None
    ended: float | None = None
    part: int = 0
    phase: str = ""
    done: float = 0
    total: float = 0
    seconds: float = 0.0
    said: str = ""

    @classmethod
    def of(cls, work: Work, number: str | None = None) -> Job:
        """A new job that waits."""
        return cls(number or new_number(), work.kind, work.title, work.output, work.form, len(work.commands))

    @property
    def left(self) -> float | None:
        """Seconds until the phase ends, if its steps take as long as those before."""
        return None if self.state is not State.RUNNING or not self.done else self.seconds / self.done * max(self.total - self.done, 0)

    def shown(self) -> dict[str, Any]:
        """What the page shows of it."""
        now = self.ended or time.time()
        took = None if self.started is None else now - self.started
        names = ("number", "kind", "title", "output", "state", "part", "parts", "phase", "done", "total", "said")
        rest = {"took": took, "left": self.left, "again": self.state in AGAIN, "open": self.state in OPEN}
        return {name: getattr(self, name) for name in names} | rest


RECORD = TypeAdapter(Job)  # checks types; unknown keys are left out


def write(folder: Path, job: Job) -> None:
    """Keep the record."""
    write_object(folder / f"{job.number}.json", asdict(job))


def read_all(folder: Path) -> list[Job]:
    """The jobs of earlier servers, oldest first. One that had not ended was interrupted. Records of another shape are left out."""
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return [job for file in files if NUMBER.fullmatch(file.stem) and (job := _read(file)) is not None]


def _read(file: Path) -> Job | None:
    try:
        job = RECORD.validate_python(read_object(file) | {"number": file.stem})
    except ValidationError:
        return None
    if job.kind not in SUMMARIES:
        return None
    if job.state in OPEN:
        job.state, job.said = State.INTERRUPTED, "the server ended before this job did; start it again, and it goes on where it can"
    return job


# ---------------------------------------------------------------------------------------------------------------------- ends


def document(out: Path) -> dict[str, Any]:
    """The JSON document that a command printed; empty without one."""
    return read_object(out)


def summary(kind: str, made: dict[str, Any]) -> str:
    """A sentence on what a command made."""
    return SUMMARIES[kind](made)


def _quantized(made: dict[str, Any]) -> str:
    before, after = made.get("bytes_model_float"), made.get("bytes_model")
    ratio = f", {before / after:.2f}x smaller" if before and after else ""
    psnr = f"; {figure(made['latent_psnr'], 'dB')} to float" if made.get("latent_psnr") else ""
    return f"{size(before)} to {size(after)}{ratio}{psnr}"


def _compared(made: dict[str, Any]) -> str:
    warning = f"; {made['warning']}" if made.get("warning") else ""
    return f"{made.get('frames')} frames of {made.get('width')}x{made.get('height')}{warning}"


def _evaluated(made: dict[str, Any]) -> str:
    gate = made.get("gate") or {}
    verdict = "" if not gate else f"gate {gate.get('preset')} {'passed' if gate.get('passed') else 'failed'}; "
    return f"{verdict}PSNR {figure(made.get('psnr'), 'dB')}"


SUMMARIES = {"quantize": _quantized, "compare": _compared, "evaluate": _evaluated}


def progress_in(line: bytes) -> dict[str, Any] | None:
    """What a line of stderr says of the progress, as ``--progress json`` writes it; None for other lines."""
    if not line.startswith(b'{"progress"'):
        return None
    try:
        found = json.loads(line)["progress"]
        return {"phase": str(found["phase"]), **{key: float(found[key]) for key in ("done", "total", "seconds")}}
    except (ValueError, KeyError, TypeError):
        return None
