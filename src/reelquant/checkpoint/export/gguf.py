"""GGUF: one file of a diffusion model, for diffusers' loader and ComfyUI-GGUF.

What they read (diffusers 0.42 ``quantizers/gguf``, ComfyUI-GGUF commit 795e451): quantized weights of linear layers;
everything else as F32 or F16, of any rank (5-D patch embeddings of video models included, which llama.cpp's own tools
refuse). A BF16 tensor that is not the weight of a linear layer breaks diffusers. Blocks of 32 (Q4_K: 256) weights lie
along rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reelquant._errors import SiteError, UnsupportedError
from reelquant._progress import Progress
from reelquant._version import __version__
from reelquant.checkpoint.export.assemble import Dialect, assemble
from reelquant.checkpoint.export.names import naming_of
from reelquant.checkpoint.export.numbers import NumberType
from reelquant.checkpoint.export.result import Exported, left_behind
from reelquant.checkpoint.export.source import ExportSource, Facts, choose_component
from reelquant.checkpoint.export.write import Part, Shape, check_file, new_file, raw
from reelquant.formats import Granularity, Int, Mse, Quantizer
from reelquant.models.blank import opens_single_files
from reelquant.nn import get_module

SUFFIX = ".gguf"
BLOCK, SUPERBLOCK = 32, 256
PIECE = 256  # rows that are read back at once
GROUP = Granularity("group", BLOCK)
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
OPENS = "{kind}.from_single_file(file, config=FOLDER, subfolder='{component}', quantization_config=GGUFQuantizationConfig(...))"


class Gguf(Dialect[str]):
    """Forms are the names of GGML's types."""

    types = {  # noqa: RUF012
        "Q4_0": NumberType("Q4_0", Int(4), GROUP, Mse(candidates=16, smallest=0.7)),
        "Q4_1": NumberType("Q4_1", Int(4, signed=False), GROUP),
        "Q8_0": NumberType("Q8_0", Int(8), GROUP),
        "Q4_K": NumberType("Q4_K", Int(4, signed=False), GROUP, together=SUPERBLOCK),
    }
    default = "Q8_0"

    def type_for(self, facts: Facts) -> str:
        chosen = super().type_for(facts)
        return "Q4_0" if chosen == "Q4_K" and facts.shape[1] % SUPERBLOCK else chosen  # as llama.cpp does

    def stays_float(self, facts: Facts) -> str | None:
        if not facts.linear:
            return "GGUF readers of diffusion models quantize linear layers only"
        if facts.shape[1] % BLOCK:
            return f"rows of {facts.shape[1]} weights are not a multiple of {BLOCK}"
        return None

    def float_form(self, source: ExportSource, name: str, shape: Shape, dtype: torch.dtype) -> str:
        if dtype == torch.float16 and len(shape) > 1:
            return "F16"
        return "BF16" if dtype == torch.bfloat16 and _linear_weight(source.blank, name) else "F32"

    def dequantized_form(self, source: ExportSource, facts: Facts) -> str:
        return "F32" if facts.fp32 else "F16"

    def forms(self, name: str, facts: Facts, numbers: str) -> dict[str, tuple[Shape, str]]:
        return {f"{name}.weight": (facts.shape, numbers)}

    def pack(self, name: str, facts: Facts, numbers: str, codes: Tensor, quantizer: Quantizer) -> tuple[dict[str, Tensor], Tensor]:
        library = gguf_library()
        blocks = PACK[numbers](codes.reshape(-1, BLOCK), quantizer)
        rows = blocks.reshape(facts.shape[0], -1)
        kind = library.GGMLQuantizationType[numbers]
        seen = [torch.from_numpy(library.quants.dequantize(some.numpy(), kind)) for some in rows.split(PIECE)]  # the library takes copies
        return {f"{name}.weight": rows}, torch.cat(seen)

    def cast(self, value: Tensor, form: str) -> Tensor:
        return value.to(next(dtype for dtype, name in FLOATS.items() if name == form))

    def size(self, shape: Shape, form: str) -> int:
        library = gguf_library()
        block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[form]]
        return torch.Size(shape).numel() // block * size

    def called(self, form: str) -> str:
        return form


def _linear_weight(model: nn.Module, name: str) -> bool:
    layer, _, tensor = name.rpartition(".")
    try:
        return tensor == "weight" and isinstance(get_module(model, layer), nn.Linear)
    except SiteError:
        return False


def gguf_library() -> Any:
    """The ``gguf`` package.

    Raises:
        UnsupportedError: if it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UnsupportedError("GGUF files are written with the package gguf: pip install 'reelquant[export]'") from None
    return gguf


# ---------------------------------------------------------------------------------------------------- blocks, [blocks, bytes] uint8


def _half(values: Tensor) -> Tensor:
    return values.reshape(-1, 1).to(torch.float16).view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """The first half of a block in the low nibbles, the second in the high ones."""
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def _q8_0(codes: Tensor, quantizer: Quantizer) -> Tensor:
    return torch.cat([_half(quantizer.scale), codes ^ 128], 1)


def _q4_0(codes: Tensor, quantizer: Quantizer) -> Tensor:
    return torch.cat([_half(quantizer.scale), _nibbles(codes)], 1)


def _q4_1(codes: Tensor, quantizer: Quantizer) -> Tensor:
    assert quantizer.zero_point is not None
    lowest = -quantizer.zero_point * quantizer.scale
    return torch.cat([_half(quantizer.scale), _half(lowest), _nibbles(codes)], 1)


def _q4_k(codes: Tensor, quantizer: Quantizer) -> Tensor:
    """Scales and minima of eight blocks are integers of 6 bits, times two halves; codes are chosen again for what is left of them."""
    assert quantizer.zero_point is not None
    scale = quantizer.scale.reshape(-1, SUPERBLOCK // BLOCK)
    minimum = quantizer.zero_point.reshape(scale.shape) * scale
    weight = codes.reshape(*scale.shape, BLOCK) * scale[..., None] - minimum[..., None]
    (unit, scales), (unit_min, minima) = _six_bits(scale), _six_bits(minimum)
    step, offset = (unit * scales)[..., None], (unit_min * minima)[..., None]
    again = ((weight + offset) / step.clamp(min=1e-30)).round().clamp(0, 15).to(torch.uint8)
    pairs = again.reshape(-1, SUPERBLOCK // BLOCK // 2, 2 * BLOCK)
    return torch.cat([_half(unit), _half(unit_min), _six_bit_bytes(scales, minima), _nibbles(pairs).flatten(1)], 1)


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """``values`` of a superblock as a half times integers up to 63; equal ones as that half times 1, which loses nothing."""
    equal = (values == values[:, :1]).all(1, keepdim=True)
    unit = (values.amax(1, keepdim=True) / torch.where(equal, 1.0, 63.0)).to(torch.float16).float()
    return unit, (values / unit.clamp(min=1e-30)).round().clamp(0, 63)


def _six_bit_bytes(scales: Tensor, minima: Tensor) -> Tensor:
    """Twelve bytes for eight scales and eight minima: the first four in six bits each, high bits of the last four above them."""
    s, m = scales.to(torch.uint8), minima.to(torch.uint8)
    first = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    return torch.cat([first, second, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], 1)


PACK: dict[str, Callable[[Tensor, Quantizer], Tensor]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}


# -------------------------------------------------------------------------------------------------------------------------- files


def export(folder: Path, output: Path, *, component: str | None, numbers: str | None, force: bool, progress: Progress) -> Exported:
    """Write one component; see :func:`reelquant.export`."""
    gguf_library()
    dialect, path = Gguf(numbers), check_file(output, SUFFIX, force=force)
    with ExportSource(choose_component(folder, component)) as source:
        if not opens_single_files(source.blank):
            raise UnsupportedError(
                f"GGUF files of {source.kind} cannot be opened: diffusers has no from_single_file for it; export to torchao"
            )
        naming = naming_of(source.kind)
        parts, outcomes = assemble(source, dialect, naming)
        progress.phase("export", len(parts))
        with new_file(path) as temporary:
            _write(temporary, parts, dialect, naming.architecture, source, progress)
        behind = left_behind(source.layers, rounding="weight-only, products are computed in float")
        opens = OPENS.format(kind=source.kind, component=source.component)
        return Exported(path, "gguf", (source.component,), naming.words, outcomes, behind, opens)


def _write(path: Path, parts: list[Part[str]], dialect: Gguf, architecture: str, source: ExportSource, progress: Progress) -> None:
    library = gguf_library()
    writer = library.GGUFWriter(path, architecture)
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    writer.add_string("reelquant.version", __version__)
    writer.add_string("reelquant.recipe", str(source.stored.recipe.get("name")))
    for part in parts:
        for name, (shape, form) in part.tensors.items():
            writer.add_tensor_info(name, shape, np.dtype(np.float32), dialect.size(shape, form), library.GGMLQuantizationType[form])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in parts:
            made = part.make()
            for name in part.tensors:
                writer.write_tensor_data(raw(made[name]))
            progress.advance()
    finally:
        writer.close()
