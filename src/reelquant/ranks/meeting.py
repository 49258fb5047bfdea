"""Where several processes meet: a folder that all of them see.

What they make goes over files in that folder, never over a network of ours: a file that is there stays there when a process dies, and a
later run goes on from it. At the start they agree over gloo that all were asked for the same, and the first one claims the folder. After
that a process waits for files only. Every process tells in a file that it lives, so a dead one is an error of all others, not a silence.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from reelquant._errors import RanksError, ReelQuantError
from reelquant.ranks.environment import Rank, this_rank

TIMEOUT = 60.0  # seconds without a sign of life, until a process counts as lost
VARIABLE = "REELQUANT_RANK_TIMEOUT"  # other seconds
START = 10  # so many times longer the start may take: libraries come from slow disks
BEATS = 20  # signs of life within that time
POLL = 0.05, 1.0  # seconds between two looks for a file, at first and at most
LIFE = "alive"
FOLDER_HINT = "the folder has to be seen by all processes, on all machines"


def timeout() -> float:
    """Seconds without a sign of life, until a process counts as lost.

    Raises:
        RanksError: if :data:`VARIABLE` is not a positive number.
    """
    text = os.environ.get(VARIABLE, str(TIMEOUT))
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise RanksError(f"{VARIABLE} is a number of seconds, got '{text}'; for example {TIMEOUT:g}")


@dataclass
class Meeting:
    """Processes that work together, in the eyes of one of them.

    Attributes:
        folder: that all of them see.
        rank: which one this is.
        run: a word that all processes of this run share, and no other run has.
    """

    folder: Path
    rank: Rank
    run: str
    _heard: dict[int, tuple[Any, float]] = field(default_factory=dict)  # the last sign of life of a process, and when it was new

    def owns(self, number: int) -> bool:
        """Whether a unit of work belongs to this process: they are dealt out in turn."""
        return number % self.rank.count == self.rank.number

    def wait(self, there: Callable[[], bool], words: str) -> None:
        """Return when something is there that another process makes.

        Raises:
            RanksError: if a process failed, or gave no sign of life for :func:`timeout` seconds.
        """
        pause, most = POLL
        looked = 0.0
        while not there():
            if time.monotonic() - looked > most:
                self._look(words)
                looked = time.monotonic()
            time.sleep(pause)
            pause = min(pause * 1.5, most)

    def _look(self, words: str) -> None:
        """Raise if one of the others failed or is lost; those that are done with everything may be gone."""
        for number in range(self.rank.count):
            said = None if number == self.rank.number else self._said(number)
            if said is None:
                continue
            if said.get("failed"):
                raise RanksError(f"process {number} of {self.rank.count} failed: {said['failed']}", consequence=True)
            before = self._heard.get(number)
            if before is None or before[0] != said:
                self._heard[number] = said, time.monotonic()
            elif not said.get("left") and time.monotonic() - before[1] > timeout():
                raise RanksError(
                    f"process {number} of {self.rank.count} gave no sign of life for {timeout():g} s while this one waited for {words}: "
                    f"it was killed, or its machine is gone. What is finished is in '{self.folder}': start the same command again",
                    consequence=True,
                )

    def _said(self, number: int) -> dict[str, Any]:
        """What another process wrote last in this run; empty before it wrote anything."""
        try:
            said = json.loads((self.folder / LIFE / str(number)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return said if said.get("run") == self.run else {}

    def say(self, beat: int, **more: Any) -> None:
        """Give a sign of life, or the last word."""
        file = self.folder / LIFE / str(self.rank.number)
        temporary = file.with_name(f".{file.name}")
        with suppress(OSError):  # a full disk fails elsewhere, with better words
            file.parent.mkdir(exist_ok=True)
            temporary.write_text(json.dumps({"run": self.run, "beat": beat, **more}), encoding="utf-8")
            temporary.replace(file)

    def all_left(self) -> None:
        """Wait until the others need nothing of the folder any more; those that are lost need nothing either."""
        with suppress(RanksError):
            self.wait(lambda: all(self._said(n).get("left") for n in range(self.rank.count) if n != self.rank.number), "the others to end")


@contextmanager
def meeting(folder: Path, facts: Mapping[str, Any], claim: Callable[[], None], rank: Rank | None = None) -> Iterator[Meeting]:
    """Work together with the processes that were started together with this one.

    Args:
        folder: where all of them meet.
        facts: what this process was asked for, as plain data; it has to be the same in all of them.
        claim: makes the folder ready, in the first process only; the others begin when that is done.
        rank: of this process, by default what its launcher says.

    Raises:
        RanksError: if processes were asked for different things, if one is missing, or if the first could not claim the folder.
    """
    rank = rank or this_rank()
    if rank.alone:
        claim()
        yield Meeting(folder, rank, uuid.uuid4().hex)
        return
    run = _agreed(rank, facts, claim)
    if not folder.is_dir():
        raise RanksError(f"process {rank.number} does not see '{folder}', which the first one made: {FOLDER_HINT}")
    here = Meeting(folder, rank, run)
    with _living(here):
        yield here


@contextmanager
def _living(here: Meeting) -> Iterator[None]:
    """Give signs of life inside, and a last word at the end: why this process failed, or that it is done."""
    over, beats = threading.Event(), iter(range(2**62))

    def beat() -> None:
        here.say(next(beats))
        while not over.wait(timeout() / BEATS):
            here.say(next(beats))

    thread = threading.Thread(target=beat, name="signs of life", daemon=True)
    thread.start()
    last: dict[str, Any] = {"left": True}
    try:
        yield
    except BaseException as error:
        last = {"failed": " ".join(str(error).split()) or type(error).__name__}
        raise
    finally:
        over.set()
        thread.join()
        here.say(next(beats), **last)


def _agreed(rank: Rank, facts: Mapping[str, Any], claim: Callable[[], None]) -> str:
    """Compare what all processes were asked for, and claim the folder: the word for this run."""
    import torch.distributed as dist

    own = json.loads(json.dumps(facts, default=str))
    with _group(rank) as group:
        told: list[Any] = [None] * rank.count
        dist.all_gather_object(told, own, group=group)
        for number, other in enumerate(told):
            if changed := [key for key in {**told[0], **other} if told[0].get(key) != other.get(key)]:
                key, (first, here) = changed[0], (f"{one.get(changed[0])!r:.80}" for one in (told[0], other))
                raise RanksError(
                    f"process {number} of {rank.count} has another {key} than the first: {here}, not {first}; start all alike",
                    consequence=not rank.first,
                )
        outcome: list[Any] = [None]
        if rank.first:
            try:
                claim()
                outcome = [{"run": uuid.uuid4().hex}]
            except (ReelQuantError, OSError) as error:
                dist.broadcast_object_list([{"failed": str(error)}], src=0, group=group)
                raise
        dist.broadcast_object_list(outcome, src=0, group=group)
    if "failed" in outcome[0]:
        raise RanksError(outcome[0]["failed"], consequence=True)
    return outcome[0]["run"]


@contextmanager
def _group(rank: Rank) -> Iterator[Any]:
    """A gloo group of all processes for the start: one of its own, or one beside the group that the program has already.

    Raises:
        RanksError: if they do not find each other.
    """
    import torch.distributed as dist

    limit = timedelta(seconds=START * timeout())
    if dist.is_initialized():
        group = dist.new_group(backend="gloo", timeout=limit)
        try:
            yield group
        finally:
            dist.destroy_process_group(group)
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise RanksError(
            f"{rank.count} processes were started and {missing[0]} is not set, so they cannot find each other: torchrun and accelerate set "
            "it; under srun, export MASTER_ADDR (the first machine) and MASTER_PORT (any free port) before"
        )
    try:
        dist.init_process_group("gloo", rank=rank.number, world_size=rank.count, timeout=limit)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise RanksError(f"process {rank.number} did not find the {rank.count - 1} others at {place}: {reason:.200}") from error
    try:
        yield None
    except RuntimeError as error:
        if isinstance(error, ReelQuantError):
            raise
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise RanksError(f"a process ended before all had agreed on the work: {reason:.200}", consequence=True) from error
    finally:
        dist.destroy_process_group()
