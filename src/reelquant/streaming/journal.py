"""Calibration on disk: every call of the denoiser is remembered, and statistics are logged in files instead of memory.

A sampler needs the whole denoiser at every step, so a step cannot wait until a block has been calibrated. What does not fit memory beside
the parameters are the statistics: second moments of wide layers, sampled rows. Their looks are logged per layer while the sampler runs and
absorbed when the layer is built, by the same arithmetic in the same order, so the bits are those of a run in memory.

A call counts once its output has been written. A run that was killed samples again from the start, and calls that count answer from disk.

Everything has a sum, and every remembered call says how many looks had been logged by then. What is not what was written is made again.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reelquant._errors import CalibrationError, CheckpointError
from reelquant._sums import Sealed
from reelquant.discover.probe import tensors_in
from reelquant.observe import Call, InputStatistics, Statistic
from reelquant.streaming.log import Log

INPUTS = "inputs"  # log of all statistics of an input that do not compact
logger = logging.getLogger(__name__)


class Journal:
    """What is on disk of one component's sampling.

    Attributes:
        folder: where.
        device: where the model runs, so that what is read meets its tensors.
        room: hears how many bytes the first remembered output takes.
    """

    def __init__(self, folder: Path, device: str = "cpu", room: Callable[[int], object] = int) -> None:
        self.folder, self.device, self.room = folder, device, room
        self._asked = False
        self._generator: torch.Generator | None = None
        self._phase, self._call = "", 0
        self._last: dict[tuple[int, str], int] = {}  # (input, statistic) -> the last call that logged a look of it
        self._looks: Counter[str] = Counter()  # name of a log -> looks that were ever appended to it
        self._states = Sealed(folder / "seen")
        (folder / "seen").mkdir(parents=True, exist_ok=True)

    # --- calls of the denoiser ----------------------------------------------------------------------------------------------------

    @contextmanager
    def remembering(self, denoiser: nn.Module, phase: str) -> Iterator[None]:
        """Inside, calls of the denoiser that have been made before in this phase answer from disk, others are made and written."""
        self._phase, self._call = phase, 0
        forward: Any = denoiser.forward

        @functools.wraps(forward)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            record = self._record(self._call)
            if not self._calls.good(record.name):
                output = forward(*args, **kwargs)
                self._remember(record, output)
            else:
                output = self._recall(record)
            self._call += 1
            return output

        denoiser.forward = remembered
        try:
            yield
        finally:
            del denoiser.forward

    def _record(self, call: int) -> Path:
        return self.folder / "calls" / self._phase / f"{call:06}.safetensors"

    @property
    def _calls(self) -> Sealed:
        return Sealed(self.folder / "calls" / self._phase)

    def _remember(self, record: Path, output: Any) -> None:
        keys = list(output) if isinstance(output, dict) else None
        tensors = {str(i): value.detach().contiguous() for i, value in enumerate(tensors_in(output))}
        if self._generator is not None:
            tensors["generator"] = self._generator.get_state()
        about = {"keys": json.dumps(keys), "looks": json.dumps(self._looks)}
        Sealed(record.parent).write(record.name, lambda path: save_file(tensors, path, about))
        if not self._asked:
            self.room(record.stat().st_size)
            self._asked = True

    def forget(self, phase: str) -> None:
        """Let the calls of a phase go: what they were for is known."""
        shutil.rmtree(self.folder / "calls" / phase, ignore_errors=True)

    def _recall(self, record: Path) -> Any:
        tensors = load_file(record)
        if self._generator is not None:
            self._generator.set_state(tensors.pop("generator"))
        values = [own_copy(tensors[str(i)], self.device) for i in range(len(tensors))]
        keys = _about(record, "keys")
        return tuple(values) if keys is None else model_output(dict(zip(keys, values, strict=True)))

    # --- a reelquant.engine.calibration.Keeper --------------------------------------------------------------------------------------

    def saw(self, call: Call) -> None:
        """Looks say which call they are of."""

    def run(self) -> int | None:
        """All runs are made, one after the other."""

    # --- statistics ---------------------------------------------------------------------------------------------------------------

    def keep(
        self, make: Callable[[], tuple[dict[str, InputStatistics], dict[str, InputStatistics]]], generator: torch.Generator
    ) -> tuple[dict[str, Any], Mapping[str, InputStatistics]]:
        """On disk instead of in memory: what to hang on the layers while sampling, and the statistics by layer name afterwards.

        Args:
            make: gives empty statistics: those to fill, and those by layer name.
            generator: draws the rows that are sampled; its state is remembered with every call.
        """
        self._generator = generator
        done = next(call for call in itertools.count() if not self._calls.good(self._record(call).name))
        for record in (self.folder / "calls" / self._phase).glob("*.safetensors"):
            # half-written ones of a killed process, and those whose looks come after one that is made again
            if record.name.startswith(".") or int(record.stem) >= done:
                record.unlink()
        watched, empty = make()
        logs = [(number, kind) for number, seen in enumerate(watched.values()) for kind in (INPUTS, *_compacting(seen))]
        self._looks = Counter(_about(self._record(done - 1), "looks") if done else {})
        if not all(self._cut(number, kind, done) for number, kind in logs):
            logger.warning("what calibration had seen is damaged in '%s': it samples again", self.folder)
            self._start_again()
        numbers = {name: number for number, name in enumerate(watched)}
        return {name: Logged(self, numbers[name], own) for name, own in watched.items()}, Known(self, numbers, empty)

    def _cut(self, number: int, kind: str, done: int) -> bool:
        """Keep what belongs to the first ``done`` calls; False if that is not all that was logged of them."""
        through, absorbed, state = -1, 0, self._state(number, kind)
        if state.exists():
            if not self._states.good(state.name):
                return False
            tensors = load_file(state)
            through, absorbed = int(tensors["call"]), int(tensors["looks"])
        kept = self._log(number, kind).cut(done, through)
        return kept is not None and through < done and absorbed + kept == self._looks[self._log(number, kind).path.name]

    def _start_again(self) -> None:
        shutil.rmtree(self.folder / "calls" / self._phase, ignore_errors=True)
        shutil.rmtree(self.folder / "seen")
        (self.folder / "seen").mkdir()
        self._looks.clear()

    def forget_generator(self) -> None:
        """Calibration is over: later calls draw no rows."""
        self._generator = None

    def _log(self, number: int, kind: str) -> Log:
        return Log(self.folder / "seen" / f"{number:04}.{kind}")

    def _state(self, number: int, kind: str) -> Path:
        return self.folder / "seen" / f"{number:04}.{kind}.safetensors"

    def write(self, number: int, own: InputStatistics, seen: Mapping[str, Tensor], call: Call) -> None:
        """Log one look at an input. Looks of a compacting statistic are absorbed when they take more room than its state does."""
        when = {name: torch.tensor(value) for name, value in asdict(call).items()}
        compacting = _compacting(own)
        rest = {key: value for key, value in seen.items() if key.partition(".")[0] not in compacting}
        self._append(number, INPUTS, rest | when)
        for kind, member in compacting.items():
            look = {key.partition(".")[2]: value for key, value in seen.items() if key.startswith(f"{kind}.")}
            if look:
                self._write_compacting(number, kind, member, look | when)

    def _write_compacting(self, number: int, kind: str, empty: Statistic, frame: Mapping[str, Tensor]) -> None:
        log = self._log(number, kind)
        if log.bytes > empty.memory_bytes() and self._last.get((number, kind)) != self._call:  # whole calls only
            self._compact(number, kind, empty)
        self._append(number, kind, frame)
        self._last[number, kind] = self._call

    def _append(self, number: int, kind: str, frame: Mapping[str, Tensor]) -> None:
        log = self._log(number, kind)
        log.append(self._call, frame)
        self._looks[log.path.name] += 1

    def _compact(self, number: int, kind: str, empty: Statistic) -> None:
        """Keep the state after all calls before this one. Frames that a killed process left although they are absorbed count once."""
        member = copy.copy(empty)
        self._fill(number, kind, member)
        log = self._log(number, kind)
        counts = {"call": torch.tensor(self._call - 1), "looks": torch.tensor(self._looks[log.path.name])}
        state = {name: value.contiguous() for name, value in member.state.items()} | counts
        self._states.write(self._state(number, kind).name, lambda path: save_file(state, path))
        log.clear()

    def _fill(self, number: int, kind: str, member: Statistic) -> None:
        """Fill an empty compacting statistic with its state and with the frames behind that."""
        through, state = -1, self._state(number, kind)
        if state.exists():
            if not self._states.good(state.name):
                raise CheckpointError(f"'{state}' is damaged; go on with resume=True (--resume), and it is made again")
            tensors = load_file(state)
            through = int(tensors.pop("call"))
            del tensors["looks"]
            member.state = {name: own_copy(value, self.device) if value.dim() else value for name, value in tensors.items()}
        for _, frame in self._log(number, kind).frames(through):
            call = call_in(frame)
            member.absorb({name: value.to(self.device) for name, value in frame.items()}, call)

    def read(self, number: int, own: InputStatistics) -> InputStatistics:
        """Fill empty statistics."""
        for _, frame in self._log(number, INPUTS).frames():
            call = call_in(frame)
            own.absorb({name: self._as_seen(name, value) for name, value in frame.items()}, call)
        for kind, member in _compacting(own).items():
            self._fill(number, kind, member)
        return own

    def _as_seen(self, name: str, value: Tensor) -> Tensor:
        """A part of a look where a run in memory has it: sampled rows and counts stay on the CPU."""
        if name == "rows.rows":
            return value.float()
        return value.to(self.device) if value.dim() else value


def _about(record: Path, key: str) -> Any:
    """What a remembered call says of itself."""
    with safe_open(record, "pt") as opened:
        return json.loads(opened.metadata()[key])


def _compacting(own: InputStatistics) -> dict[str, Statistic]:
    return {name: member for name, member in own.members.items() if member.compacts}


def call_in(frame: dict[str, Tensor]) -> Call:
    """Take the call out of a frame."""
    return Call(**{field.name: frame.pop(field.name).item() for field in fields(Call)})


def own_copy(value: Tensor, device: str) -> Tensor:
    """In memory of its own, not mapped from the file."""
    return value.to(device, copy=True)


def model_output(values: dict[str, Tensor]) -> Any:
    """A model output with these members, as diffusers makes them."""
    from diffusers.utils import BaseOutput

    kind = dataclasses.make_dataclass("Remembered", [(key, Tensor) for key in values], bases=(BaseOutput,))
    return kind(**values)


class Logged:
    """Stands in the place of a layer's statistics and writes to the journal."""

    def __init__(self, journal: Journal, number: int, own: InputStatistics) -> None:
        self.journal, self.number, self.own = journal, number, own

    def update(self, x: Tensor, call: Call) -> None:
        """See one input.

        Raises:
            CalibrationError: if it is not finite.
        """
        seen = self.own.look(x, call)
        if not all(bool(value.isfinite().all()) for name, value in seen.items() if name.startswith("range.")):
            raise CalibrationError(
                f"the input of layer '{self.own.name}' holds NaN or inf at step {call.step}; check the weights, or run the pipeline "
                "in float32 or bfloat16 instead of float16"
            )
        short = x.dtype in (torch.bfloat16, torch.float16)  # rows are values of x: nothing is lost
        rows = {name: value.to(x.dtype) for name, value in seen.items() if short and name.endswith(".rows")}
        self.journal.write(self.number, self.own, seen | rows, call)

    def bad_from(self) -> float:
        """Inputs that are not finite have been refused."""
        return float("inf")

    def check(self, timesteps: list[float]) -> None:
        """Layers that never ran are found when they are built."""


class Known(Mapping[str, InputStatistics]):
    """Statistics by layer name, read from the journal when they are asked for; the last ones are kept.

    Attributes:
        empty: the same, with nothing absorbed.
    """

    def __init__(self, journal: Journal, numbers: Mapping[str, int], empty: Mapping[str, InputStatistics]) -> None:
        self.empty, self._journal = empty, journal
        self._numbers = {name: numbers[own.name] for name, own in empty.items()}
        self._last: tuple[int, InputStatistics] | None = None

    def __getitem__(self, name: str) -> InputStatistics:
        number = self._numbers[name]
        if self._last is None or self._last[0] != number:
            self._last = None  # the old ones go before the new ones come
            empty = self.empty[name]
            own = InputStatistics(empty.name, empty.geometry, {key: copy.copy(one) for key, one in empty.members.items()})
            self._journal.read(number, own)
            if not own.range.seen:
                raise CalibrationError(
                    f"layer '{name}' never ran while sampling (or only on empty inputs), so nothing is known of its input; skip it"
                )
            self._last = number, own
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)
