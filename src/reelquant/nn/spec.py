"""What a quantized layer is made of, as plain data: enough to build it empty and fill it from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from reelquant._errors import CheckpointError
from reelquant.formats import RANGES, Granularity, NumberFormat, QuantSpec, parse_format, parse_granularity
from reelquant.kernels.features import features_in_use


@dataclass(frozen=True)
class TensorLayout:
    """How one tensor of a layer is stored.

    Attributes:
        format: a name of :data:`reelquant.formats.FORMATS`.
        granularity: as recipes write it, ``group-64``.
        levels: length of the stored level table, 0 for formats that the name describes completely.
        dynamic: the range is found in the forward (inputs).
        range: name of the range rule that runs in the forward when dynamic.
    """

    format: str
    granularity: str
    levels: int = 0
    dynamic: bool = False
    range: str = "minmax"

    @classmethod
    def of(cls, spec: QuantSpec, fmt: NumberFormat) -> TensorLayout:
        """The layout of a spec whose format has been fitted to ``fmt``."""
        rule = next(name for name, kind in RANGES.items() if type(spec.range) is kind)
        levels = 0 if fmt.table is None else len(fmt.table)
        return cls(fmt.name, str(spec.granularity), levels, spec.dynamic, rule if spec.dynamic else "minmax")

    def to_json(self) -> dict[str, Any]:
        """A dict without defaults, but always with format and granularity."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in values.items() if value != defaults[name]}

    def spec(self, axis: int = 0) -> QuantSpec:
        """The specification a dynamic quantizer follows."""
        return QuantSpec(parse_format(self.format), self.grain(axis), RANGES[self.range](), dynamic=self.dynamic)

    def grain(self, axis: int = 0) -> Granularity:
        """The granularity, parsed."""
        return parse_granularity(self.granularity, axis)


JSON_NAMES = {"weight": "weights", "input": "input_activations"}  # fields whose key in config.json is another word
ALIASES = {"lasting": "step_invariant", "halves": "cfg_halves"}  # keys of earlier versions -> fields
PLAIN = frozenset({"weight", "bias"})  # fields that are no features
HALVES = 3  # rows of input scales per step where guidance halves are apart: of any call, of the first half, of the second


@dataclass(frozen=True)
class LayerLayout:
    """How one layer is stored.

    Attributes:
        weight: layout of the weight codes.
        input: layout of the input quantizer, or None for weight-only layers.
        slots: rows of the input scales: 1, or one per calibrated step; :data:`HALVES` times as many with ``cfg_halves``.
        rotate: whether the input's channels are rotated first (:func:`reelquant.kernels.hadamard`).
        shift, scale: whether a per-channel ``pre_quant_shift`` / ``pre_quant_scale`` is stored.
        bias: whether the layer has a bias (a transform may have created one).
        table: rows of the stored output table of a temporal layer, 0 for none.
        cfg_halves: whether the halves of a guidance pair have input scales of their own.
        unused: the layer's output is never needed while the tables of later layers are in force.
        step_invariant: the layer sees neither the latent nor the timestep, so its output is that of the step before
            (:mod:`reelquant.nn.output_cache`).
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

    @property
    def steps(self) -> int:
        """Denoising steps that the layer tells apart."""
        return max(self.slots // (HALVES if self.cfg_halves else 1), self.table)

    @property
    def features(self) -> frozenset[str]:
        """Names of what the layer uses beside a weight and a bias. Graphs and exporters refuse layers with a name they do not know."""
        return features_in_use(self, PLAIN)

    def to_json(self) -> dict[str, Any]:
        """A dict without defaults, in the wording of ``config.json``."""
        return {"weights": self.weight.to_json(), "input_activations": self.input and self.input.to_json()} | {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in JSON_NAMES and getattr(self, field.name) != field.default
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerLayout:
        """Read :meth:`to_json` back.

        Raises:
            CheckpointError: on a key this version does not know.
        """
        values = {ALIASES.get(key, key): value for key, value in data.items()}
        known = {JSON_NAMES.get(field.name, field.name) for field in fields(cls)}
        if unknown := set(values) - known:
            raise CheckpointError(f"quantization_config describes layers with unknown keys {sorted(unknown)}: written by a newer version?")
        weight, inputs = values.pop("weights"), values.pop("input_activations", None)
        return cls(TensorLayout(**weight), TensorLayout(**inputs) if inputs else None, **values)
