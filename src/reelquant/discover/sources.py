"""Sources: layers whose output channels arrive, factor for factor, as the input channels of a later group of layers.

Attention mixes tokens and leaves channels apart, so a factor of a channel of the values is one of the attention's output; so it is
where a feed-forward multiplies one half with a gate. Which layers are such pairs is found by trying: the channels of a layer's output are
multiplied by random powers of two, those of the group's input are divided by them again, and nothing may change beyond rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.discover.lineage import Trace, channel_axis
from reelquant.discover.probe import first_tensor, run, tensors_in
from reelquant.sites import Group, Layer

EXPONENTS = (-2, 3)
"""Of the factors: a power of two multiplies every number without rounding."""
WRONG = 0.05
"""Relative difference that is no rounding, whatever the dtype."""


@dataclass(frozen=True)
class Candidate:
    """A layer that may be the source of a group.

    Attributes:
        layer: its name.
        row: the first output channel that counts.
    """

    layer: str
    row: int


def with_sources(
    denoiser: nn.Module, inputs: dict[str, Any], groups: Sequence[Group], layers: Mapping[str, Layer], trace: Trace
) -> tuple[Group, ...]:
    """The groups, with their sources where there are any. Call inside ``steady``.

    The denoiser runs once to know what the groups read, once for every round of candidates (two or three, as a rule), and once with all
    sources together; not at all if there are no candidates.
    """
    left = {group.name: _candidates(group, layers, trace) for group in groups}
    left = {name: candidates for name, candidates in left.items() if candidates}
    if not left:
        return tuple(groups)
    members = {group.name: group.layers for group in groups if group.name in left}
    base = inputs_of(denoiser, inputs, [name for names in members.values() for name in names])
    found: dict[str, Candidate] = {}
    for number in range(max(map(len, left.values()))):
        tried = {name: some[number] for name, some in left.items() if name not in found and number < len(some)}
        if tried:
            found |= _arrived(denoiser, inputs, tried, members, layers, base)
    if not found or not _nothing_changes(denoiser, inputs, found, members, layers):
        return tuple(groups)
    return tuple(replace(one, source=found[one.name].layer, source_row=found[one.name].row) if one.name in found else one for one in groups)


def _candidates(group: Group, layers: Mapping[str, Layer], trace: Trace) -> list[Candidate]:
    """Layers that run once, whose output reaches this group alone, and which have its channels or a multiple of them; the last first."""
    if any(len(trace.reads[name]) != 1 for name in group.layers):
        return []
    width, axis = layers[group.name].shape[1], layers[group.name].channel_axis
    readers = {name for name, reads in trace.reads.items() for read in reads if trace.reads[group.name][0].made_of & read.made_of}
    makers = sorted(trace.reads[group.name][0].made_of - trace.shown, key=lambda name: -layers[name].order)
    alone = [name for name in makers if all(_reads(trace, reader, name) == (reader in group.layers) for reader in readers)]
    fits = [name for name in alone if trace.calls[name] == 1 and layers[name].channel_axis == axis and layers[name].shape[0] % width == 0]
    return [Candidate(name, row) for name in fits for row in range(0, layers[name].shape[0], width)]


def _reads(trace: Trace, reader: str, name: str) -> bool:
    return any(name in read.made_of for read in trace.reads[reader])


def _factors(name: str, like: Tensor, axis: int, row: int = 0, rows: int | None = None) -> Tensor:
    """The factors of a group's channels along an axis of a tensor; ones outside of the rows that count."""
    count = like.shape[axis] if rows is None else rows
    generator = torch.Generator().manual_seed(len(name))
    factors = torch.ones(like.shape[axis])
    factors[row : row + count] = torch.randint(*EXPONENTS, (count,), generator=generator).float().exp2()
    return factors.to(like).view(-1, *[1] * (like.ndim - 1 - axis % like.ndim))


@contextlib.contextmanager
def hooked(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def with_first(args: tuple, kwargs: dict, value: Tensor) -> tuple[tuple, dict]:
    """The arguments of a call with another first tensor."""
    for place, one in enumerate(args):
        if isinstance(one, Tensor):
            return (*args[:place], value, *args[place + 1 :]), kwargs
    key = next(key for key, one in kwargs.items() if isinstance(one, Tensor))
    return args, kwargs | {key: value}


def inputs_of(denoiser: nn.Module, inputs: dict[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """What these layers read, which run once."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = first_tensor(args, kwargs)
            assert x is not None
            seen[name] = x.clone()

        return hook

    with hooked([denoiser.get_submodule(name).register_forward_pre_hook(remember(name), with_kwargs=True) for name in names]):
        run(denoiser, inputs)
    return seen


def _multiplied(denoiser: nn.Module, tried: Mapping[str, Candidate], layers: Mapping[str, Layer]) -> list[Any]:
    """Hooks that multiply the outputs of candidates."""

    def multiply(group: str, candidate: Candidate) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output * _factors(group, output, channel_axis(module), candidate.row, layers[group].shape[1])

        return hook

    return [denoiser.get_submodule(one.layer).register_forward_hook(multiply(group, one)) for group, one in tried.items()]


def _arrived(
    denoiser: nn.Module,
    inputs: dict[str, Any],
    tried: Mapping[str, Candidate],
    members: Mapping[str, Sequence[str]],
    layers: Mapping[str, Layer],
    base: Mapping[str, Tensor],
) -> dict[str, Candidate]:
    """The candidates whose factors arrive at their group. Every group reads what it has always read, so one does not disturb another."""
    wrong: set[str] = set()

    def compare(group: str, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = first_tensor(args, kwargs)
            assert x is not None
            if not near(x, base[name] * _factors(group, x, channel_axis(module)), 8):
                wrong.add(group)
            return with_first(args, kwargs, base[name])

        return hook

    pairs = [(group, name) for group in tried for name in members[group]]
    hooks = [denoiser.get_submodule(name).register_forward_pre_hook(compare(group, name), with_kwargs=True) for group, name in pairs]
    with hooked([*hooks, *_multiplied(denoiser, tried, layers)]):
        run(denoiser, inputs)
    return {group: one for group, one in tried.items() if group not in wrong}


def _nothing_changes(
    denoiser: nn.Module,
    inputs: dict[str, Any],
    found: Mapping[str, Candidate],
    members: Mapping[str, Sequence[str]],
    layers: Mapping[str, Layer],
) -> bool:
    """Whether all other layers and the output are what they were if every source multiplies and its group divides."""

    def divide(group: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = first_tensor(args, kwargs)
            assert x is not None
            return with_first(args, kwargs, x / _factors(group, x, channel_axis(module)))

        return hook

    expected = list(tensors_in(run(denoiser, inputs)))
    pairs = [(group, name) for group in found for name in members[group]]
    hooks = [denoiser.get_submodule(name).register_forward_pre_hook(divide(group), with_kwargs=True) for group, name in pairs]
    with hooked([*hooks, *_multiplied(denoiser, found, layers)]):
        return all(near(x, one, 64) for x, one in zip(tensors_in(run(denoiser, inputs)), expected, strict=True))


def near(found: Tensor, expected: Tensor, steps: int) -> bool:
    """Whether two tensors differ by no more than so many roundings of their largest number: in half precision subnormals are rounded."""
    if not found.is_floating_point():
        return torch.equal(found, expected)
    if not found.numel():
        return False  # an input of nothing shows nothing
    return bool((found - expected).abs().amax() <= min(steps * torch.finfo(found.dtype).eps, WRONG) * expected.abs().amax())
