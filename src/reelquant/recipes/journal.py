"""Calibration on disk: every call of the denoiser is remembered, and what it showed of each input is kept in files instead of memory.

A sampler needs the whole denoiser at every step, so a step cannot wait until a block has been calibrated. What does not fit memory beside
the parameters are the statistics: second moments of wide layers, sampled rows. They are logged per layer while the sampler runs and put
together when the layer is built, by the same arithmetic in the same order, so the bits are those of a run in memory.

A call counts once its output has been written. A run that was killed samples again from the start, and calls that count answer from disk.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from reelquant._errors import CalibrationError
from reelquant.checkpoint import whole_file
from reelquant.discover.probe import tensors_in
from reelquant.observe import Call, Gram, InputStatistics

_HEAD = 16  # bytes before a frame: number of the call, length of the frame


class Log:
    """Frames appended to a file, each with the number of the call it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, call: int, seen: Mapping[str, Tensor]) -> None:
        """Add a frame."""
        content = save({name: value.contiguous() for name, value in seen.items()})
        with self.path.open("ab") as file:
            file.write(call.to_bytes(8, "little") + len(content).to_bytes(8, "little") + content)

    def frames(self, after: int = -1) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The frames of calls behind ``after``, in order."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            while head := file.read(_HEAD):
                call, length = int.from_bytes(head[:8], "little"), int.from_bytes(head[8:], "little")
                if call <= after:
                    file.seek(length, 1)
                else:
                    yield call, load(file.read(length))

    def cut(self, calls: int) -> None:
        """Keep the frames of the first ``calls`` calls; what a killed process left behind them goes."""
        end = 0
        with self.path.open("r+b") as file:
            while len(head := file.read(_HEAD)) == _HEAD and int.from_bytes(head[:8], "little") < calls:
                end = file.seek(int.from_bytes(head[8:], "little"), 1)
            file.truncate(end)

    def clear(self) -> None:
        self.path.write_bytes(b"")


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
        self._last: dict[int, int] = {}  # layer -> the last call that logged rows of it
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
            if not record.is_file():
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

    def _remember(self, record: Path, output: Any) -> None:
        keys = list(output) if isinstance(output, dict) else None
        tensors = {str(i): value.detach().contiguous() for i, value in enumerate(tensors_in(output))}
        if self._generator is not None:
            tensors["generator"] = self._generator.get_state()
        whole_file(record, lambda path: save_file(tensors, path, {"keys": json.dumps(keys)}))
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
        values = [_own(tensors[str(i)], self.device) for i in range(len(tensors))]
        with safe_open(record, "pt") as opened:
            keys = json.loads(opened.metadata()["keys"])
        return tuple(values) if keys is None else _output(dict(zip(keys, values, strict=True)))

    # --- statistics ---------------------------------------------------------------------------------------------------------------

    def keep(
        self, make: Callable[[], tuple[dict[str, InputStatistics], dict[str, InputStatistics]]], generator: torch.Generator
    ) -> tuple[dict[str, Any], Mapping[str, InputStatistics]]:
        """On disk instead of in memory: what to hang on the layers while sampling, and the statistics by layer name afterwards.

        Args:
            make: gives empty statistics: those to fill, and those by layer name.
            generator: draws the rows that are sampled; remembered with every call.
        """
        self._generator = generator
        done = len(list((self.folder / "calls" / self._phase).glob("*.safetensors")))
        watched, empty = make()
        for number in range(len(watched)):
            for log in (self._log(number, "inputs"), self._log(number, "gram")):
                if log.path.exists():
                    log.cut(done)
        numbers = {name: number for number, name in enumerate(watched)}
        return {name: Logged(self, numbers[name], own) for name, own in watched.items()}, Known(self, numbers, empty, generator)

    def forget_generator(self) -> None:
        """Calibration is over: later calls draw no rows."""
        self._generator = None

    def _log(self, number: int, kind: str) -> Log:
        return Log(self.folder / "seen" / f"{number:04}.{kind}")

    def _state(self, number: int) -> Path:
        return self.folder / "seen" / f"{number:04}.moments.safetensors"

    def write(self, number: int, own: InputStatistics, seen: Mapping[str, Tensor], call: Call) -> None:
        """Log one look at an input. Rows for second moments are added up when they take more room than the moments do."""
        when = {name: torch.tensor(value) for name, value in dataclasses.asdict(call).items()}
        self._log(number, "inputs").append(self._call, {k: v for k, v in seen.items() if not k.startswith("gram.")} | when)
        if own.gram is None:
            return
        log, square = self._log(number, "gram"), 4 * (own.geometry.channels * own.geometry.taps) ** 2
        if log.bytes > square and self._last.get(number) != self._call:  # whole calls only
            self._add_up(number, own.gram)
        log.append(self._call, {"rows": seen["gram.rows"]})
        self._last[number] = self._call

    def _add_up(self, number: int, empty: Gram) -> None:
        """Moments of all calls before this one. Rows that a killed process left although they are added up count once."""
        gram = copy.copy(empty)
        self._moments(number, gram)
        state = {name: value.contiguous() for name, value in gram.state.items()} | {"call": torch.tensor(self._call - 1)}
        whole_file(self._state(number), lambda path: save_file(state, path))
        self._log(number, "gram").clear()

    def _moments(self, number: int, gram: Gram) -> None:
        """Fill empty moments with what has been added up and with the rows behind it."""
        through = -1
        if self._state(number).exists():
            state = load_file(self._state(number))
            through = int(state.pop("call"))
            gram.state = {name: _own(value, self.device) if value.dim() else value for name, value in state.items()}
        for _, seen in self._log(number, "gram").frames(through):
            gram.absorb({"rows": seen["rows"].to(self.device).float()}, Call(0))

    def read(self, number: int, own: InputStatistics) -> InputStatistics:
        """Fill empty statistics."""
        for _, seen in self._log(number, "inputs").frames():
            call = Call(*(int(seen.pop(name)) for name in ("step", "part", "half")))
            own.absorb({name: self._as_seen(name, value) for name, value in seen.items()}, call)
        if own.gram is not None:
            self._moments(number, own.gram)
        return own

    def _as_seen(self, name: str, value: Tensor) -> Tensor:
        """A part of a look where a run in memory has it: sampled rows and counts stay on the CPU."""
        if name == "rows.rows":
            return value.float()
        return value.to(self.device) if value.dim() else value


def _own(value: Tensor, device: str) -> Tensor:
    """In memory of its own, not mapped from the file."""
    return value.to(device, copy=True)


def _output(values: dict[str, Tensor]) -> Any:
    """A model output with these members, as diffusers makes them."""
    from diffusers.utils import BaseOutput

    kind = dataclasses.make_dataclass("Remembered", [(key, Tensor) for key in values], bases=(BaseOutput,))
    return kind(**values)


class Logged:
    """Hangs on a layer in the place of its statistics and writes to the journal."""

    def __init__(self, journal: Journal, number: int, own: InputStatistics) -> None:
        self.journal, self.number, self.own = journal, number, own

    def update(self, x: Tensor, call: Call) -> None:
        """See one input.

        Raises:
            CalibrationError: if it is not finite.
        """
        seen = self.own.look(x, call)
        if not bool(seen["range.low"].isfinite().all() and seen["range.high"].isfinite().all()):
            raise CalibrationError(
                f"the input of layer '{self.own.name}' holds NaN or inf at step {call.step}; "
                "check the weights, or run the pipeline in float32 or bfloat16 instead of float16"
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
    """Statistics by layer name, read from the journal when they are asked for; the last ones are kept."""

    def __init__(self, journal: Journal, numbers: Mapping[str, int], empty: Mapping[str, InputStatistics], generator: Any) -> None:
        self._journal, self._empty, self._generator = journal, empty, generator
        self._numbers = {name: numbers[own.name] for name, own in empty.items()}
        self._last: tuple[int, InputStatistics] | None = None

    def __getitem__(self, name: str) -> InputStatistics:
        number = self._numbers[name]
        if self._last is None or self._last[0] != number:
            self._last = None  # the old ones go before the new ones come
            own = copy.deepcopy(self._empty[name], {id(self._generator): self._generator})  # generators cannot be copied
            self._journal.read(number, own)
            if not own.range.seen:
                raise CalibrationError(f"layer '{name}' never ran while sampling, so nothing is known of its input; skip it")
            self._last = number, own
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def digest(*content: Any) -> str:
    """A short name for whatever decides what a sampling pass computes."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
