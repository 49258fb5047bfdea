"""Readers of the files in which weights are published. They never run code of a file: unknown names are refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class _Arrays(pickle.Unpickler):
    """Reads nested dicts of numpy arrays and refuses everything else that a pickle can name."""

    _KNOWN = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> Any:
        if module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") or name not in self._KNOWN:
            raise pickle.UnpicklingError(f"names {module}.{name}, which is not an array")
        return np.empty(0).__reduce__()[0] if name == "_reconstruct" else getattr(np, name)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def from_flax(file: Path) -> Tensors:
    """A pickled tree of Flax parameters; ``[*places, inputs, outputs]`` becomes ``[outputs, inputs, *places]``."""
    with file.open("rb") as stream:
        flat = _flatten(_Arrays(stream).load())
    # the statistics of 3D batch normalization have five axes as well, [1, 1, 1, 1, outputs], and turn alike
    turned = {name: np.moveaxis(value, (-1, -2), (0, 1)) if value.ndim > 3 else value for name, value in flat.items()}
    return {name: torch.from_numpy(np.array(value, dtype=np.float32, order="C")) for name, value in turned.items()}


class _Module:
    """What is left of a TorchScript module when only its attributes are read."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state

    def tensors(self, prefix: str = "") -> Tensors:
        found: Tensors = {}
        for name, value in self.state.items():
            if isinstance(value, Tensor):
                found[prefix + name] = value
            elif isinstance(value, _Module):
                found |= value.tensors(f"{prefix}{name}.")
        return found


class _Script(pickle.Unpickler):
    """Reads the float32 tensors of a TorchScript archive; its code is not even compiled."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root

    def persistent_load(self, pid: Any) -> Tensor:
        return torch.frombuffer(bytearray(self.archive.read(f"{self.root}/data/{pid[2]}")), dtype=pid[1])

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        known = {
            ("torch", "FloatStorage"): torch.float32,
            ("torch._utils", "_rebuild_tensor_v2"): _strided,
            ("torch.jit._pickle", "build_intlist"): list,
            ("collections", "OrderedDict"): dict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"names {module}.{name}, which is not a tensor")
        return known[module, name]


def _strided(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset).contiguous()


def from_torchscript(file: Path) -> Tensors:
    """The float32 tensors of a TorchScript archive."""
    with zipfile.ZipFile(file) as archive:
        root = archive.namelist()[0].split("/")[0]
        return _Script(archive, root).load().tensors()


def from_torch(file: Path) -> Tensors:
    """A state dict that ``torch.save`` wrote, without the prefix of ``DataParallel``."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    # clones: the batch normalization that is registered twice shares its memory, which safetensors does not write
    return {name.removeprefix("module."): value.clone() for name, value in state.items()}
