"""The axes that a line in a recipe's ``steps`` can name, each with the table of its members."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reelquant.allocate import ALLOCATORS
from reelquant.branches import BRANCHES
from reelquant.policies import POLICIES
from reelquant.reconstruct import RECONSTRUCTIONS
from reelquant.reuse import REUSES
from reelquant.solvers import SOLVERS
from reelquant.stages import Stage
from reelquant.transforms import TRANSFORMS


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        noun: what error messages call a member.
        verb: what a member does, for printed recipes.
        members: the table.
    """

    noun: str
    verb: str
    members: Mapping[str, type[Stage]]


AXES: dict[str, Axis] = {
    "reuse": Axis("reuse", "do not compute", REUSES),
    "policy": Axis("policy", "run with", POLICIES),
    "allocate": Axis("allocator", "choose formats by", ALLOCATORS),
    "transform": Axis("transform", "rewrite by", TRANSFORMS),
    "branch": Axis("branch", "split off", BRANCHES),
    "solve": Axis("solver", "choose codes by", SOLVERS),
    "reconstruct": Axis("reconstruction", "improve codes by", RECONSTRUCTIONS),
}
"""The first key of a step -> its axis: ``{transform: shift}``, ``{solve: gptq}`` ..."""


def keyed_stages() -> dict[str, tuple[str, str]]:
    """Top-level keys of recipes that stand for a stage, with the axis and the name of that stage."""
    named = ((axis, name, member) for axis, its in AXES.items() for name, member in its.members.items())
    return {member.key: (axis, name) for axis, name, member in named if member.key is not None}
