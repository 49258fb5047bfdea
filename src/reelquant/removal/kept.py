"""What a run that drops blocks keeps, so that one that was stopped goes on: recorded calls, the choice, and training from time to time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from reelquant.checkpoint.workspace import whole_file
from reelquant.observe import RecordedCall

SETTINGS, CALLS, CHOICE, TRAINING = "settings.json", "calls.pt", "choice.json", "training.pt"
EVERY = 50
"""Iterations between two files of training."""


class Kept:
    """Files of a run in a folder; without one nothing is kept.

    Args:
        folder: made when the first file is written.
        settings: plain data that says what the run is about. Files of another run are removed.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder, said = folder, json.loads(json.dumps(settings, default=str))
        if folder is None or (folder.is_dir() and _read(folder / SETTINGS) == said):
            return
        self.clear()
        self._write(SETTINGS, lambda file: file.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8"))

    def calls(self, make: Callable[[], Sequence[RecordedCall]]) -> Sequence[RecordedCall]:
        """Recorded calls: those of the run before, or new ones."""
        if (known := self._load(CALLS)) is not None:
            return [RecordedCall(tuple(args), kwargs, tuple(output)) for args, kwargs, output in known]
        made = make()
        if self.folder is not None:
            plain = [
                (tuple(one.args), dict(one.kwargs), [leaf for leaf in tree_leaves(one.output) if isinstance(leaf, Tensor)]) for one in made
            ]
            self._write(CALLS, lambda file: torch.save(plain, file))
        return made

    def choice(self, make: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """The blocks that go."""
        if self.folder is not None and (known := _read(self.folder / CHOICE)) is not None:
            return tuple(known)
        made = make()
        self._write(CHOICE, lambda file: file.write_text(json.dumps(list(made)), encoding="utf-8"))
        return made

    def training(self) -> dict[str, Any] | None:
        """Where training was: ``iteration``, ``weights`` and ``optimizer``; None at the start."""
        return self._load(TRAINING)

    def trained(self, iteration: int, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, *, last: bool = False) -> None:
        """Keep where training is, from time to time and at the end."""
        if self.folder is not None and (last or iteration % EVERY == 0):
            state = {"iteration": iteration, "weights": dict(weights), "optimizer": optimizer.state_dict()}
            self._write(TRAINING, lambda file: torch.save(state, file))

    def clear(self) -> None:
        """Remove what is kept."""
        if self.folder is None:
            return
        for name in (SETTINGS, CALLS, CHOICE, TRAINING):
            (self.folder / name).unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _load(self, name: str) -> Any:
        if self.folder is None or not (self.folder / name).is_file():
            return None
        try:
            return torch.load(self.folder / name, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):  # made again
            return None

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            whole_file(self.folder / name, write)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
