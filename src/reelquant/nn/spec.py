"""What a quantized layer is made of, as plain data: enough to build it empty and fill it from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reelquant._errors import CheckpointError
from reelquant.formats import RANGES, Granularity, NumberFormat, QuantSpec, parse_format, parse_granularity


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

    def spec(self, axis: int = 0) -> QuantSpec:
        """The specification a dynamic quantizer follows."""
        return QuantSpec(parse_format(self.format), self.grain(axis), RANGES[self.range](), dynamic=self.dynamic)

    def grain(self, axis: int = 0) -> Granularity:
        """The granularity, parsed."""
        return parse_granularity(self.granularity, axis)


FLAGS = ("slots", "rotate", "shift", "scale", "bias", "table", "unused", "halves", "lasting")
HALVES = 3  # rows of input scales per step where guidance halves are apart: of any call, of the first half, of the second


@dataclass(frozen=True)
class LayerLayout:
    """How one layer is stored.

    Attributes:
        weight: layout of the weight codes.
        input: layout of the input quantizer, or None for weight-only layers.
        slots: rows of the input scales: 1, or one per calibrated step; :data:`HALVES` times as many with ``halves``.
        rotate: whether the input's channels are rotated first (:func:`reelquant.kernels.hadamard`).
        shift, scale: whether a per-channel ``pre_quant_shift`` / ``pre_quant_scale`` is stored.
        bias: whether the layer has a bias (a transform may have created one).
        table: rows of the stored output table of a temporal layer, 0 for none.
        halves: whether the halves of a guidance pair have input scales of their own.
        unused: the layer's output is never needed while the tables of later layers are in force.
        lasting: the layer sees neither the latent nor the timestep: its output is that of the step before (:mod:`reelquant.nn.kept`).
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
    halves: bool = False
    lasting: bool = False

    @property
    def steps(self) -> int:
        """Denoising steps that the layer tells apart."""
        return max(self.slots // (HALVES if self.halves else 1), self.table)

    def to_json(self) -> dict[str, Any]:
        """A dict without defaults, in the wording of ``config.json``."""
        plain = {"weights": _tensor_json(self.weight), "input_activations": self.input and _tensor_json(self.input)}
        flags = {name: getattr(self, name) for name in FLAGS}
        return plain | {name: value for name, value in flags.items() if value != type(self).__dataclass_fields__[name].default}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerLayout:
        """Read :meth:`to_json` back.

        Raises:
            CheckpointError: on a key this version does not know.
        """
        known = {"weights", "input_activations", *FLAGS}
        if unknown := set(data) - known:
            raise CheckpointError(f"quantization_config describes layers with unknown keys {sorted(unknown)}: written by a newer version?")
        rest = {key: value for key, value in data.items() if key not in ("weights", "input_activations")}
        inputs = data.get("input_activations")
        return cls(TensorLayout(**data["weights"]), TensorLayout(**inputs) if inputs else None, **rest)


def _tensor_json(layout: TensorLayout) -> dict[str, Any]:
    fields = type(layout).__dataclass_fields__
    values = {name: getattr(layout, name) for name in fields}
    return {name: value for name, value in values.items() if name in ("format", "granularity") or value != fields[name].default}
