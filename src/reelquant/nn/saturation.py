"""How much of their inputs quantized layers clip: counted while a model runs, and only inside :meth:`Saturation.counting`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.clock import Moment
from reelquant.nn.layers import QuantLayer
from reelquant.nn.swap import quantized_layers

FAR = 1.0
"""Clipping that costs more than rounding: inputs have left the calibrated ranges by far."""


@dataclass
class Clipped:
    """What was counted of one layer's input, in one denoising step or in several together.

    Noise is a mean square over values after the layer's rewrite, relative to their own mean square, so layers can be compared.

    Attributes:
        values: how many values there were.
        clipped: how many of them lay outside of the range.
        reach: the largest distance of a value from the middle of the range, over half its width; at most 1 if nothing is clipped.
        power, lost, rounded: sums of the squares of the values, of what clipping took from them, and of the error of rounding the rest.
    """

    values: int = 0
    clipped: int = 0
    reach: float = 0.0
    power: float = 0.0
    lost: float = 0.0
    rounded: float = 0.0

    def add(self, other: Clipped) -> None:
        """Count another step or call, too."""
        self.values, self.clipped, self.reach = self.values + other.values, self.clipped + other.clipped, max(self.reach, other.reach)
        self.power, self.lost, self.rounded = self.power + other.power, self.lost + other.lost, self.rounded + other.rounded

    @property
    def share(self) -> float:
        """Clipped values over all values."""
        return self.clipped / max(self.values, 1)

    @property
    def noise(self) -> float:
        """Noise of clipping."""
        return self.lost / self.power if self.power else 0.0

    @property
    def rounding(self) -> float:
        """Noise of rounding."""
        return self.rounded / self.power if self.power else 0.0

    @property
    def excess(self) -> float:
        """Noise of clipping over the noise of rounding: 0 if nothing is clipped, above 1 if clipping costs more than rounding."""
        return self.lost / self.rounded if self.rounded else 0.0


@dataclass
class Saturation:
    """Counts of a quantized model's layers with static input scales; inputs that are float or dynamic cannot be clipped.

    Attributes:
        layers: layer name -> step (index into the calibrated timesteps) -> what was counted.
        timesteps: those of calibration, in sampling order; empty if no layer has scales per step.
    """

    layers: dict[str, dict[int, Clipped]] = field(default_factory=dict)
    timesteps: list[float] = field(default_factory=list)

    @contextmanager
    def counting(self, model: nn.Module, due: Callable[[int], bool] = lambda step: True) -> Iterator[Saturation]:
        """Inside, the inputs of the model's layers are looked at in every step that is ``due``. Counts add up over several uses.

        Layers that run inside a graph of another runtime are not seen.
        """
        watched = {name: layer for name, layer in quantized_layers(model).items() if layer.layout.clips}
        clocks = [layer.clock[0] for layer in watched.values() if layer.clock]
        self.timesteps = clocks[0].timesteps.tolist() if clocks else []
        for name, layer in watched.items():
            layer.watch = _Watch(self.layers.setdefault(name, {}), due)
        try:
            yield self
        finally:
            for layer in watched.values():
                layer.watch = None

    def of(self, name: str) -> Clipped:
        """All steps of a layer together."""
        return _together(self.layers[name].values())

    @property
    def by_layer(self) -> dict[str, Clipped]:
        """All layers that ran, those whose clipping costs most first."""
        found = {name: self.of(name) for name, steps in self.layers.items() if steps}
        return dict(sorted(found.items(), key=lambda item: -item[1].noise))

    @property
    def by_step(self) -> dict[int, Clipped]:
        """All layers together, by step."""
        steps = sorted({step for counts in self.layers.values() for step in counts})
        return {step: _together(counts[step] for counts in self.layers.values() if step in counts) for step in steps}

    @property
    def excess(self) -> float:
        """Noise of clipping over the noise of rounding, each added over layers; above :data:`FAR`, clips left the calibrated ranges."""
        counts = self.by_layer.values()
        rounding = sum(one.rounding for one in counts)
        return sum(one.noise for one in counts) / rounding if rounding else 0.0

    def counts(self) -> dict[str, dict[str, list[float]]]:
        """Every count as plain data, for :meth:`include`: layer name -> step -> the attributes of :class:`Clipped` in their order."""
        return {name: {str(step): list(astuple(one)) for step, one in steps.items()} for name, steps in self.layers.items()}

    def include(self, counts: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Add the counts of another process."""
        for name, steps in counts.items():
            own = self.layers.setdefault(name, {})
            for step, numbers in steps.items():
                own.setdefault(int(step), Clipped()).add(Clipped(int(numbers[0]), int(numbers[1]), *numbers[2:]))

    def facts(self, most: int = 8) -> dict[str, Any]:
        """For reports, as plain data: all layers together, every step that was counted, and the layers whose clipping costs most."""
        layers = list(self.by_layer.items())
        whole = _together(one for _, one in layers)
        steps = [{"step": step, "share": one.share, "excess": one.excess} for step, one in self.by_step.items()]
        found = [_row(*layer) for layer in layers[:most]]
        return {"share": whole.share, "reach": whole.reach, "excess": self.excess, "steps": steps, "layers": found}

    def sentence(self) -> str | None:
        """A warning if inputs leave the calibrated ranges by far, else None."""
        if self.excess <= FAR:
            return None
        name, worst = next(iter(self.by_layer.items()))
        return (
            f"inputs leave the calibrated ranges: clipping costs {self.excess:.1f} times as much as rounding, most in '{name}' "
            f"({worst.share:.2%} of its values are clipped, the farthest at {worst.reach:.1f} times the range); "
            "quantize again with prompts and settings like these"
        )


class _Watch:
    """Counts one layer; what :class:`reelquant.nn.runners.saturation.CountClipped` calls."""

    def __init__(self, counts: dict[int, Clipped], due: Callable[[int], bool]) -> None:
        self.counts, self.due = counts, due

    def __call__(self, layer: QuantLayer, x: Tensor, moment: Moment) -> None:
        step = int(moment.slot)
        if self.due(step) and x.numel():
            self.counts.setdefault(step, Clipped()).add(clipped(layer, x, moment))


@torch.no_grad()
def clipped(layer: QuantLayer, x: Tensor, moment: Moment) -> Clipped:
    """What a layer with static input scales would clip of one input."""
    operands = layer.operands
    assert operands.input is not None
    values = operands.rewritten_input(x)
    quantizer = operands.input.quantizer(values, moment.slot if moment.row is None else moment.row)
    low, high = quantizer.ends(values)
    inside = torch.minimum(torch.maximum(values, low), high)
    half = (high - low) / 2
    reach = ((values - low - half).abs() / half.clamp(min=torch.finfo(half.dtype).tiny)).amax()
    lost, rounded = values - inside, inside - quantizer(inside)
    sums = [(values != inside).sum(), reach, *(part.square().sum() for part in (values, lost, rounded))]
    count, *rest = torch.stack([one.double() for one in sums]).tolist()
    return Clipped(values.numel(), int(count), *rest)


def _row(name: str, counted: Clipped) -> dict[str, Any]:
    figures = ("share", "reach", "noise", "rounding", "excess")
    return {"name": name} | {figure: getattr(counted, figure) for figure in figures}


def _together(counts: Iterable[Clipped]) -> Clipped:
    total = Clipped()
    for one in counts:
        total.add(one)
    return total
