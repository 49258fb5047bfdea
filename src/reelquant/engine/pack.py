"""A solved layer -> the quantized layer that stores it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from reelquant.engine.plan import LayerPlan
from reelquant.formats import LEVEL_DTYPE, Quantizer, scale_tensors
from reelquant.kernels import Mix
from reelquant.nn import SHIFT_DTYPE, LayerLayout, LayerTensors, QuantLayer, TensorLayout, mix_name, quantized_class
from reelquant.nn.weight_codes import stored_codes
from reelquant.stages import LayerWork, Rewrite, is_plain


def packed(row: LayerPlan, work: LayerWork, module: nn.Module) -> QuantLayer:
    """The quantized counterpart of a float layer."""
    layout = _layout(row, work)
    layer = quantized_class(module).like(module, layout, device=work.weight.device)
    bias = None if work.stored_bias is None else work.stored_bias.to(_bias_dtype(module, work.stored_bias))
    layer.fill(_tensors(work, layout, bias))
    return layer


def _bias_dtype(module: nn.Module, bias: Tensor) -> torch.dtype:
    """The layer's own dtype; a bias that the layer did not have takes half as much if it fits."""
    created = module.bias is None and float(bias.abs().amax()) < torch.finfo(torch.float16).max / 2
    return torch.float16 if created else module.weight.dtype


def _layout(row: LayerPlan, work: LayerWork) -> LayerLayout:
    assert work.solution is not None
    specs, rows = work.site.specs, work.stored_inputs or work.inputs
    input_layout = None
    if specs.input is not None:
        input_layout = TensorLayout.of(specs.input, work.inputs[0].format if work.inputs else specs.input.format)
    mixes, rotate = _mixes(work.inside)
    weight = TensorLayout.of(specs.weight, work.solution.quantizer.format)
    return LayerLayout(
        weight=replace(weight, kept=work.solution.kept, rows=work.rows, columns=work.columns),
        input=input_layout,
        slots=len(rows) if rows else 1,
        cfg_halves=work.stored_inputs is not None,
        rotate=rotate,
        mix=tuple(mix.name for mix in mixes),
        shift=work.inside.shift is not None,
        scale=work.inside.scale is not None,
        bias=work.stored_bias is not None,
        step_invariant=row.layer.role in ("prompt", "constant"),
        branches=tuple(branch for branch, _ in work.branches),
        bands=() if work.bands is None else work.bands.stored,
    )


def _mixes(rewrite: Rewrite) -> tuple[tuple[Mix, ...], bool]:
    """What mixes the channels, and whether the rotation that kernels know comes last."""
    last = bool(rewrite.mixes) and is_plain(rewrite.mixes[-1])
    return (rewrite.mixes[:-1] if last else rewrite.mixes), last


def _tensors(work: LayerWork, layout: LayerLayout, bias: Tensor | None) -> LayerTensors:
    assert work.solution is not None
    quantizer = work.solution.quantizer
    codes = stored_codes(work.solution.codes, quantizer, layout.weight)
    extra: dict[str, Tensor] = {}
    if quantizer.zero_point is not None:
        extra["weight_zero_point"] = quantizer.zero_point.to(torch.uint8)
    if layout.weight.levels and quantizer.format.table is not None:
        extra["weight_levels"] = quantizer.format.table.to(LEVEL_DTYPE)
    extra |= _input_tensors(list(work.stored_inputs or work.inputs or ()))
    vectors = (("shift", work.inside.shift), ("scale", work.inside.scale))
    extra |= {f"pre_quant_{name}": vector.to(SHIFT_DTYPE) for name, vector in vectors if vector is not None}
    stored = ((place, mix) for place, mix in enumerate(_mixes(work.inside)[0]))
    extra |= {mix_name(place): mix.vector.to(mix.dtype) for place, mix in stored if mix.vector is not None}
    for _, tensors in work.branches:  # laid out as a file gives them: products of columns sum in another order
        extra |= {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    scale, beside = scale_tensors(quantizer.granularity.scale, quantizer.scale, quantizer.whole, quantizer.granularity.scale_dtype)
    return LayerTensors(codes, scale, bias, extra | {f"weight_scale{name}": value for name, value in beside.items()})


def _input_tensors(rows: list[Quantizer]) -> dict[str, Tensor]:
    if not rows:
        return {}
    tensors = {"input_scale": torch.stack([row.scale for row in rows])}
    zeros = [row.zero_point for row in rows if row.zero_point is not None]
    if zeros:
        tensors["input_zero_point"] = torch.stack(zeros)
    if rows[0].format.table is not None:
        tensors["input_levels"] = rows[0].format.table.to(LEVEL_DTYPE)
    return tensors
