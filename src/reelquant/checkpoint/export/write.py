"""Files written tensor by tensor: nothing but the layer at hand is in memory, and a file appears complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from reelquant._errors import CheckpointError
from reelquant._progress import Progress
from reelquant.checkpoint.beside import beside, held, tidy
from reelquant.checkpoint.export.source import DTYPES
from reelquant.checkpoint.folder import absolute

Form = TypeVar("Form")
Shape = tuple[int, ...]
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the header, as safetensors' own writer has it


@dataclass(frozen=True, eq=False)
class Part(Generic[Form]):
    """What one layer or tensor of the artifact becomes: sizes are known before, numbers are made when their turn comes.

    Attributes:
        tensors: shape and form (a dtype, a GGUF type) of each, by its name in the file.
        make: computes them.
    """

    tensors: dict[str, tuple[Shape, Form]]
    make: Callable[[], dict[str, Tensor]]


def check_file(target: str | Path, suffix: str, *, force: bool) -> Path:
    """The absolute path of a file that may be written.

    Raises:
        CheckpointError: if it exists and ``force`` is not given, is a folder, or ends otherwise than its readers want.
    """
    path = absolute(target)
    if path.suffix != suffix:
        raise CheckpointError(f"'{target}' must end with {suffix}: readers tell formats by the ending")
    if os.path.isdir(path):
        raise CheckpointError(f"'{path}' is a folder; give the name of a file")
    if os.path.exists(path) and not force:
        raise CheckpointError(f"'{path}' already exists; choose another file or pass force=True (--force) to replace it")
    return path


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write to a temporary file beside ``path`` that takes its name when the block ends. After an error nothing is left.

    Raises:
        CheckpointError: if the disk does not take the file.
    """
    tidy(path)
    temporary = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        with held(temporary):
            yield temporary
            temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"cannot write '{path}': {error}; nothing is left behind, free space or choose another place") from error
        raise


def write_safetensors(path: Path, parts: Sequence[Part[torch.dtype]], metadata: Mapping[str, str], progress: Progress) -> None:
    """A safetensors file; tensors lie in it by the size of their numbers, so that each is aligned."""
    header, offsets = _header(parts, metadata)
    with path.open("wb") as file:
        file.write(header)
        for part in parts:
            for name, value in part.make().items():
                assert (tuple(value.shape), value.dtype) == part.tensors[name], name
                file.seek(len(header) + offsets[name])
                file.write(raw(value).data)
            progress.advance()


def _header(parts: Sequence[Part[torch.dtype]], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    tensors = [(name, *form) for part in parts for name, form in part.tensors.items()]
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets: dict[str, int] = {}
    end = 0
    for name, shape, dtype in sorted(tensors, key=lambda tensor: -tensor[2].itemsize):
        offsets[name], end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offsets


def raw(value: Tensor) -> np.ndarray:
    """The bytes of a tensor, rows first."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
