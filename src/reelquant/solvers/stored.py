"""Codes and scales of a model that is quantized already, for another float model of the same architecture."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from reelquant._errors import CheckpointError
from reelquant.formats import Quantizer, fit, read_scales, unpack
from reelquant.solvers.nearest import Nearest
from reelquant.solvers.problem import Problem
from reelquant.solvers.solver import Solver
from reelquant.stages import LayerWork, Solution, Stage


@dataclass(frozen=True)
class Stored(Solver):
    """Take codes and scales from a folder that was saved, whatever the float weight is now.

    A reconstruction that follows may then train scales for a changed model (:class:`reelquant.reconstruct.scales.Scales`), so that many
    variants of a model share one set of codes. Without a folder weights are rounded to nearest.

    Attributes:
        folder: of the quantized pipeline or of its component.

    Paper: TuneQDM (ECCV 2024, arXiv 2401.04339), whose variants of a model share their integers.
    """

    folder: str = ""
    samples: ClassVar[bool] = False

    def draft(self) -> Stage:
        return self

    def solve(self, problem: Problem) -> Solution:
        return Nearest().solve(problem)

    def solve_layer(self, layer: LayerWork) -> LayerWork:
        if not self.folder:
            return super().solve_layer(layer)
        solution = read(Path(self.folder), layer.site.layer.name, fit(layer.site.specs.weight, layer.matrix), layer.matrix)
        return replace(layer, solution=replace(solution, solver="stored"), correct_bias=self.correct_bias)


def read(folder: Path, name: str, like: Quantizer, weight: Tensor) -> Solution:
    """Codes and scales of one layer.

    Args:
        like: a quantizer of the numbers that are expected.
        weight: the float weight ``[out, in]``, for its shape and device.

    Raises:
        CheckpointError: if the folder has no such layer, or one with other numbers.
    """
    tensors = _tensors(folder, name)
    bits, rewritten = like.format.bits, [key for key in tensors if key not in KNOWN]
    if rewritten or like.format.table is not None:
        raise CheckpointError(
            f"'{name}' in '{folder}' has more than codes and scales ({', '.join(rewritten) or 'levels'}); quantize without"
        )
    codes, scale = tensors["weight"], read_scales(like.granularity.scale, tensors["weight_scale"], tensors.get("weight_scale_2"))
    zero = tensors.get("weight_zero_point")
    fits = codes.shape == (len(weight), -(-weight.shape[1] * bits // 8)) and scale.shape == like.scale.shape
    if not fits or (zero is None) != (like.zero_point is None):
        raise CheckpointError(
            f"'{name}' in '{folder}' has {tuple(codes.shape)} bytes of codes and {tuple(scale.shape)} scales, which are not those of "
            f"{like.format.name} per {like.granularity}; write the numbers that it was quantized with"
        )
    codes = (codes ^ -128).view(torch.uint8) if codes.dtype == torch.int8 else codes
    quantizer = replace(like, scale=scale.to(weight.device), zero_point=None if zero is None else zero.float().to(weight.device))
    return Solution(quantizer, unpack(codes.to(weight.device), bits, weight.shape[1]))


KNOWN = ("weight", "weight_scale", "weight_scale_2", "weight_zero_point", "bias")


def _tensors(folder: Path, name: str) -> Mapping[str, Tensor]:
    files = _files(folder)
    keys = [key for key in files if key.rpartition(".")[0] == name]
    if f"{name}.weight" in keys and f"{name}.weight_scale" not in keys:
        raise CheckpointError(f"'{folder}' keeps layer '{name}' in float; skip it here, too (--skip {name})")
    if not keys:
        raise CheckpointError(f"'{folder}' has no quantized layer '{name}'; give the folder of a pipeline that reelquant saved")
    found = {}
    for key in keys:
        with safe_open(files[key], "pt") as opened:
            found[key.rpartition(".")[2]] = opened.get_tensor(key)
    return found


@functools.lru_cache(maxsize=4)
def _files(folder: Path) -> dict[str, Path]:
    """Which file holds a tensor."""
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found
