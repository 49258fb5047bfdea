"""LINKS: what may happen in the forward of a layer, one file each; :func:`assemble` chains those that a layer needs. What a layer stores,
and what happens between layers, does not belong here."""

from __future__ import annotations

from reelquant.nn.layer_view import LayerView
from reelquant.nn.runners.branch import Branched
from reelquant.nn.runners.cached import CachedOutput
from reelquant.nn.runners.frame_bands import MixedFrames
from reelquant.nn.runners.guidance import GuidanceHalves
from reelquant.nn.runners.kernel import KernelProduct
from reelquant.nn.runners.link import CallKind, Chain, Link, Mode
from reelquant.nn.runners.other_bits import OtherBits
from reelquant.nn.runners.saturation import CountClipped
from reelquant.nn.runners.table import OutputTable
from reelquant.nn.runners.training import StraightThrough

__all__ = ["LINKS", "CallKind", "Chain", "Link", "Mode", "assemble"]

LINKS: tuple[type[Link], ...] = (
    OutputTable,
    CachedOutput,
    StraightThrough,
    GuidanceHalves,
    CountClipped,
    OtherBits,
    Branched,
    MixedFrames,
)
"""Outermost first. The last link of every chain is :class:`~reelquant.nn.runners.kernel.KernelProduct`."""


def assemble(layer: LayerView, kind: CallKind) -> Chain:
    """The chain that computes a layer for one kind of call: the links that it needs around its kernel."""
    chain: Chain = KernelProduct(layer.residency)
    for link in reversed(LINKS):
        if link.wanted(layer, kind):
            chain = link(layer, chain)
    return chain
