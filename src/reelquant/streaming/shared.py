"""Sampling of a pipeline in memory that several processes share, each with a copy of the pipeline.

The unit is a call of the pipeline: the sampler's run for as many clips as one process would make at a time. A process makes the runs that
are its own, and writes every output of the denoisers and what their layers saw. Then it samples all runs once more, in order, with the
denoisers answering from these files. So all processes have all results, in an order that no number of processes changes, and statistics
are absorbed in that order too: the bits are those of one process.

What comes between samplings, rewriting and solving layers, every process does for itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from reelquant._errors import CalibrationError, CheckpointError, RanksError
from reelquant._version import __version__
from reelquant.discover import denoisers_of, modules_of, plain
from reelquant.discover.probe import tensors_in
from reelquant.engine.calibration import Empty
from reelquant.engine.store import Memory
from reelquant.models.sampling import taking
from reelquant.observe import Call, InputStatistics
from reelquant.ranks import Meeting, Units, claimed, meeting
from reelquant.streaming.job import versions
from reelquant.streaming.journal import Logged, call_in, model_output, own_copy
from reelquant.streaming.log import Log

T = TypeVar("T")


class Pool:
    """The sampling of one piece of work, in the eyes of one process.

    Args:
        meeting: the processes.
        denoisers: what is called while the pipeline samples, by name.
    """

    def __init__(self, meeting: Meeting, denoisers: Mapping[str, nn.Module]) -> None:
        self.meeting, self.denoisers = meeting, denoisers
        self.turns: _Making | _Reading | None = None
        self._phases, self._dealt, self._alone = 0, 0, False

    def store(self, name: str, module: nn.Module) -> SharedStore:
        """The store of a component."""
        return SharedStore(module, self, name if name in self.denoisers else None)

    def _units(self, phase: str) -> Units:
        """Phases come in the same order in every process, and in every run of the same work. Each is dealt out where the last one ended."""
        self._phases += 1
        return Units(self.meeting, self.meeting.folder / f"{self._phases:03}-{phase}", self._dealt)

    def begun(self, phase: str, run: Callable[[], T]) -> Callable[[], T]:
        """Make this process's runs; the answer reads those of all, and waits for them."""
        if self._alone:
            result = run()
            return lambda: result
        units = self._units(phase)
        making = _Making(units, self.denoisers)
        self._by(making, run)
        self._dealt += making.unit + 1
        return lambda: self._by(_Reading(units, self.denoisers, making.made), run)

    def _by(self, turns: _Making | _Reading, run: Callable[[], T]) -> T:
        self.turns = turns
        try:
            with taking(turns):
                return run()
        finally:
            self.turns = None

    def each(self, phase: str, scores: Sequence[Callable[[], float]]) -> list[float]:
        """Scores that do not depend on each other; each is found by one process, which samples alone for it."""

        def make(number: int, folder: Path) -> None:
            self._alone = True
            try:
                (folder / "score.json").write_text(json.dumps(scores[number]()), encoding="utf-8")
            finally:
                self._alone = False

        units = self._units(phase)
        self._dealt += len(scores)
        return list(units.each(len(scores), make, _score))


def _score(unit: Path) -> float:
    return float(json.loads((unit / "score.json").read_text(encoding="utf-8")))


class SharedStore(Memory):
    """A component in memory that takes part in a shared sampling.

    Args:
        model: the component.
        pool: the sampling.
        name: of a denoiser; None for a component that every process runs for itself.
    """

    def __init__(self, model: nn.Module, pool: Pool, name: str | None) -> None:
        super().__init__(model)
        self.pool = pool
        self.keeper = None if name is None else SharedKeeper(pool, name, model)

    def begun(self, phase: str, run: Callable[[], T], *content: Any) -> Callable[[], T]:
        """What sampling gives; the runs of the sampler are shared."""
        return self.pool.begun(phase, run)

    def each(self, phase: str, scores: Sequence[Callable[[], float]]) -> list[float]:
        """Scores, shared."""
        return self.pool.each(phase, scores)


@contextmanager
def sharing(folder: Path, pipe: Any, facts: Mapping[str, Any], *, force: bool) -> Iterator[Pool]:
    """Meet the processes that were started together with this one, to share the sampling of a pipeline that each has in memory.

    Args:
        folder: where they meet; what an interrupted run of the same work left there is used.
        pipe: the pipeline.
        facts: what the work is, beside what the pipeline and this library are.
        force: give up what the folder holds of other work.

    Raises:
        RanksError: as :func:`reelquant.ranks.meeting`.
    """
    denoisers = {name: plain(module) for name, module in denoisers_of(pipe).items()}
    whole = {"reelquant": __version__, **versions(), "pipeline": type(pipe).__name__, **facts}
    whole |= {f"weights of {name}": _fingerprint(module) for name, module in modules_of(pipe).items()}
    if all(_device(module) == "cpu" for module in denoisers.values()):
        whole["number of threads"] = torch.get_num_threads()  # sums depend on it
    with ExitStack() as stack:
        held = claimed(folder, whole, force=force)
        here = stack.enter_context(meeting(folder, whole, lambda: stack.enter_context(held)))
        yield Pool(here, denoisers)
        if here.rank.first:
            here.all_left()


SAMPLED = 64
"""Values of a tensor that its fingerprint looks at."""


def _fingerprint(module: nn.Module) -> str:
    """Changes with the shapes, types and values of a module's tensors, of which some are looked at."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):  # what a module keeps beside its tensors
            continue
        flat = value.detach().flatten()
        some = flat[:: max(len(flat) // SAMPLED, 1)].cpu().double() if not value.is_meta else None
        found.update(repr((name, value.dtype, tuple(value.shape))).encode())
        found.update(b"" if some is None else some.numpy().tobytes())
    return found.hexdigest()[:16]


# --- runs -------------------------------------------------------------------------------------------------------------


class _Making:
    """A :class:`reelquant.models.sampling.Turns` that makes the runs of this process and leaves the others out.

    Attributes:
        unit: number of the present run among all of the phase.
        folder: where it is written.
        number: of the present run as the sampler counts, None before the first.
        made: units that were made here.
    """

    def __init__(self, units: Units, denoisers: Mapping[str, nn.Module]) -> None:
        self.units, self.denoisers = units, denoisers
        self.unit, self.folder = -1, Path()
        self.number: int | None = None
        self.made: set[int] = set()

    @contextmanager
    def turn(self) -> Iterator[bool]:
        self.unit += 1
        if not self.units.due(self.unit):
            yield False
            return
        with self.units.making(self.unit) as folder, ExitStack() as stack:
            self.folder = folder
            for name, denoiser in self.denoisers.items():
                log = Log(folder / f"{name}.calls")
                stack.enter_context(_answering(denoiser, functools.partial(_remembered, log, denoiser.forward)))
            yield True
        self.made.add(self.unit)

    def run(self, number: int) -> None:
        self.number = number

    partial, heard = True, True


class _Reading:
    """A :class:`reelquant.models.sampling.Turns` in which the denoisers answer what was written; it waits for what is not there yet."""

    def __init__(self, units: Units, denoisers: Mapping[str, nn.Module], made: set[int]) -> None:
        self.units, self.denoisers, self.made = units, denoisers, made
        self.unit = -1

    @contextmanager
    def turn(self) -> Iterator[bool]:
        self.unit += 1
        place = self.units.wait(self.unit)
        with ExitStack() as stack:
            answers = {name: Log(place / f"{name}.calls").frames() for name in self.denoisers}
            for name, denoiser in self.denoisers.items():
                stack.enter_context(_answering(denoiser, functools.partial(_recalled, answers[name], denoiser, place)))
            yield True
            if any(next(frames, None) for frames in answers.values()):
                raise _another_course(place)

    def run(self, number: int) -> None:
        """The numbers of runs follow from their timesteps."""

    partial = False

    @property
    def heard(self) -> bool:
        """Steps that were made here have been heard."""
        return self.unit not in self.made


def _answering(denoiser: nn.Module, answer: Callable[..., Any]) -> AbstractContextManager[None]:
    """Inside, this answers calls of a denoiser; its signature stays, which others read."""
    from reelquant.observe import exchanged

    return exchanged(denoiser, "forward", functools.wraps(denoiser.forward)(answer))


def _remembered(log: Log, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Make a call and write its output: tensors by their place, and by the name that a model output has for them."""
    output = forward(*args, **kwargs)
    keys = list(output) if isinstance(output, dict) else None
    values = list(tensors_in(output))
    names = [""] * len(values) if keys is None else keys
    log.append(0, {f"{place:03}.{key}": value.detach() for place, (key, value) in enumerate(zip(names, values, strict=True))})
    return output


def _recalled(frames: Iterator[tuple[int, dict[str, Tensor]]], denoiser: nn.Module, place: Path, /, *args: Any, **kwargs: Any) -> Any:
    """The next output that was written."""
    found = next(frames, None)
    if found is None:
        raise _another_course(place)
    device = _device(denoiser)
    values = {name: own_copy(value, device) for name, value in sorted(found[1].items())}
    named = {name.partition(".")[2]: value for name, value in values.items()}
    return tuple(values.values()) if "" in named else model_output(named)


def _device(module: nn.Module) -> str:
    return str(next((parameter.device for parameter in module.parameters()), torch.device("cpu")))


def _another_course(place: Path) -> RanksError:
    return RanksError(
        f"the sampler calls the denoiser another number of times than when '{place}' was written, so its runs cannot be shared; start one "
        "process only"
    )


# --- what layers saw --------------------------------------------------------------------------------------------------


class SharedKeeper:
    """A :class:`reelquant.engine.calibration.Keeper` of one denoiser: every run has a log per input, in the folder of its unit."""

    def __init__(self, pool: Pool, component: str, model: nn.Module) -> None:
        self.pool, self.component, self.model = pool, component, model
        self.calls: dict[tuple[int, int], Call] = {}  # unit and number of a call in it -> which call it is among all
        self._counted = Counter[int]()  # calls by unit

    def run(self) -> int | None:
        """The number of the sampler's run, where runs before it were left out."""
        turns = self.pool.turns
        return turns.number if isinstance(turns, _Making) else None

    def saw(self, call: Call) -> None:
        """Count calls in their unit."""
        assert self.pool.turns is not None
        unit = self.pool.turns.unit
        self.calls[unit, self._counted[unit]] = call
        self._counted[unit] += 1

    def keep(self, make: Callable[[], Empty], generator: torch.Generator) -> tuple[dict[str, Any], Mapping[str, InputStatistics]]:
        """Log what layers see, in the pass that makes runs; in the one that reads them, nothing is seen."""
        assert self.pool.turns is not None
        watched, inputs = make()
        self.calls, self._counted = {}, Counter()
        numbers = {name: number for number, name in enumerate(watched)}
        seeing = {name: Logged(self, numbers[name], own) for name, own in watched.items()} if self.pool.turns.partial else {}
        return seeing, Merged(self, self.pool.turns.units, {name: numbers[own.name] for name, own in inputs.items()}, inputs)

    def write(self, number: int, own: InputStatistics, seen: Mapping[str, Tensor], call: Call) -> None:
        """Log one look at an input, with the call as it counts here."""
        turns = self.pool.turns
        assert isinstance(turns, _Making)
        when = {name: torch.tensor(value) for name, value in asdict(call).items()}
        self.log(turns.folder, number).append(self._counted[turns.unit] - 1, seen | when)

    def log(self, unit: Path, number: int) -> Log:
        """What an input showed in one run."""
        return Log(unit / f"{self.component}.{number:04}")

    def as_seen(self, name: str, value: Tensor) -> Tensor:
        """A part of a look where a run in memory has it: sampled rows and counts stay on the CPU."""
        if name == "rows.rows":
            return value.float()
        return value.to(_device(self.model)) if value.dim() else value

    def call_of(self, unit: int, number: int, counted: Call) -> Call:
        """The call among all runs, given how it counted where it was made.

        Raises:
            RanksError: if the two differ in what decides which rows are sampled.
        """
        call = self.calls[unit, number]
        if not call.probe and (call.step, call.part) != (counted.step, counted.part):
            raise RanksError(
                f"run {unit} of '{self.component}' takes other timesteps than the runs before it, so runs cannot be shared; start one "
                "process only"
            )
        return call


class Merged(Mapping[str, InputStatistics]):
    """Statistics by layer name, absorbed run by run when they are asked for first.

    Attributes:
        empty: the same objects, for those who ask what kinds they are.
    """

    def __init__(self, keeper: SharedKeeper, units: Units, numbers: Mapping[str, int], empty: Mapping[str, InputStatistics]) -> None:
        self.empty, self._keeper, self._units, self._numbers = empty, keeper, units, numbers
        self._absorbed: set[int] = set()

    def __getitem__(self, name: str) -> InputStatistics:
        own, number = self.empty[name], self._numbers[name]
        if number not in self._absorbed:
            self._absorbed.add(number)
            for unit in dict.fromkeys(unit for unit, _ in self._keeper.calls):
                self._absorb(own, unit, number)
        if not own.range.seen:
            raise CalibrationError(
                f"layer '{name}' never ran while sampling (or only on empty inputs), so nothing is known of its input; skip it"
            )
        return own

    def _absorb(self, own: InputStatistics, unit: int, number: int) -> None:
        log = self._keeper.log(self._units.place(unit), number)
        try:
            for call_number, frame in log.frames():
                call = self._keeper.call_of(unit, call_number, call_in(frame))
                own.absorb({name: self._keeper.as_seen(name, value) for name, value in frame.items()}, call)
        except CheckpointError:
            raise RanksError(f"'{log.path}' is damaged; start the same command again, and it is made again") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)
