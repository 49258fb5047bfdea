"""Roles: what the input of each layer depends on, by changing one kind of argument at a time."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

from torch import nn

from reelquant._errors import UnsupportedError
from reelquant.discover.arguments import KINDS, Kind, Path, perturbed
from reelquant.discover.probe import Fingerprint, read_by_layers
from reelquant.sites import Role


def dependencies(denoiser: nn.Module, inputs: dict[str, Any], found: dict[Path, Kind]) -> dict[str, frozenset[str]]:
    """For every layer that runs, the kinds of arguments that move its input, in execution order. Call inside ``steady``.

    The test is exact inequality of the inputs: one bit that moves is a dependency.

    Raises:
        UnsupportedError: if two equal calls differ (no dependency could be told from noise), or nothing depends on the latent.
    """
    base = read_by_layers(denoiser, inputs)
    _require_repeatable(base, read_by_layers(denoiser, inputs), denoiser)
    depends: dict[str, set[str]] = {name: set() for name in base}
    for kind in KINDS:
        if kind in found.values():
            moved = read_by_layers(denoiser, perturbed(inputs, found, kind))
            for name in depends:
                depends[name] |= {kind} if moved.get(name) != base[name] else set()
    if not any("latent" in kinds for kinds in depends.values()):
        raise UnsupportedError(
            f"no layer of {type(denoiser).__name__} depends on the latent; pass inputs= with the arguments of one real call"
        )
    return {name: frozenset(kinds) for name, kinds in depends.items()}


def _require_repeatable(once: dict[str, list[Fingerprint]], twice: dict[str, list[Fingerprint]], denoiser: nn.Module) -> None:
    noisy = [name for name in once if once[name] != twice.get(name)]
    if noisy:
        raise UnsupportedError(
            f"{type(denoiser).__name__} gives different values for equal inputs, first at layer '{noisy[0]}' ({len(noisy)} layers in all): "
            "roles cannot be told from noise; switch on torch.use_deterministic_algorithms or discover on the CPU"
        )


def role_of(depends: AbstractSet[str]) -> Role:
    """The role that follows from the dependencies alone (entry and exit follow from the lineage)."""
    if "latent" in depends:
        return "main"
    if "timestep" in depends:
        return "temporal"
    return "prompt" if depends else "constant"
