"""Blocks: the big repeated parts of a denoiser in execution order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from torch import nn

from reelquant.sites import Layer


def find_blocks(denoiser: nn.Module, layers: dict[str, Layer]) -> tuple[str, ...]:
    """Module paths that cut the denoiser into consecutive parts, ordered by the first layer that ran.

    A block is a member of an outermost ``ModuleList`` (a transformer's blocks, a UNet's down and up blocks), or a module beside those
    lists that is itself built of lists (a UNet's mid block). It must hold at least two layers that follow the latent, which leaves
    out text refiners and lists of single projections.
    """
    following = {layer.name: layer.order for layer in layers.values() if "latent" in layer.depends}
    found = _blocks_below(denoiser, "", following)
    return tuple(sorted(found, key=lambda name: min(order for layer, order in following.items() if layer.startswith(name + "."))))


def last_parts(denoiser: nn.Module, blocks: Sequence[str], layers: Mapping[str, Layer]) -> tuple[str, ...]:
    """The end of the denoiser: its last block, or, where that is built of lists itself (a UNet's), the last member of each of them.

    What it adds goes into the output past no other block. Members count as blocks do: by two layers that follow the latent.

    Args:
        blocks: of :func:`find_blocks`.
    """
    if not blocks:
        return ()
    following = {layer.name: layer.order for layer in layers.values() if "latent" in layer.depends}
    block = blocks[-1]
    lists = [(name, child) for name, child in denoiser.get_submodule(block).named_children() if isinstance(child, nn.ModuleList)]
    members = [[one for index in range(len(child)) if _weighs(one := f"{block}.{name}.{index}", following)] for name, child in lists]
    return tuple(some[-1] for some in members if some) or (block,)


def called_apart(blocks: Iterable[str], callers: Mapping[str, AbstractSet[str]]) -> tuple[str, ...]:
    """Modules inside of blocks that are called while their block does not run.

    Args:
        blocks: module paths.
        callers: the modules inside of which each module ran.
    """
    inside = {name: block for block in blocks for name in callers if name.startswith(f"{block}.")}
    return tuple(name for name, block in inside.items() if any(not f"{caller}.".startswith(f"{block}.") for caller in callers[name]))


def _blocks_below(module: nn.Module, path: str, following: dict[str, int]) -> list[str]:
    found: list[str] = []
    listed = False
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            members = [f"{here}.{index}" for index in range(len(child))]
            members = [member for member in members if _weighs(member, following)]
            listed = listed or bool(members)
            found += members
        elif _weighs(here, following) and any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            found.append(here)
    if not listed and len(found) == 1:  # a wrapper around the real denoiser
        return _blocks_below(getattr(module, found[0].rpartition(".")[2]), found[0], following) or found
    return found


def _weighs(name: str, following: dict[str, int]) -> bool:
    return sum(layer.startswith(name + ".") for layer in following) >= 2
