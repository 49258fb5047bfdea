"""What a run that drops blocks keeps, so that one that was stopped goes on: recorded calls, the choice, and training from time to time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from reelquant.checkpoint import keeping_work, whole_file
from reelquant.observe import RecordedCall

SETTINGS, CALLS, CHOICE, TRAINING = "settings.json", "calls.safetensors", "choice.json", "training.safetensors"
TREE = "tree"
"""Key of the metadata that holds everything but tensors."""
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
            self._save(CALLS, plain)
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
            self._save(TRAINING, state)

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
            with safe_open(self.folder / name, "pt") as opened:
                return _tree(json.loads(opened.metadata()[TREE]), opened.get_tensor)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):  # damaged: made again
            return None

    def _save(self, name: str, tree: Any) -> None:
        tensors: dict[str, Tensor] = {}
        try:
            plain = json.dumps(_plain(tree, tensors))
        except TypeError:  # an argument of the denoiser is neither data nor a tensor: a run that is stopped starts again
            return
        self._write(name, lambda file: save_file(tensors, file, {TREE: plain}))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        if self.folder is not None:
            with keeping_work(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                whole_file(self.folder / name, write)


def _read(file: Path) -> Any:
    """What a file holds; None if it is not there, or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError:
        return None


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A tree of dicts, lists and tuples as JSON; tensors go to ``tensors`` under numbers.

    Raises:
        TypeError: for a leaf that is neither plain data nor a tensor.
    """
    if isinstance(value, Tensor):
        tensors[name := str(len(tensors))] = value.detach().cpu().contiguous().clone()
        return {"tensor": [name, str(value.device)]}
    if isinstance(value, Mapping):
        return {"dict": [[key, _plain(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [_plain(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} is not kept")


def _tree(plain: Any, tensor: Callable[[str], Tensor]) -> Any:
    """What :func:`_plain` was given."""
    if not isinstance(plain, Mapping):
        return plain
    ((kind, content),) = plain.items()
    if kind == "tensor":
        name, device = content
        return tensor(name).to(device)
    if kind == "dict":
        return {key: _tree(item, tensor) for key, item in content}
    items = [_tree(item, tensor) for item in content]
    return tuple(items) if kind == "tuple" else items
