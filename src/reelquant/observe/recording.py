"""Recorded calls of a module: in memory as far as a budget goes, the rest on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from reelquant.clock import ANY

BUDGET = 256 << 20
"""Bytes of recorded tensors that stay in memory."""


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call of a module.

    Attributes:
        args, kwargs: its arguments.
        output: what the float module gave: a tensor, or a tuple, list or mapping that holds tensors; None if only arguments count.
        step: index of the denoising step, in the order of calibration's timesteps.
        half: which half of a guidance pair it computed, as :mod:`reelquant.clock` numbers them.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None
    step: int = 0
    half: int = ANY


@dataclass(frozen=True, eq=False)
class _Spilled:
    """A call whose tensors are in a file."""

    file: Path
    rest: dict[int, Any]  # leaves that are not tensors, by their place
    spec: TreeSpec
    step: int
    half: int


class Recording(Sequence[RecordedCall]):
    """Calls in the order in which they were made.

    Args:
        budget: bytes of tensors to hold in memory; calls beyond it go to files.
        folder: where the files go; by default a temporary folder that is removed with the recording.
    """

    def __init__(self, budget: int = BUDGET, folder: Path | None = None) -> None:
        self.budget, self._folder = budget, folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._calls: list[RecordedCall | _Spilled] = []
        self.held = self._files = 0

    def append(self, call: RecordedCall) -> None:
        """Add a call. Its tensors are copied: models may write into them later."""
        leaves, spec = tree_flatten((call.args, dict(call.kwargs), call.output))
        own = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        size = _bytes(own)
        if self.held + size > self.budget:
            self._calls.append(self._spill(own, spec, call.step, call.half))
            return
        self.held += size
        args, kwargs, output = tree_unflatten(own, spec)
        self._calls.append(replace(call, args=args, kwargs=kwargs, output=output))

    def _spill(self, leaves: list[Any], spec: TreeSpec, step: int, half: int) -> _Spilled:
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="reelquant-calls-")
            self._folder = Path(self._temporary.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{self._files:06}.safetensors"
        self._files += 1
        save_file({str(place): leaf.contiguous() for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}, file)
        rest = {place: leaf for place, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        return _Spilled(file, rest, spec, step, half)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        call = self._calls[index]
        if isinstance(call, RecordedCall):
            return call
        tensors: dict[int, Any] = {int(place): value for place, value in load_file(call.file).items()}
        leaves = [value for _, value in sorted((tensors | call.rest).items())]
        args, kwargs, output = tree_unflatten(leaves, call.spec)
        return RecordedCall(args, kwargs, output, call.step, call.half)

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[RecordedCall]:
        return (self[number] for number in range(len(self)))

    def keep(self, numbers: Sequence[int]) -> None:
        """Keep the calls with these numbers and drop all others."""
        wanted = set(numbers)
        for number, call in enumerate(self._calls):
            if number not in wanted:
                self._drop(call)
        self._calls = [self._calls[number] for number in numbers]

    def number(self, steps: Sequence[int]) -> None:
        """Set the denoising step of every call."""
        self._calls = [replace(call, step=step) for call, step in zip(self._calls, steps, strict=True)]

    def _drop(self, call: RecordedCall | _Spilled) -> None:
        if isinstance(call, _Spilled):
            call.file.unlink(missing_ok=True)
        else:
            self.held -= _bytes(tree_flatten((call.args, dict(call.kwargs), call.output))[0])

    def close(self) -> None:
        """Drop all calls, and the files with them."""
        self.keep([])
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = self._folder = None


def _bytes(leaves: Sequence[Any]) -> int:
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
