"""Heads: layers that make the values of attention, and the one layer that reads what attention makes of them.

Attention mixes tokens, and mixing over tokens changes places with any linear mix of the channels of one head, as long as nothing else lies
between the two layers. A source (:mod:`reelquant.discover.sources`) need not be like that: a gate leaves factors alone and does not let
mixes through. So it is tried: the channels of each head are mixed in the output of the first layer, and the second one has to read its
input mixed in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reelquant.discover.lineage import Trace
from reelquant.discover.probe import first_tensor, run
from reelquant.discover.sources import hooked, inputs_of, near, with_first
from reelquant.sites import Group, Layer

STEPS = 256
"""Roundings by which a mix before attention may differ from one behind it."""


class Candidate(NamedTuple):
    """Two layers around attention, if they are.

    Attributes:
        values: the layer that may make the values.
        reader: the layer that reads what comes of them.
        heads, width: of attention, and channels of a head.
    """

    values: str
    reader: str
    heads: int
    width: int


def with_heads(
    denoiser: nn.Module, inputs: dict[str, Any], groups: Sequence[Group], layers: Mapping[str, Layer], trace: Trace
) -> dict[str, Layer]:
    """The layers, with :attr:`Layer.heads_out` and :attr:`Layer.heads_in` where they hold. Call inside ``steady``.

    The denoiser runs twice, or not at all if there are no candidates.
    """
    found = dict(layers)
    if not (candidates := _candidates(groups, layers, trace)):
        return found
    base = inputs_of(denoiser, inputs, [one.reader for one in candidates])
    for one in _mixing(denoiser, inputs, candidates, base):
        found[one.values] = replace(found[one.values], heads_out=one.heads)
        found[one.reader] = replace(found[one.reader], heads_in=one.heads)
    return found


def _candidates(groups: Sequence[Group], layers: Mapping[str, Layer], trace: Trace) -> list[Candidate]:
    """Linear layers of one width, the second the only one that reads its input, in a module that asks for attention with that width."""
    found = []
    for group in groups:
        if group.source is None or len(group.layers) > 1:
            continue
        first, second = layers[group.source], layers[group.name]
        heads, width = trace.heads.get(_place(first.name, trace), (0, 0))
        linear = len(first.shape) == len(second.shape) == 2
        if linear and heads and first.shape[0] == second.shape[1] == heads * width:
            found.append(Candidate(first.name, second.name, heads, width))
    return found


def _place(layer: str, trace: Trace) -> str:
    """The innermost module around a layer that asks for attention itself."""
    return max((name for name in trace.heads if not name or layer.startswith(f"{name}.")), key=len, default="")


def _mixing(denoiser: nn.Module, inputs: dict[str, Any], candidates: Sequence[Candidate], base: Mapping[str, Tensor]) -> list[Candidate]:
    """The candidates whose mixes arrive. Every reader reads what it has always read, so one does not disturb another."""
    wrong: set[Candidate] = set()

    def mix(one: Candidate) -> Any:
        return lambda module, args, output: _mixed(output, one)

    def compare(one: Candidate) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = first_tensor(args, kwargs)
            assert x is not None
            if not near(x, _mixed(base[one.reader], one), STEPS):
                wrong.add(one)
            return with_first(args, kwargs, base[one.reader])

        return hook

    hooks = [denoiser.get_submodule(one.values).register_forward_hook(mix(one)) for one in candidates]
    hooks += [denoiser.get_submodule(one.reader).register_forward_pre_hook(compare(one), with_kwargs=True) for one in candidates]
    with hooked(hooks):
        run(denoiser, inputs)
    return [one for one in candidates if one not in wrong]


def _mixed(x: Tensor, one: Candidate) -> Tensor:
    """Channels ``[..., heads * width]`` with those of each head mixed by one orthonormal matrix, in float32 at least."""
    drawn = torch.randn(one.width, one.width, generator=torch.Generator().manual_seed(one.width), dtype=torch.float64)
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    mix = torch.linalg.qr(drawn)[0].to(precise)
    return (precise.unflatten(-1, (one.heads, one.width)) @ mix).flatten(-2).to(x.dtype)
