"""Outputs of temporal layers for the sampler's own timesteps: a finite set, stored exactly and looked up instead of computed.

Paper: the cache-based maintenance of "Temporal Feature Matters" (arXiv 2407.19547). Ours finds by experiment which temporal layers are
not needed once the tables are in use, and keeps the quantized layers for timesteps that are not in the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reelquant._errors import RecipeError
from reelquant.formats import NOTHING
from reelquant.nn import LayerLayout, QuantLayer, TensorLayout
from reelquant.nn.spec import codes_dtype
from reelquant.stages import ModelWork, Stage, StageSite

WORDS: dict[str, dict[str, Any] | None] = {"quantize": None, "table": {}, "fold": {"fold": True}}
"""What recipes write under ``temporal``."""


@dataclass(frozen=True)
class TemporalTable(Stage):
    """Store the exact outputs of temporal layers for the sampler's own steps, as far as they depend on the timestep alone.

    Attributes:
        fold: store no weights of these layers. The model then samples with the timesteps of the calibration and no others, as models of
            one or a few steps do. Paper: AdcSR (arXiv 2411.13383) folds what a one-step model computes from its timestep and its prompt
            into constants. Deviation: what depends on the prompt stays computed (once per clip, see :mod:`reelquant.nn.output_cache`).
    """

    fold: bool = False

    statistics: ClassVar[frozenset[str]] = frozenset({"features"})
    key: ClassVar[str | None] = "temporal"
    default_on: ClassVar[str] = "role:temporal"
    in_memory: ClassVar[str | None] = "it stores tables of temporal outputs; set temporal=quantize"

    @classmethod
    def parse_key(cls, value: Any) -> Mapping[str, Any] | None:
        if value not in WORDS:
            raise RecipeError(f"temporal is 'quantize', 'table' or 'fold', got {value!r}")
        return WORDS[value]

    def needs(self, site: StageSite) -> frozenset[str]:
        return self.statistics if site.layer.role == "temporal" else frozenset()

    def stored_by_step(self, site: StageSite) -> int:
        return 4 * site.layer.shape[0] if site.layer.role == "temporal" else 0

    def after_installing(self, work: ModelWork) -> None:
        tabled: dict[str, QuantLayer] = {}
        for name, layer in work.quantized().items():
            known = work.map.layers[name]
            features = work.statistics(name).features
            if known.role != "temporal" or features is None:
                continue
            if features.varies:
                others = ", ".join(sorted(known.depends))
                work.warnings.append(f"'{name}' has no table: its input depends on more than the timestep ({others})")
            elif len(work.statistics(name).range.seen) != len(work.timesteps):
                work.warnings.append(f"'{name}' has no table: it does not run at every step")
            else:
                add_table(layer, work.float_layer(name), features.features)
                tabled[name] = layer
        drop_unused(tabled, lambda: _output(work))
        for layer in tabled.values() if self.fold else ():
            fold(layer)


def _output(work: ModelWork) -> Tensor:
    """The output of the first call that calibration saw."""
    args, kwargs = work.example
    result = work.denoiser(*args, **kwargs)
    return result[0] if isinstance(result, tuple) else result.sample


def add_table(layer: QuantLayer, module: nn.Module, features: Tensor) -> None:
    """Store what the float ``module`` answers to ``features`` ``[steps, in]`` inside its quantized replacement."""
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        table = module(features.to(dtype)).float()
    layer.layout = replace(layer.layout, table=len(table))
    layer.register_buffer("output_table", table)


def fold(layer: QuantLayer) -> None:
    """Drop everything of a layer but its table and its bias. The bias stays because diffusers reads dtypes off first parameters."""
    layer.residency.forget()
    names = [name for name in layer._buffers if name != "output_table"]
    for name in names:
        delattr(layer, name)
    rows, device = layer.weight_shape[0], layer.weight.device
    nothing = TensorLayout("int8", "tensor", kept=NOTHING)
    layer.layout = LayerLayout(nothing, bias=layer.layout.bias, table=layer.layout.table, unused=layer.layout.unused)
    layer.weight = nn.Parameter(torch.empty(rows, 0, dtype=codes_dtype(nothing), device=device), requires_grad=False)
    layer.register_buffer("weight_scale", torch.ones(1, device=device))


@torch.no_grad()
def drop_unused(layers: Mapping[str, QuantLayer], output: Callable[[], Tensor]) -> list[str]:
    """Find the tables that are never read, drop them, and return the names of their layers.

    A layer is unused if poisoning its output with NaN leaves the denoiser's output finite: its only readers are temporal layers that
    answer from their own table.

    Args:
        layers: temporal layers that have a table.
        output: calls the denoiser at a stored timestep.
    """
    unused = []
    for name, layer in layers.items():
        handle = layer.register_forward_hook(lambda module, args, result: torch.full_like(result, torch.nan))
        try:
            if bool(output().isfinite().all()):
                unused.append(name)
        finally:
            handle.remove()
    for name in unused:
        layers[name].layout = replace(layers[name].layout, unused=True)
        del layers[name].output_table
    return unused
