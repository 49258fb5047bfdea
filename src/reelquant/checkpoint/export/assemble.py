"""From layers of the artifact to parts of a file; what differs between formats is a :class:`Dialect`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Generic

import torch
from torch import Tensor

from reelquant._errors import UnsupportedError, nearest
from reelquant.branches import branch_feature, branch_name
from reelquant.checkpoint.export.names import Naming
from reelquant.checkpoint.export.numbers import NumberType, added_error
from reelquant.checkpoint.export.result import Outcome
from reelquant.checkpoint.export.source import ExportSource, Facts
from reelquant.checkpoint.export.write import Form, Part, Shape
from reelquant.formats import Quantizer
from reelquant.kernels import not_taken

TAKES = frozenset({"input", "shift", "scale", "rotate", "mix", "slots", "table", "unused", "cfg_halves", "step_invariant"})
"""Features of layouts that are folded into weight and bias, or left behind and listed (:func:`~.result.left_behind`)."""


class Dialect(ABC, Generic[Form]):
    """What a format can hold and how it is written.

    Attributes:
        types: number types by name, in the order in which they are tried; a layer gets the first one that holds its codes.
        default: type of layers whose codes none holds.
    """

    types: ClassVar[Mapping[str, NumberType]]
    default: ClassVar[str]

    def __init__(self, wanted: str | None = None) -> None:
        if wanted is not None and wanted not in self.types:
            raise UnsupportedError(f"unknown type '{wanted}'; {nearest(wanted, self.types)}")
        self.wanted = wanted

    def type_for(self, facts: Facts) -> str:
        """Name of the type that a layer is written in."""
        holding = (name for name, numbers in self.types.items() if numbers.refuses(facts) is None)
        return self.wanted or next(holding, self.default)

    @abstractmethod
    def stays_float(self, facts: Facts) -> str | None:
        """Why the format's readers cannot quantize this layer, or None."""

    @abstractmethod
    def float_form(self, source: ExportSource, name: str, shape: Shape, dtype: torch.dtype) -> Form:
        """How a tensor that is not quantized is written."""

    @abstractmethod
    def dequantized_form(self, source: ExportSource, facts: Facts) -> Form:
        """How the weight of a layer is written that :meth:`stays_float`."""

    @abstractmethod
    def forms(self, name: str, facts: Facts, numbers: str) -> dict[str, tuple[Shape, Form]]:
        """Tensors of a quantized weight; ``name`` is the layer's in the file."""

    @abstractmethod
    def pack(self, name: str, facts: Facts, numbers: str, codes: Tensor, quantizer: Quantizer) -> tuple[dict[str, Tensor], Tensor]:
        """Those tensors, and the weight that a reader makes of them."""

    @abstractmethod
    def cast(self, value: Tensor, form: Form) -> Tensor:
        """A float tensor as it is written."""

    @abstractmethod
    def size(self, shape: Shape, form: Form) -> int:
        """Bytes of a tensor in the file."""

    @abstractmethod
    def called(self, form: Form) -> str:
        """A form in words."""


def assemble(source: ExportSource, dialect: Dialect[Form], naming: Naming) -> tuple[list[Part[Form]], list[Outcome]]:
    """A part and an outcome per layer and per tensor that is not quantized; errors are entered when a part is made.

    Raises:
        UnsupportedError: if layers need a bias where the architecture has none.
    """
    check_features(source)
    check_biases(source)
    made = [_float(source, dialect, naming, name) for name in source.floats]
    made += [_layer(source, dialect, naming, facts) for facts in source.layers.values()]
    return [part for part, _ in made], [outcome for _, outcome in made]


def check_features(source: ExportSource) -> None:
    """Refuse layers with features that exporters do not know, and layers with branches that cannot be folded into a weight.

    Raises:
        UnsupportedError: naming the first such layer.
    """
    for name, facts in source.layers.items():
        folded = set(TAKES)
        for branch in facts.layout.branches:
            if branch.exports is not None:
                raise UnsupportedError(f"layer '{name}' has the branch '{branch_name(branch)}', and {branch.exports}")
            folded.add(branch_feature(branch))
        if unknown := not_taken(facts.layout.features, folded):
            raise UnsupportedError(f"layer '{name}' has {unknown}, which exporters cannot write; export a model from a recipe without that")


def check_biases(source: ExportSource) -> None:
    """Refuse biases without a place. They correct a mean, or undo a shift that was folded into the norm before: no weight holds them.

    Raises:
        UnsupportedError: naming two such layers.
    """
    if homeless := source.homeless:
        some = ", ".join(f"'{name}'" for name in homeless[:2])
        raise UnsupportedError(
            f"{len(homeless)} layers ({some}{' ...' if len(homeless) > 2 else ''}) need biases that quantization made, and {source.kind} "
            "has no place for them outside of reelquant; quantize with a recipe that makes none: without shift and correct_bias on these "
            "layers, as w8a16, w4a16 or minmax-w8a8"
        )


def _float(source: ExportSource, dialect: Dialect[Form], naming: Naming, name: str) -> tuple[Part[Form], Outcome]:
    shape, dtype = source.about(name)
    form = dialect.float_form(source, name, shape, dtype)
    outcome = Outcome(
        name, "float", str(dtype).removeprefix("torch."), dialect.called(form), source.bytes_of(name), dialect.size(shape, form)
    )
    return Part({naming(name): (shape, form)}, lambda: {naming(name): dialect.cast(source.tensor(name), form)}), outcome


def _layer(source: ExportSource, dialect: Dialect[Form], naming: Naming, facts: Facts) -> tuple[Part[Form], Outcome]:
    why = dialect.stays_float(facts)
    part, outcome = _dequantized(source, dialect, naming, facts, why) if why else _quantized(source, dialect, naming, facts)
    outcome.bytes_after = sum(dialect.size(shape, form) for shape, form in part.tensors.values())
    return part, outcome


def _bias_form(source: ExportSource, dialect: Dialect[Form], naming: Naming, facts: Facts) -> dict[str, tuple[Shape, Form]]:
    """The bias, if the architecture has a place for it."""
    if not facts.bias:
        return {}
    name, shape = f"{facts.name}.bias", facts.shape[:1]
    return {naming(name): (shape, dialect.float_form(source, name, shape, source.about(name)[1]))}


def _dequantized(source: ExportSource, dialect: Dialect[Form], naming: Naming, facts: Facts, why: str) -> tuple[Part[Form], Outcome]:
    weight, form = naming(f"{facts.name}.weight"), dialect.dequantized_form(source, facts)
    bias = _bias_form(source, dialect, naming, facts)
    outcome = Outcome(facts.name, "dequantized", facts.numbers, dialect.called(form), source.bytes_of(facts.name), 0, why)

    def make() -> dict[str, Tensor]:
        layer = source.layer(facts.name)
        written = dialect.cast(layer.weight, form)
        outcome.error = added_error(layer, layer.weight.to(written.dtype))
        return {weight: written} | {name: dialect.cast(layer.plain_bias, kind) for name, (_, kind) in bias.items()}

    return Part({weight: (facts.shape, form), **bias}, make), outcome


def _quantized(source: ExportSource, dialect: Dialect[Form], naming: Naming, facts: Facts) -> tuple[Part[Form], Outcome]:
    chosen = dialect.type_for(facts)
    numbers, name = dialect.types[chosen], naming(f"{facts.name}.weight").removesuffix(".weight")
    bias = _bias_form(source, dialect, naming, facts)
    why = numbers.refuses(facts) or ""
    outcome = Outcome(facts.name, "requantized" if why else "carried", facts.numbers, chosen, source.bytes_of(facts.name), 0, why)

    def make() -> dict[str, Tensor]:
        layer = source.layer(facts.name)
        tensors, seen = dialect.pack(name, facts, chosen, *numbers.encode(layer, facts))
        outcome.error = added_error(layer, seen)
        return tensors | {key: dialect.cast(layer.plain_bias, kind) for key, (_, kind) in bias.items()}

    return Part({**dialect.forms(name, facts, chosen), **bias}, make), outcome
