"""What the pipeline under test and its reference differ in beside quantization: figures show that, too, and would be blamed on it.

Folders are looked at without loading them, a slab of a tensor at a time; pipelines in memory as they are.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.discover import plain
from reelquant.models.blank import QUANTIZATION, read_json
from reelquant.models.pipelines import check_folder, locate, pipeline_class
from reelquant.models.single_file import single_file
from reelquant.models.weight_files import INDEX, component_folders, loaded_files, sole_variant
from reelquant.nn import LAYERS, check_tensors, quantized_layers

CONFIGS = ("config.json", "scheduler_config.json")
NOT_COMPARED = (QUANTIZATION, "torch_dtype", "dtype", "transformers_version")
SLAB = 2**24  # numbers of a tensor that are compared at a time
SHOWN = 2  # settings or tensors that a sentence names
TOO = "figures show that, too"


@dataclass(frozen=True)
class Whole:
    """A tensor that is read a part at a time.

    Attributes:
        shape: its shape.
        rows: gives the rows from one number up to another; a tensor without axes has one row.
        file: where it is stored, if it is.
    """

    shape: tuple[int, ...]
    rows: Callable[[int, int], Tensor]
    file: Path | None = None


@dataclass(frozen=True)
class Part:
    """A component.

    Attributes:
        kind: name of its class.
        config: its settings, without those that say nothing about the numbers.
        quantized: whether it has quantized layers.
        kept: layers of a quantized component that stay float.
        tensors: by name.
    """

    kind: str
    config: Mapping[str, Any]
    quantized: bool
    kept: tuple[str, ...]
    tensors: Mapping[str, Whole]


def differences(reference: Any, test: Any, files: str | None = None) -> list[str]:
    """A sentence for everything that the two differ in beside quantization, or for their being no pair of float and quantized.

    Args:
        reference, test: bundled name, folder, hub id, or a pipeline in memory; of a hub id nothing is known.
        files: variant of the reference's weight files.
    """
    before, after = parts(reference, files), parts(test)
    if before is None or after is None:
        return []
    if _same(reference, test):
        return ["test and reference are the very same pipeline: the figures say nothing about quantization"]
    found = [] if any(part.quantized for part in after.values()) else ["nothing in the pipeline under test is quantized"]
    for name in before.keys() & after.keys():
        found += _between(name, before[name], after[name])
    for names, has, lacks in ((before.keys() - after.keys(), "reference", "test"), (after.keys() - before.keys(), "test", "reference")):
        found += [f"the {has} has the component '{name}' and the {lacks} does not: {TOO}" for name in names]
    return sorted(found) + _vocabularies(reference, test) + _adapters(reference, "reference") + _adapters(test, "test")


def refuse_pair(reference: Any, test: Any, files: str | None = None) -> None:
    """Refuse two pipelines of which a comparison says nothing, before anything is sampled: damaged, the same, of two kinds.

    A pipeline in memory may have been changed in ways that cannot be seen from here, so of those only the kinds are compared. A folder
    under test is read here, for its sums, and again when it is opened: the float clips are made in between, and to keep it from here on
    would hold both pipelines in memory.

    Args:
        reference, test, files: as for :func:`differences`.

    Raises:
        CheckpointError: if the folder under test is damaged.
        CalibrationError: if a weight in it is NaN or infinite.
        UnsupportedError: if nothing in it is quantized, or it cannot have been made from the reference.
    """
    give = "give a folder that reelquant quantize wrote, then the float pipeline it was made from"
    stored = isinstance(test, str | Path)
    folder = Path(locate(test)) if stored else Path()
    if stored and (folder / INDEX).is_file():
        check_folder(folder, sole_variant(folder))
    before, after = parts(reference, files), parts(test)
    if stored and after is not None:
        if not any(part.quantized for part in after.values()):
            raise UnsupportedError(f"'{test}' holds no quantized layer; {give}")
        if _same(reference, test):
            raise UnsupportedError(f"'{test}' is both the pipeline under test and its reference; {give}")
        for component in component_folders(folder):
            for file in loaded_files(component, sole_variant(folder)):
                _check_finite(component.name, file)
    if before is not None and after is not None:
        _refuse_kinds({"reference": (reference, before), "test": (test, after)}, give)


def _check_finite(component: str, file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        check_tensors(component, opened.keys(), opened.get_tensor)


def _refuse_kinds(sides: Mapping[str, tuple[Any, Mapping[str, Part]]], give: str) -> None:
    """Refuse pipelines of other classes, and models of other sizes."""
    (reference, before), (test, after) = sides["reference"], sides["test"]
    names = [_name(model) for model in (test, reference)]
    classes = [pipeline_class(model).__name__ for model in (test, reference)]
    if classes[0] != classes[1]:
        raise UnsupportedError(f"'{names[0]}' is of type {classes[0]} and its reference '{names[1]}' of type {classes[1]}; {give}")
    for part in sorted(before.keys() & after.keys()):
        kinds = [after[part].kind, before[part].kind]
        if kinds[0] != kinds[1] and before[part].tensors:
            raise UnsupportedError(
                f"'{part}' of '{names[0]}' is of type {kinds[0]} and that of its reference '{names[1]}' of type {kinds[1]}; {give}"
            )
        floats = before[part].tensors
        shapes = {key: (one.shape, floats[key].shape) for key, one in after[part].tensors.items() if key in floats}
        for key, (shape, other) in shapes.items():
            if len(shape) == len(other) == 1 and shape != other:  # codes may be packed; biases and norms never are
                raise UnsupportedError(
                    f"'{part}' of '{names[0]}' is another model than that of its reference '{names[1]}': "
                    f"{key} has {shape[0]} numbers, not {other[0]}; {give}"
                )


def _name(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def _vocabularies(reference: Any, test: Any) -> list[str]:
    before, after = _words_of(reference), _words_of(test)
    other = [name for name in sorted(before.keys() & after.keys()) if before[name] != after[name]]
    return [f"'{name}' of the test has another vocabulary than that of the reference: {TOO}" for name in other]


def _words_of(model: Any) -> dict[str, Any]:
    """The vocabularies of tokenizers that keep them as the library of that name does, by component."""
    found = {}
    if isinstance(model, str | Path):
        for folder in component_folders(Path(locate(model))):
            if (file := folder / "tokenizer.json").is_file():
                found[folder.name] = read_json(file).get("model")
    else:
        for name, part in model.components.items():
            if (backend := getattr(part, "backend_tokenizer", None)) is not None:
                found[name] = json.loads(backend.to_str()).get("model")
    return {name: content.get("vocab") for name, content in found.items() if isinstance(content, Mapping)}


def parts(model: Any, files: str | None = None) -> dict[str, Part] | None:
    """The components of a pipeline that have settings or weights; None if no folder of this machine holds it."""
    if not isinstance(model, str | Path):
        return {name: _of_object(plain(part)) for name, part in model.components.items() if hasattr(part, "config")}
    folder = Path(locate(model))
    if single_file(model) or not (folder / INDEX).is_file():
        return None
    variant = files or sole_variant(folder)
    index = read_json(folder / INDEX)
    described = [part for part in component_folders(folder) if any((part / name).is_file() for name in CONFIGS)]
    return {part.name: _of_folder(part, str(index[part.name][1]), variant) for part in described}


def _of_folder(folder: Path, kind: str, variant: str | None) -> Part:
    from safetensors import safe_open

    whole = read_json(next(folder / name for name in CONFIGS if (folder / name).is_file()))
    stored = whole.get(QUANTIZATION) or {}

    tensors: dict[str, Whole] = {}
    for file in loaded_files(folder, variant):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                shape = tuple(opened.get_slice(name).get_shape())
                tensors[name] = Whole(shape, functools.partial(_stored_rows, file, name), file)
    return Part(kind, _settings(whole), bool(stored), tuple(stored.get("ignore", ())), tensors)


def _stored_rows(file: Path, name: str, start: int, stop: int) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        tensor = opened.get_slice(name)
        return tensor[start:stop] if tensor.get_shape() else opened.get_tensor(name)


def _of_object(part: Any) -> Part:
    config = part.config if isinstance(part.config, Mapping) else part.config.to_dict()
    if not isinstance(part, nn.Module):
        return Part(type(part).__name__, _settings(config), False, (), {})
    layers = quantized_layers(part)
    kept = tuple(name for name, module in part.named_modules() if isinstance(module, tuple(LAYERS)) and name not in layers)
    tensors = {name: Whole(tuple(value.shape), functools.partial(_rows, value)) for name, value in part.state_dict().items()}
    return Part(type(part).__name__, _settings(config), bool(layers), kept, tensors)


def _rows(value: Tensor, start: int, stop: int) -> Tensor:
    return value[start:stop] if value.ndim else value


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has them, so that those of a file and of an object are alike."""
    told = {key: value for key, value in config.items() if key not in NOT_COMPARED and key.strip("_") == key}
    return json.loads(json.dumps(told, default=str))


def _between(name: str, before: Part, after: Part) -> list[str]:
    if before.kind != after.kind:
        return [f"'{name}' of the test is of type {after.kind}, that of the reference of type {before.kind}: {TOO}"]
    if before.quantized:
        return [f"'{name}' of the reference is quantized itself: give the float original"]
    other = [key for key in sorted(before.config.keys() & after.config.keys()) if before.config[key] != after.config[key]]
    found = []
    if other:
        some = ", ".join(f"{key} is {after.config[key]!r:.40}, not {before.config[key]!r:.40}" for key in other[:SHOWN])
        found.append(f"'{name}' of the test has other settings than that of the reference ({some}{_more(other)}): {TOO}")
    alike = [key for key in after.tensors if key in before.tensors and (not after.quantized or key.rpartition(".")[0] in after.kept)]
    changed = [key for key in alike if not _equal(before.tensors[key], after.tensors[key])]
    if changed:
        some = ", ".join(f"'{key}'" for key in changed[:SHOWN])
        found.append(f"'{name}' of the test has other float weights than that of the reference ({some}{_more(changed)}): {TOO}")
    return found


def _more(names: list[str]) -> str:
    return " ..." if len(names) > SHOWN else ""


def _equal(before: Whole, after: Whole) -> bool:
    """Whether two tensors hold the same values, all of them."""
    if before.shape != after.shape:
        return False
    if before.file is not None and after.file is not None and before.file.samefile(after.file):
        return True
    count = before.shape[0] if before.shape else 1
    step = max(1, SLAB * count // max(1, math.prod(before.shape)))
    return all(_alike(before.rows(start, start + step), after.rows(start, start + step)) for start in range(0, count, step))


def _alike(before: Tensor, after: Tensor) -> bool:
    """Whether both hold the same values, or one what is left of the other's in its dtype or in one that it was stored in."""
    before, after = before.cpu(), after.cpu()
    if before.dtype == after.dtype and torch.equal(before, after):
        return True
    through = {before.dtype, after.dtype, torch.bfloat16, torch.float16}
    return any(torch.equal(one.to(kind).float(), other.float()) for kind in through for one, other in ((before, after), (after, before)))


def _same(reference: Any, test: Any) -> bool:
    if single_file(reference) or single_file(test):
        return reference == test
    if isinstance(reference, str | Path) and isinstance(test, str | Path):
        return Path(locate(reference)).resolve() == Path(locate(test)).resolve()
    return reference is test


def _adapters(model: Any, which: str) -> list[str]:
    """Adapters beside the layers of a pipeline in memory, and those that were merged before a folder was quantized."""
    if not isinstance(model, str | Path):
        loaded = {name for part in model.components.values() for name in getattr(part, "peft_config", None) or ()}
        return [f"adapter '{name}' is loaded into the {which}: {TOO}, unless the other one has it" for name in sorted(loaded)]
    file = Path(locate(model)) / "report.json"
    merged = read_json(file).get("adapters") if file.is_file() else None
    return [f"adapter '{name}' was merged into the {which}: {TOO}, unless the other one has it" for name in merged or ()]
