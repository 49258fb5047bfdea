"""What quantization changes in what a denoiser holds while it runs: codes of inputs, and feed-forwards in blocks of tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from reelquant.discover import stand_in
from reelquant.engine.plan import Plan
from reelquant.nn.around.tokenwise import answer_width, tokens_at_once
from reelquant.planning.trace import Rounding

Blocks = Mapping[str, tuple[int, int]]


def rounding_of(plan: Plan, blocks: Blocks) -> Rounding:
    """What a plan changes.

    Args:
        plan: of a component.
        blocks: modules that treat tokens alone, see :func:`tokenwise`; those with layers that stay float run as they are.
    """
    rows = {row.layer.name: row for row in plan.quantized}
    codes = {name: row.input.format.bits / 8 if row.input.format.bits > 8 else 1.0 for name, row in rows.items() if row.input is not None}
    inside = {name: [layer for layer in plan.layers if layer.startswith(f"{name}.")] for name in blocks}
    return Rounding(codes, {name: blocks[name] for name, layers in inside.items() if layers and all(one in rows for one in layers)})


def tokenwise(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Modules that a quantized model runs a block of tokens at a time: tokens in a block and channels of the answer, by name.

    They are found as the runtime finds them (:mod:`reelquant.nn.around.tokenwise`), with random numbers for weights.

    Args:
        model: its parameters may be on the meta device.
    """
    found: dict[str, tuple[int, int]] = {}
    twin = stand_in(model)
    for name, module in twin.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or (layers := _linear(module)) is None:
            continue
        if (width := answer_width(module, layers)) is not None:
            found[name] = tokens_at_once(layers), width
    return found


def _linear(module: nn.Module) -> list[nn.Linear] | None:
    """The linear layers of a module that has two or more of them and no other numbers."""
    layers = [child for child in module.modules() if isinstance(child, nn.Linear)]
    if len(layers) < 2:
        return None
    own = {id(tensor) for layer in layers for tensor in layer.parameters()}
    return layers if all(id(tensor) in own for tensor in (*module.parameters(), *module.buffers())) else None
