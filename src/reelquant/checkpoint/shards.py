"""safetensors files that are bigger than memory: read and written one tensor at a time.

The library's own ``save_file`` wants all tensors of a file at once. What :func:`write_tensors` writes is the same byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reelquant._errors import CheckpointError
from reelquant.models.blank import read_json
from reelquant.models.weight_files import STEMS, main_file

# Names of the format, in the order in which tensors lie in a file: wide ones first, so that all are aligned.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ALIGN = 8


@dataclass(frozen=True)
class Spec:
    """What a file's header says about a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class Shards:
    """The tensors of one component, wherever its files keep them. Only headers are in memory.

    Attributes:
        files: the files, in the order of their names.
        specs: dtype and shape of every tensor, by name.
    """

    def __init__(self, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self.files, self.specs, self._home = files, dict[str, Spec](), dict[str, Path]()
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        part = opened.get_slice(name)
                        self.specs[name] = Spec(DTYPES[part.get_dtype()], tuple(part.get_shape()))
                        self._home[name] = file
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"'{file}' is truncated or corrupt ({error}); download or save it again") from None
            except KeyError as error:
                raise CheckpointError(f"'{file}' holds numbers of type {error}, which torch does not have") from None

    @classmethod
    def of(cls, folder: Path) -> Shards:
        """The weights of a component's folder, in one file or sharded.

        Raises:
            CheckpointError: if it holds none, or files that its index names are missing or broken.
        """
        file = main_file(folder)
        if file is not None:
            return cls(_indexed(file) if file.suffix == ".json" else [file])
        raise CheckpointError(
            f"'{folder}' holds no weights: looked for {' and '.join(f'{stem}.safetensors' for stem in STEMS)}, also sharded"
        )

    def load(self, name: str) -> Tensor:
        """A tensor in memory of its own: nothing of the file stays mapped.

        Raises:
            CheckpointError: if its file cannot be read any more.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._home[name], "pt") as opened:
                return opened.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read '{name}' from '{self._home[name]}' ({error}); is the disk still there?") from None


def _indexed(index: Path) -> list[Path]:
    homes = read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise CheckpointError(f"'{index}' has no weight_map that names files; download or save it again")
    files = [index.parent / name for name in sorted(set(homes.values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"'{index}' names '{file.name}', which is not there; download or save it again")
    return files


def write_tensors(path: Path, specs: Mapping[str, Spec], load: Callable[[str], Tensor]) -> None:
    """Write a safetensors file, holding one tensor at a time.

    Args:
        path: the file; it is complete when this returns.
        specs: dtype and shape of every tensor.
        load: gives a tensor by its name, of exactly that dtype and shape.
    """
    words = {dtype: (order, word) for order, (word, dtype) in enumerate(DTYPES.items())}
    names = sorted(specs, key=lambda name: (words[specs[name].dtype][0], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + specs[name].bytes
        header[name] = {"dtype": words[specs[name].dtype][1], "shape": list(specs[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGN)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value = load(name)
            assert (value.dtype, tuple(value.shape)) == (specs[name].dtype, specs[name].shape), name
            file.write(memoryview(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
