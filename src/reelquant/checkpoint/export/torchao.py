"""torchao: a pipeline folder that stock diffusers opens with torchao and without reelquant; weight-only.

What diffusers 0.42 reads (``quantizers/torchao``): ``quantization_config`` of ``config.json`` with a serialized torchao config, and
safetensors files whose metadata describes each tensor, as ``torchao.prototype.safetensors`` writes it. Int8 and float8 weights are
``<module>._weight_qdata`` and ``<module>._weight_scale`` there. Attributes that have a default are left out of the metadata, because they
come and go with versions of torchao; so nothing here needs torchao.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelquant._errors import UnsupportedError
from reelquant._progress import Progress
from reelquant.checkpoint.export.assemble import assemble, check_biases, check_features
from reelquant.checkpoint.export.dtypes import SafetensorsDialect, as_numbers, code_dtype
from reelquant.checkpoint.export.names import Naming
from reelquant.checkpoint.export.numbers import NumberType
from reelquant.checkpoint.export.result import Exported, Outcome, left_behind
from reelquant.checkpoint.export.source import WEIGHTS, ExportSource, Facts, quantized_components
from reelquant.checkpoint.export.write import Shape, write_safetensors
from reelquant.checkpoint.folder import check_target, new_folder, refuse_source
from reelquant.checkpoint.save import REPORT_FILE
from reelquant.formats import Granularity, Int, Quantizer, parse_format
from reelquant.models.blank import CLASS, CONFIG, QUANTIZATION
from reelquant.models.manifest import MANIFEST, check_manifest, write_manifest

SAME = Naming("those of diffusers", "")
OPENS = "DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16), with torchao >= 0.16 installed"
ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
CONFIGS: dict[str, dict[str, Any]] = {  # what a torchao config looks like in JSON
    "int8": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"granularity": ROW}},
    "fp8": {
        "_type": "Float8WeightOnlyConfig",
        "_version": 2,
        "_data": {"weight_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"}},
    },
}
TENSORS = {"int8": "Int8Tensor", "fp8": "Float8Tensor"}


class TorchAo(SafetensorsDialect):
    """Linear layers with a scale per row."""

    types = {  # noqa: RUF012
        "fp8": NumberType("fp8", parse_format("e4m3"), Granularity("channel")),
        "int8": NumberType("int8", Int(8), Granularity("channel")),
    }
    default = "int8"

    def stays_float(self, facts: Facts) -> str | None:
        if facts.fp32:
            return "diffusers keeps this layer in float32"
        return None if facts.linear else "diffusers reads linear layers from torchao only"

    def forms(self, name: str, facts: Facts, numbers: str) -> dict[str, tuple[Shape, torch.dtype]]:
        weight = (facts.shape, code_dtype(self.types[numbers].format))
        return {f"{name}._weight_qdata": weight, f"{name}._weight_scale": ((facts.shape[0], 1), torch.float32)}

    def pack(self, name: str, facts: Facts, numbers: str, codes: Tensor, quantizer: Quantizer) -> tuple[dict[str, Tensor], Tensor]:
        weight, scale = as_numbers(codes, quantizer.format), quantizer.scale.reshape(-1, 1)
        return dict(zip(self.forms(name, facts, numbers), (weight, scale), strict=True)), weight.float() * scale


def export(folder: Path, output: Path, *, component: str | None, numbers: str | None, force: bool, progress: Progress) -> Exported:
    """Write the whole pipeline; see :func:`reelquant.export`."""
    dialect, found = TorchAo(numbers), quantized_components(folder)
    if component is not None:
        raise UnsupportedError(f"torchao exports are whole pipelines; leave out component='{component}' (--component)")
    refuse_source(output, folder)
    path = check_target(output, force=force)
    outcomes: list[Outcome] = []
    behind: dict[str, list[str]] = {}
    root = next(iter(found.values())).parent
    check_manifest(root)
    sources = [ExportSource(place) for place in found.values()]
    _check(sources)
    with new_folder(path, force=force) as temporary:
        shutil.copytree(root, temporary, dirs_exist_ok=True, ignore=lambda at, names: _not_copied(Path(at), names, root, found))
        for source in sources:
            made = _component(source, temporary / source.component, dialect, progress)
            outcomes += made.layers
            for what, names in made.left_behind.items():
                behind.setdefault(what, []).extend(f"{source.component}.{layer}" if len(found) > 1 else layer for layer in names)
        write_manifest(temporary)
    return Exported(path, "torchao", tuple(found), SAME.words, outcomes, behind, OPENS)


def _check(sources: list[ExportSource]) -> None:
    """Refuse what cannot be exported before the pipeline is copied."""
    for source in sources:
        if CLASS not in source.config:
            raise UnsupportedError(
                f"component '{source.component}' is quantized and no model of diffusers; torchao exports cannot hold it: leave it float"
            )
    for source in sources:
        with source:
            check_features(source)
            check_biases(source)


def _not_copied(at: Path, names: list[str], root: Path, found: dict[str, Path]) -> list[str]:
    """Weights, which are written again, and the report, which describes another file."""
    if at == root:
        return [name for name in names if name in (REPORT_FILE, MANIFEST)]
    quantized = at in found.values()
    return [name for name in names if quantized and (name == CONFIG or name.startswith(WEIGHTS))]


def _component(source: ExportSource, target: Path, dialect: TorchAo, progress: Progress) -> Exported:
    with source:
        parts, outcomes = assemble(source, dialect, SAME)
        chosen = {outcome.name: outcome.becomes for outcome in outcomes if outcome.fate in ("carried", "requantized")}
        progress.phase("export", len(parts))
        write_safetensors(target / f"{WEIGHTS}.safetensors", parts, _metadata(source, chosen), progress)
        _write_config(source, target, chosen)
        behind = left_behind(source.layers, rounding="weight-only, products are computed in float")
        return Exported(target, "torchao", (source.component,), SAME.words, outcomes, behind)


def _metadata(source: ExportSource, chosen: dict[str, str]) -> dict[str, str]:
    """What ``torchao.prototype.safetensors`` says about each tensor."""
    plain = json.dumps({"_type": "Tensor"})
    tensors = dict.fromkeys(source.floats, plain)
    for name, facts in source.layers.items():
        tensors[f"{name}.weight"] = _subclass(source, facts, chosen[name]) if name in chosen else plain
        tensors |= {f"{name}.bias": plain} if facts.bias else {}
    return {"format": "pt", **tensors, "tensor_names": json.dumps(list(tensors))}


def _subclass(source: ExportSource, facts: Facts, numbers: str) -> str:
    dtype = {"_type": "torch.dtype", "_data": str(source.dtype).removeprefix("torch.")}
    data = {"block_size": [1, facts.shape[1]], "dtype": dtype}
    return json.dumps({"_type": TENSORS[numbers], "_data": data, "_tensor_data_names": ["qdata", "scale"]})


def _write_config(source: ExportSource, target: Path, chosen: dict[str, str]) -> None:
    kind = "int8" if "int8" in chosen.values() or not chosen else "fp8"
    config = {
        **source.config,
        QUANTIZATION: {"quant_method": "torchao", "quant_type": {"default": CONFIGS[kind]}, "modules_to_not_convert": None},
    }
    (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
