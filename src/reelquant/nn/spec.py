"""What a quantized layer is made of, as plain data: enough to build it empty and fill it from a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from reelquant._errors import CheckpointError, RecipeError
from reelquant.branches import Branch, branch_feature, branch_from_json, branch_name, branch_to_json
from reelquant.formats import (
    LEVEL_DTYPE,
    NOTHING,
    RANGES,
    Granularity,
    Kept,
    Leading,
    Levels,
    NumberFormat,
    QuantSpec,
    packed_width,
    parse_format,
    parse_granularity,
)
from reelquant.kernels import FrameBands, Mix, mix_dtype, read_mix
from reelquant.kernels.features import features_in_use, grain_features


@dataclass(frozen=True)
class TensorLayout:
    """How one tensor of a layer is stored.

    Attributes:
        format: a name of :data:`reelquant.formats.FORMATS`.
        granularity: as recipes write it, ``group-64``.
        levels: length of the stored level table, 0 for formats that the name describes completely.
        dynamic: the range is found in the forward (inputs).
        range: name of the range rule that runs in the forward when dynamic.
        scale: which numbers the scales are, a name of :mod:`reelquant.formats.scales`.
        kept: of a weight: how many of consecutive codes are stored, ``2:4``; the others stand for zero. Empty for all.
        rows, columns: of a weight: how many of consecutive rows, and of columns, are stored, the first ones, ``12:16``; the others are
            zero. Empty for all. Scales are those of the whole weight.
    """

    format: str
    granularity: str
    levels: int = 0
    dynamic: bool = False
    range: str = "minmax"
    scale: str = "float"
    kept: str = ""
    rows: str = ""
    columns: str = ""

    @property
    def removed(self) -> frozenset[str]:
        """Names of the fields that say what is not stored; empty if all codes are."""
        return frozenset(name for name in ("kept", "rows", "columns") if getattr(self, name))

    @classmethod
    def of(cls, spec: QuantSpec, fmt: NumberFormat) -> TensorLayout:
        """The layout of a spec whose format has been fitted to ``fmt``."""
        rule = next(name for name, kind in RANGES.items() if type(spec.range) is kind)
        levels = 0 if fmt.table is None else len(fmt.table)
        grain = spec.granularity
        return cls(fmt.name, str(grain), levels, spec.dynamic, rule if spec.dynamic else "minmax", grain.scale)

    def to_json(self) -> dict[str, Any]:
        """A dict without defaults, but always with format and granularity."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        defaults = {one.name: one.default for one in fields(self)}
        return {name: value for name, value in values.items() if value != defaults[name]}

    def spec(self, axis: int = 0) -> QuantSpec:
        """The specification a dynamic quantizer follows."""
        return QuantSpec(parse_format(self.format), self.grain(axis), RANGES[self.range](), dynamic=self.dynamic)

    def grain(self, axis: int = 0) -> Granularity:
        """The granularity, parsed."""
        return parse_granularity(self.granularity, axis, self.scale)


SHIFT_DTYPE = torch.bfloat16
"""Of per-channel shifts and scales. The bias and the weight codes are computed with the rounded values, so nothing is lost."""
WEIGHT_GRAINS = ("tensor", "channel", "group")
INPUT_GRAINS = ("tensor", "channel", "frame")
JSON_NAMES = {"weight": "weights", "input": "input_activations"}  # fields whose key in config.json is another word
ALIASES = {"lasting": "step_invariant", "halves": "cfg_halves"}  # keys of earlier versions -> fields
PLAIN = frozenset({"weight", "bias", "branches"})  # fields that are not features; branches count by their names
HALVES = 3  # rows of input scales per step where guidance halves are apart: of any call, of the first half, of the second


@dataclass(frozen=True)
class LayerLayout:
    """How one layer is stored.

    Attributes:
        weight: layout of the weight codes.
        input: layout of the input quantizer, or None for weight-only layers.
        slots: rows of the input scales: 1, or one per calibrated step; :data:`HALVES` times as many with ``cfg_halves``.
        rotate: whether the input's channels are rotated first (:func:`reelquant.kernels.hadamard`).
        mix: what happens to the input's channels before that, in order: ``scale``, ``rotate``, ``rotate-32``, ``permute``
            (:mod:`reelquant.kernels.mixing`); the vector of number i is stored as ``pre_quant_mix_i``.
        shift, scale: whether a per-channel ``pre_quant_shift`` / ``pre_quant_scale`` is stored.
        bias: whether the layer has a bias (a transform may have created one).
        table: rows of the stored output table of a temporal layer, 0 for none.
        cfg_halves: whether the halves of a guidance pair have input scales of their own.
        unused: the layer's output is never needed while the tables of later layers are in force.
        step_invariant: the layer sees neither the latent nor the timestep, so its output is that of the step before
            (:mod:`reelquant.nn.output_cache`).
        branches: what the layer computes beside its product, outermost first; at most one of a kind.
        bands: how the input's frames are mixed around the product, and the bits of each band, as
            :attr:`reelquant.kernels.FrameBands.stored` has it; empty for no mix.
    """

    weight: TensorLayout
    input: TensorLayout | None = None
    slots: int = 1
    shift: bool = False
    scale: bool = False
    bias: bool = True
    table: int = 0
    unused: bool = False
    rotate: bool = False
    cfg_halves: bool = False
    step_invariant: bool = False
    branches: tuple[Branch, ...] = ()
    mix: tuple[str, ...] = ()
    bands: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """Denoising steps that the layer tells apart."""
        return max(self.slots // (HALVES if self.cfg_halves else 1), self.table)

    @property
    def folded(self) -> bool:
        """Whether the layer has its outputs alone, and no weight."""
        return self.weight.kept == NOTHING

    @property
    def clips(self) -> bool:
        """Whether inputs are rounded with scales that are fixed, so that they can leave the range."""
        return self.input is not None and not self.input.dynamic

    @property
    def features(self) -> frozenset[str]:
        """Names of what the layer uses beside a weight and a bias. Graphs and exporters refuse layers with a name they do not know."""
        grains = grain_features(self.weight.grain(), None if self.input is None else self.input.grain(-1))
        return features_in_use(self, PLAIN) | grains | self.weight.removed | {branch_feature(branch) for branch in self.branches}

    def to_json(self) -> dict[str, Any]:
        """A dict without defaults, in the wording of ``config.json``."""
        plain = {"weights": self.weight.to_json(), "input_activations": self.input and self.input.to_json()}
        in_use = features_in_use(self, ("weight", "input", "branches"))
        branches = {branch_name(branch): branch_to_json(branch) for branch in self.branches}
        return plain | {name: _plain(getattr(self, name)) for name in sorted(in_use)} | ({"branches": branches} if branches else {})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerLayout:
        """Read :meth:`to_json` back.

        Raises:
            CheckpointError: on a key or a branch that this version does not know.
        """
        values = {ALIASES.get(key, key): value for key, value in data.items()}
        known = {JSON_NAMES.get(one.name, one.name) for one in fields(cls)}
        if unknown := set(values) - known:
            raise CheckpointError(f"quantization_config describes layers with unknown keys {sorted(unknown)}: written by a newer version?")
        bands = _bands(values.pop("bands", ()))
        weight, inputs = values.pop("weights"), values.pop("input_activations", None)
        return cls(
            weight=TensorLayout(**weight),
            input=TensorLayout(**inputs) if inputs else None,
            branches=_branches(values.pop("branches", {})),
            mix=tuple(values.pop("mix", ())),
            bands=bands,
            **values,
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _bands(stored: Any) -> tuple[int, ...]:
    try:
        return FrameBands.read(stored).stored if stored else ()
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"quantization_config describes a layer whose frames are mixed in no known way, {stored!r:.80}: {error}"
        ) from None


def _branches(data: dict[str, dict[str, Any]]) -> tuple[Branch, ...]:
    try:
        return tuple(branch_from_json(name, options) for name, options in data.items())
    except RecipeError as error:
        raise CheckpointError(f"quantization_config describes a layer with a branch that cannot be read: {error}") from None


@dataclass(eq=False)
class LayerTensors:
    """The tensors of one quantized layer, by their names in the checkpoint (``<layer>.weight``, ``<layer>.weight_scale`` ...)."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)


def buffer_shapes(shape: tuple[int, ...], layout: LayerLayout, channels: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every buffer of a layer, in checkpoint wording.

    Args:
        shape: of the float weight.
        layout: of the layer.
        channels: of the input.
    """
    buffers = _weight_buffers(shape, layout.weight) | _input_buffers(layout, channels)
    buffers |= {f"pre_quant_{name}": ((channels,), SHIFT_DTYPE) for name in ("shift", "scale") if getattr(layout, name)}
    kinds = {mix_name(place): mix_dtype(name, channels) for place, name in enumerate(layout.mix)}
    buffers |= {name: ((channels,), dtype) for name, dtype in kinds.items() if dtype is not None}
    if layout.table and not layout.unused:
        buffers["output_table"] = ((layout.table, shape[0]), torch.float32)
    for branch in layout.branches:
        buffers |= {name: (spec.shape, spec.dtype) for name, spec in branch.tensors(shape).items()}
    return buffers


def mix_name(place: int) -> str:
    """Name of the vector of an operation of :attr:`LayerLayout.mix`."""
    return f"pre_quant_mix_{place}"


def mixes_of(layer: Any) -> tuple[Mix, ...]:
    """What happens to the channels of a layer's input, with the vectors that the layer stores."""
    return tuple(read_mix(name, layer._buffers.get(mix_name(place))) for place, name in enumerate(layer.layout.mix))


def _weight_buffers(shape: tuple[int, ...], layout: TensorLayout) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    grain = layout.grain()
    units = _units(grain, shape, WEIGHT_GRAINS)
    buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"weight_scale": ((units,), grain.scale_dtype)}
    if grain.two_levels:
        buffers["weight_scale_2"] = ((1,), torch.float32)
    if parse_format(layout.format).needs_zero_point:
        buffers["weight_zero_point"] = ((units,), torch.uint8)
    if layout.levels:
        buffers["weight_levels"] = ((layout.levels,), LEVEL_DTYPE)
    return buffers


def _input_buffers(layout: LayerLayout, channels: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    inputs = layout.input
    if inputs is None or inputs.dynamic:
        return {}
    rows = (layout.slots, _units(inputs.grain(), (channels,), INPUT_GRAINS))
    buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"input_scale": (rows, torch.float32)}
    if parse_format(inputs.format).needs_zero_point:
        buffers["input_zero_point"] = (rows, torch.float32)
    if inputs.levels:
        buffers["input_levels"] = ((inputs.levels,), LEVEL_DTYPE)
    return buffers


def _units(grain: Granularity, shape: tuple[int, ...], kinds: tuple[str, ...]) -> int:
    if grain.kind not in kinds:
        raise CheckpointError(f"a layer cannot store scales per '{grain}' here; known: {', '.join(kinds)}")
    return grain.units(shape)


def number_format(layout: TensorLayout, levels: Tensor | None) -> NumberFormat:
    """The format of a tensor, with its stored level table if it has one."""
    fmt = parse_format(layout.format)
    return fmt if levels is None else Levels(levels.float(), fmt.bits, fmt.name)


def codes_shape(shape: tuple[int, ...], layout: TensorLayout) -> tuple[int, int]:
    """Shape of the packed codes of a float weight of this shape."""
    rows, width = Leading.read(layout.rows).count(shape[0]), Leading.read(layout.columns).count(math.prod(shape[1:]))
    bits = parse_format(layout.format).bits
    return rows, Kept.stored(layout.kept).row_bytes(width, bits) if layout.kept else packed_width(width, bits)


def codes_dtype(layout: TensorLayout) -> torch.dtype:
    """Dtype of packed codes."""
    return torch.int8 if layout.format == "int8" and layout.kept in ("", NOTHING) else torch.uint8
