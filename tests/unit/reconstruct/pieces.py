"""Small things to reconstruct: one layer, and a part of two layers with its recorded calls."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.engine.build import Built, Context, build_layer, finish_layer, prepare_group
from reelquant.engine.choice import Choice
from reelquant.sites import Role
from reelquant.stages import BlockWork, LayerWork, RecordedCall
from tests.single import one_group, plan_of, statistics

INT4 = {"format": "int4", "granularity": "channel"}


class Pieces:
    """One layer of a model of one layer, and what it takes to build it again with other codes."""

    def __init__(
        self, module: nn.Module, calls: Sequence[Tensor], weight: Any, input: Any, steps: Sequence[dict[str, Any]], role: Role = "main"
    ) -> None:
        self.module, model = module, nn.Sequential(module)
        map_ = one_group(model, ["0"], role)
        plan = plan_of(model, map_, weight, input, steps)
        seen = {"0": statistics(module, calls)}
        context = Context(plan, model, seen, [float(step) for step in range(len(calls))], model.get_submodule)
        self.row, self.choice = plan.layers["0"], Choice.first(plan.entries)
        self.shared = prepare_group(context, map_.groups[0], self.choice)
        self.built = build_layer(context, self.shared, self.row, self.choice)

    def with_codes(self, work: LayerWork) -> Built:
        """What the engine makes of a layer with other codes."""
        return finish_layer(self.shared, self.row, work, self.choice, self.module)


class Two(nn.Module):
    """Two layers with a nonlinearity."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, *, shift: float) -> tuple[Tensor, float]:
        return self.second(torch.relu(self.first(x + shift))), shift


def block(
    bits: int = 3, count: int = 12, warn: Any = lambda sentence: None, inputs: Any = MappingProxyType({"format": "uint8"})
) -> BlockWork:
    """Correlated inputs and few bits, rounded to nearest: much to gain."""
    torch.manual_seed(0)
    first, second, mix = nn.Linear(32, 32), nn.Linear(32, 16), torch.randn(6, 32)
    seen = [torch.randn(40, 6) @ mix for _ in range(count)]
    floats = Two(first, second)
    with torch.no_grad():
        calls = [RecordedCall((x,), {"shift": 0.5}, floats(x, shift=0.5), 0) for x in seen]
        hidden = [torch.relu(first(x + 0.5)) for x in seen]
    spec, steps = {"format": f"int{bits}", "granularity": "channel"}, [{"solve": "nearest"}]
    pieces = {
        "first": Pieces(first, [x + 0.5 for x in seen], spec, dict(inputs), steps),
        "second": Pieces(second, hidden, spec, dict(inputs), steps),
    }
    module = Two(*(one.built.layer for one in pieces.values()))
    works = {name: one.built.work for name, one in pieces.items()}
    return BlockWork("block", module, works, lambda quantized: calls, seed=3, warn=warn)
