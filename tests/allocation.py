"""A small denoiser whose layers matter differently, as stages of a whole model see it: no pipeline, no engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.engine.plan import estimated_bytes
from reelquant.formats import Int, QuantSpec, fit
from reelquant.formats.criteria import nmse
from reelquant.observe import RecordedCall
from reelquant.stages import Specs
from tests.single import one_group

WIDTHS = (64, 128, 16, 160, 40, 96, 8, 120, 56, 144, 24, 88, 12, 72, 32, 104)


class Residual(nn.Module):
    """``x + sum of branches``: layer ``i`` goes from 64 to ``WIDTHS[i]`` channels and counts ``3 ** (i % 4)``."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(64, width, bias=number % 2 == 0) for number, width in enumerate(widths))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = x + 0.05 * 3 ** (number % 4) * torch.tanh(layer(x)).mean(-1, keepdim=True)
        return x


class Work:
    """The part of :class:`reelquant.stages.ModelWork` that allocators use.

    Attributes:
        tried: the numbers that every layer was drafted with.
        advanced, announced: units of progress, and how many were announced.
    """

    component = "transformer"

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        self.denoiser: nn.Module = Residual(widths)
        names = [f"layers.{number}" for number in range(len(widths))]
        self.map = one_group(self.denoiser, names)
        self.specs = {name: Specs(QuantSpec(Int(8))) for name in names}
        self.warnings: list[str] = []
        self.tried: dict[str, list[Specs]] = {name: [] for name in names}
        self.advanced = self.announced = 0
        generator = torch.Generator().manual_seed(1)
        inputs = [torch.randn(2, 8, 64, generator=generator) for _ in range(8)]
        self.calls = [RecordedCall((x,), {}, self.denoiser(x), step % 4) for step, x in enumerate(inputs)]

    def output(self, call: RecordedCall) -> Tensor:
        return self.denoiser(*call.args)

    def touched(self, stage: Any) -> list[str]:
        return list(self.specs)

    def float_layer(self, name: str) -> nn.Module:
        return self.denoiser.get_submodule(name)

    def layer_bytes(self, name: str, specs: Specs) -> int:
        layer = self.float_layer(name)
        return estimated_bytes(specs.weight, tuple(layer.weight.shape)) + 4 * len(layer.weight) * (layer.bias is not None)

    @contextmanager
    def drafted(self, specs: Mapping[str, Specs]) -> Iterator[None]:
        kept = {name: self.float_layer(name).weight.data for name in specs}
        for name, one in specs.items():
            self.tried[name].append(one)
            self.float_layer(name).weight.data = fit(one.weight, kept[name])(kept[name])
        try:
            yield
        finally:
            for name, weight in kept.items():
                self.float_layer(name).weight.data = weight

    @contextmanager
    def timed(self, phase: str, total: int) -> Iterator[None]:
        self.announced += total
        yield

    def advance(self) -> None:
        self.advanced += 1

    # --- what tests ask -------------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> int:
        """How many weights the layers have."""
        return sum(math.prod(layer.shape) for layer in self.map.layers.values())

    def stored(self, specs: Mapping[str, Specs]) -> int:
        """Bytes of codes and scales."""
        biases = sum(4 * self.float_layer(name).out_features for name in specs if self.float_layer(name).bias is not None)
        return sum(self.layer_bytes(name, one) for name, one in specs.items()) - biases

    def damage(self, specs: Mapping[str, Specs]) -> float:
        """Sum over layers of what each does alone to the output, over all recorded calls."""
        total = 0.0
        for name, one in specs.items():
            with self.drafted({name: one}):
                total += sum(float(nmse(call.output, self.denoiser(*call.args))) for call in self.calls) / len(self.calls)
        return total
