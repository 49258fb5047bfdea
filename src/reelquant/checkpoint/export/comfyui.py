"""ComfyUI: one safetensors file of a diffusion model, for its loader of models ("Load Diffusion Model").

What it reads (ComfyUI 0.29.0, commit 4f874c5, ``comfy/ops.py``, ``comfy/quant_ops.py``, ``comfy/utils.py``): a linear layer is quantized if
it has a ``<layer>.comfy_quant``, JSON as uint8, ``{"format": "int8_tensorwise" | "float8_e4m3fn", "full_precision_matrix_mult": bool}``.
Weights are int8 or float8_e4m3fn, ``<layer>.weight_scale`` is float32: a scalar for float8, a scalar or ``[out, 1]`` for int8. Convolutions
are never quantized. Without ``full_precision_matrix_mult`` inputs are rounded too: int8 ones by row, float8 ones with a scale of 1.

Files with a marker ``scaled_fp8`` and ``<layer>.scale_weight`` are the older spelling of scaled float8: the same loader still reads it, and
so do ComfyUI before 0.4 and other loaders; a marker of two elements asks for products in full precision.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from reelquant._progress import Progress
from reelquant._version import __version__
from reelquant.checkpoint.export.assemble import assemble
from reelquant.checkpoint.export.dtypes import SafetensorsDialect, as_numbers, code_dtype
from reelquant.checkpoint.export.names import naming_of
from reelquant.checkpoint.export.numbers import NumberType
from reelquant.checkpoint.export.result import Exported, left_behind
from reelquant.checkpoint.export.source import ExportSource, Facts, choose_component
from reelquant.checkpoint.export.write import Part, Shape, check_file, new_file, write_safetensors
from reelquant.formats import Granularity, Int, Quantizer, parse_format

SUFFIX = ".safetensors"
MARKER = "scaled_fp8"
FORMATS = {"int8": "int8_tensorwise", "fp8": "float8_e4m3fn"}
OPENS = "ComfyUI: put it into models/diffusion_models and choose it in 'Load Diffusion Model'"
FLOAT8 = NumberType("fp8 with one scale", parse_format("e4m3"), Granularity("tensor"))


class ComfyUI(SafetensorsDialect):
    """Quantized linear layers, everything else as it is."""

    types = {"fp8": FLOAT8, "int8": NumberType("int8", Int(8), Granularity("channel")), MARKER: FLOAT8}  # noqa: RUF012
    default = "int8"

    def stays_float(self, facts: Facts) -> str | None:
        return None if facts.linear else "ComfyUI quantizes linear layers only"

    def forms(self, name: str, facts: Facts, numbers: str) -> dict[str, tuple[Shape, torch.dtype]]:
        kind = self.types[numbers]
        scale = () if kind.granularity.kind == "tensor" else (facts.shape[0], 1)
        weight = {f"{name}.weight": (facts.shape, code_dtype(kind.format))}
        if numbers == MARKER:
            return weight | {f"{name}.scale_weight": (scale, torch.float32)}
        return weight | {
            f"{name}.weight_scale": (scale, torch.float32),
            f"{name}.comfy_quant": (tuple(_description(facts, numbers).shape), torch.uint8),
        }

    def pack(self, name: str, facts: Facts, numbers: str, codes: Tensor, quantizer: Quantizer) -> tuple[dict[str, Tensor], Tensor]:
        names = self.forms(name, facts, numbers)
        weight = as_numbers(codes, quantizer.format)
        scale = quantizer.scale.reshape([form[0] for form in names.values()][1])
        values = [weight, scale, *([_description(facts, numbers)] if len(names) == 3 else [])]
        return dict(zip(names, values, strict=True)), weight.float() * scale


def _description(facts: Facts, numbers: str) -> Tensor:
    """``comfy_quant``. Inputs are rounded where the recipe rounds them to integers as they come; ranges by row are then ComfyUI's."""
    layout = facts.layout
    as_they_come = layout.input is not None and not (layout.rotate or layout.mix or layout.shift or layout.scale or layout.branches)
    data = {"format": FORMATS[numbers], "full_precision_matrix_mult": numbers != "int8" or not as_they_come}
    return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)


def export(folder: Path, output: Path, *, component: str | None, numbers: str | None, force: bool, progress: Progress) -> Exported:
    """Write one component; see :func:`reelquant.export`."""
    dialect, path = ComfyUI(numbers), check_file(output, SUFFIX, force=force)
    with ExportSource(choose_component(folder, component)) as source:
        naming = naming_of(source.kind)
        parts, outcomes = assemble(source, dialect, naming)
        if numbers == MARKER:
            parts.append(Part({MARKER: ((2,), torch.float8_e4m3fn)}, lambda: {MARKER: torch.zeros(2, dtype=torch.float8_e4m3fn)}))
        about = {"format": "pt", "reelquant": json.dumps({"version": __version__, "recipe": source.stored.recipe.get("name")})}
        progress.phase("export", len(parts))
        with new_file(path) as temporary:
            write_safetensors(temporary, parts, about, progress)
        behind = left_behind(source.layers, rounding="ComfyUI finds ranges by row where it rounds, and computes in float elsewhere")
        return Exported(path, "comfyui", (source.component,), naming.words, outcomes, behind, OPENS)
