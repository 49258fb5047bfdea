"""The artifact as exporters see it: plain weights and biases, one layer at a time, everything that lived in our layer folded into them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import CheckpointError, UnsupportedError, nearest
from reelquant.checkpoint.folder import absolute
from reelquant.checkpoint.stored import METHOD, Stored
from reelquant.checkpoint.verify import verify_layer
from reelquant.models.blank import CLASS, QUANTIZATION, blank_model, read_config
from reelquant.models.manifest import check_files
from reelquant.models.pipelines import check_folder, locate
from reelquant.nn import LayerLayout, QuantLayer, get_module, quantized_class

WEIGHTS = "diffusion_pytorch_model"  # how diffusers calls the files of a model


@dataclass(frozen=True, eq=False)
class Layer:
    """One quantized layer, exact: ``weight`` and ``bias`` are what a float layer with the same function would hold.

    Attributes:
        name: dotted path in the model.
        quant: the layer as it is stored, for its codes and scales.
        weight: float32, rotation and per-channel scales of the input folded in.
        bias: float32, the compensation of a shift taken out; None if there is none, or nothing is left of one that quantization made.
    """

    name: str
    quant: QuantLayer
    weight: Tensor
    bias: Tensor | None

    @property
    def plain_bias(self) -> Tensor:
        """The bias of a layer that has one."""
        assert self.bias is not None
        return self.bias


@dataclass(frozen=True)
class Facts:
    """What is known about a quantized layer before its numbers are read.

    Attributes:
        linear: whether it is a linear layer; else it is a convolution.
        shape: of the float weight.
        bias: whether the architecture has a bias there; quantization may have made one that has no place.
        fp32: whether diffusers keeps the layer in float32 for every requested dtype.
    """

    name: str
    layout: LayerLayout
    linear: bool
    shape: tuple[int, ...]
    bias: bool
    fp32: bool

    @property
    def numbers(self) -> str:
        return f"{self.layout.weight.format} {self.layout.weight.granularity}"


class ExportSource:
    """One quantized component of a folder that :func:`reelquant.save` wrote; a context that holds its files open.

    Attributes:
        component: its name, and that of its folder.
        config: its ``config.json``.
        stored: what ``quantization_config`` says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.component = folder, folder.name
        self.config = read_config(folder)
        self.stored = Stored.from_json(self.config[QUANTIZATION])
        self._open, self._files = ExitStack(), dict[str, Any]()
        self._tensors: dict[str, list[str]] = {}
        self._covered = False

    def __enter__(self) -> ExportSource:
        from safetensors import SafetensorError, safe_open

        files = sorted(self.folder.glob("*.safetensors"))
        self._covered = check_files(files)
        for file in files:
            try:
                opened = self._open.enter_context(safe_open(file, "pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"'{file}' is truncated or corrupt ({error}); download or save it again") from None
            self._files |= dict.fromkeys(opened.keys(), opened)
        for key in self._files:
            self._tensors.setdefault(key.rpartition(".")[0], []).append(key)
        if missing := sorted(set(self._expected()) - set(self._files)):
            raise CheckpointError(f"'{self.folder}' lacks {len(missing)} tensors, '{missing[0]}' first; download or save it again")
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()
        self._tensors.clear()
        self._open.close()

    def _expected(self) -> Iterator[str]:
        yield from self.floats
        yield from (f"{name}.weight" for name in self.stored.layers)

    @property
    def kind(self) -> str:
        """Class of the model, as diffusers calls it."""
        return str(self.config[CLASS])

    @cached_property
    def blank(self) -> nn.Module:
        """The float architecture, on the meta device."""
        return blank_model(self.folder)

    @cached_property
    def layers(self) -> dict[str, Facts]:
        """Every quantized layer."""
        fp32 = set(getattr(self.blank, "_keep_in_fp32_modules", None) or ())
        return {name: self._facts(name, layout, fp32) for name, layout in self.stored.layers.items()}

    def _facts(self, name: str, layout: LayerLayout, fp32: set[str]) -> Facts:
        module: Any = get_module(self.blank, name)
        shape, bias = tuple(module.weight.shape), module.bias is not None
        return Facts(name, layout, isinstance(module, nn.Linear), shape, bias, not fp32.isdisjoint(name.split(".")))

    @cached_property
    def homeless(self) -> tuple[str, ...]:
        """Layers with biases that quantization made, for which the architecture has no place."""
        made = [name for name, facts in self.layers.items() if facts.layout.bias and not facts.bias]
        return tuple(name for name in made if self.layer(name).bias is not None)

    @cached_property
    def floats(self) -> tuple[str, ...]:
        """Names of the tensors that are not quantized."""
        return tuple(name for name in self.blank.state_dict() if name.rpartition(".")[0] not in self.stored.layers)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of most numbers that are not quantized."""
        counts: Counter[torch.dtype] = Counter()
        for shape, dtype in map(self.about, self.floats):
            counts[dtype] += torch.Size(shape).numel() if dtype.is_floating_point else 0
        return counts.most_common(1)[0][0] if counts.total() else torch.float32

    def about(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a stored tensor, from the header of its file."""
        part = self._files[name].get_slice(name)
        return tuple(part.get_shape()), DTYPES[part.get_dtype()]

    def tensor(self, name: str) -> Tensor:
        """A stored tensor."""
        return self._files[name].get_tensor(name)

    def bytes_of(self, name: str) -> int:
        """What a layer or tensor takes in the artifact."""
        stored = [self.about(key) for key in (self._tensors[name] if name in self.stored.layers else [name])]
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in stored)

    @torch.no_grad()
    def layer(self, name: str) -> Layer:
        """Read a quantized layer, check it against its checksum, and fold what lives in it.

        Raises:
            CheckpointError: if a tensor is missing or the values are not those that were saved.
            UnsupportedError: if the layer has no float weight.
        """
        quant = self.checked(name)
        if quant.bias is not None:
            quant.bias.data = quant.bias.float()  # folds are computed, and handed on, in float32
        return Layer(name, quant, quant.dequantized_weight(), quant.float_bias())

    def checked(self, name: str) -> QuantLayer:
        """A quantized layer with its tensors, checked against its checksum.

        Raises:
            CheckpointError: as :meth:`layer`.
        """
        module: Any = get_module(self.blank, name)
        quant = quantized_class(module).like(module, self.stored.layers[name], device="meta")
        for tensor, expected in quant.state_dict().items():
            key = f"{name}.{tensor}"
            if key not in self._files or self.about(key)[0] != tuple(expected.shape):
                raise CheckpointError(f"'{key}' is missing or has another shape than its quantization_config says; save the model again")
            value = self.tensor(key)
            is_parameter = tensor in quant._parameters
            setattr(quant, tensor, nn.Parameter(value, requires_grad=False) if is_parameter else value)
        verify_layer(name, quant, self.stored.checksums[name], None if self._covered else self.stored.sums.get(name))
        return quant


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls the dtypes of torch."""


def quantized_components(folder: str | Path) -> dict[str, Path]:
    """Folders of the components that reelquant quantized, by name.

    Raises:
        CheckpointError: if the folder is not a pipeline, or nothing in it is quantized by reelquant.
    """
    root = absolute(locate(folder))
    if not root.is_dir():
        raise CheckpointError(
            f"'{folder}' is not a folder here; export reads what reelquant.save (reelquant quantize --output) has written"
        )
    found = {path.name: path for path in component_folders(root)}
    if not found:
        raise CheckpointError(f"nothing in '{folder}' is quantized by reelquant; export reads what reelquant.save has written")
    check_folder(root, verify=False)  # sums are compared when a component is opened
    return found


def component_folders(root: Path) -> list[Path]:
    """Folders of the components of a pipeline that reelquant quantized, in the order of their names."""
    return [path for path in sorted(root.iterdir()) if _method(path) == METHOD]


def _method(folder: Path) -> str | None:
    described = read_config(folder).get(QUANTIZATION) if folder.is_dir() else None
    return described.get("quant_method") if isinstance(described, dict) else None


def choose_component(folder: str | Path, component: str | None) -> Path:
    """The one component that a file can hold.

    Raises:
        UnsupportedError: if there are several and none was chosen, or the chosen one is not quantized.
    """
    found = quantized_components(folder)
    if component is None and len(found) > 1:
        raise UnsupportedError(
            f"'{folder}' has {len(found)} quantized components ({', '.join(found)}) and a file holds one; choose it "
            "with component=... (--component)"
        )
    chosen = component or next(iter(found))
    if chosen not in found:
        raise UnsupportedError(f"'{folder}' has no quantized component '{chosen}'; {nearest(chosen, found)}")
    if CLASS not in read_config(found[chosen]):
        raise UnsupportedError(f"component '{chosen}' is not a model of diffusers; exporters write denoisers")
    return found[chosen]
