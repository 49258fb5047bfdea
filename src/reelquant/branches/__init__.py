"""BRANCHES: what a layer computes beside its quantized product, with tensors of its own. How a layer stores or runs them does not belong
here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from reelquant._errors import RecipeError, nearest
from reelquant.branches.branch import Branch, Inner, TensorSpec
from reelquant.branches.frame_rank_one import FrameRankOne
from reelquant.branches.lowrank import Lowrank

__all__ = [
    "BRANCHES",
    "Branch",
    "FrameRankOne",
    "Inner",
    "Lowrank",
    "TensorSpec",
    "branch_feature",
    "branch_from_json",
    "branch_name",
    "branch_to_json",
    "register_branch",
]

BRANCHES: dict[str, type[Branch]] = {"lowrank": Lowrank, "frame_rank_one": FrameRankOne}
"""Name in recipes and checkpoints -> the branch."""


def register_branch(name: str, kind: type[Branch]) -> None:
    """Add a branch of another package to the table.

    Raises:
        RecipeError: if another branch has that name.
    """
    if BRANCHES.setdefault(name, kind) is not kind:
        raise RecipeError(f"branch '{name}' is {BRANCHES[name].__qualname__} already; register {kind.__qualname__} under another name")


def branch_name(branch: Branch) -> str:
    """The name of a branch in the table.

    Raises:
        RecipeError: if it has none.
    """
    for name, kind in BRANCHES.items():
        if type(branch) is kind:
            return name
    raise RecipeError(f"{type(branch).__qualname__} is not in the table of branches; call register_branch(name, {type(branch).__name__})")


def branch_feature(branch: Branch) -> str:
    """The name of a branch among the features of a layer (:mod:`reelquant.kernels.features`)."""
    return f"branch {branch_name(branch)}"


def branch_to_json(branch: Branch) -> dict[str, Any]:
    """The options of a branch, which must be plain data."""
    return {field.name: getattr(branch, field.name) for field in fields(branch)}  # pyright: ignore[reportArgumentType]  (a dataclass)


def branch_from_json(name: str, options: Mapping[str, Any]) -> Branch:
    """The branch of a name with these options.

    Raises:
        RecipeError: if no branch has that name, or it has no such options.
    """
    if name not in BRANCHES:
        raise RecipeError(f"unknown branch '{name}'; {nearest(name, BRANCHES)}")
    try:
        return BRANCHES[name](**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})
    except TypeError as error:
        raise RecipeError(f"branch '{name}' does not take the options {dict(options)}: {error}") from None
