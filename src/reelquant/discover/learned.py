"""What the arguments of a module mean that has a forward of its own: names where they tell, and else the values of real calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reelquant._errors import UnsupportedError
from reelquant.discover.arguments import Kind, Path, kind_of, leaves

Arguments = Mapping[str, Any]


class Seen(NamedTuple):
    """One argument (or a tensor or number inside of it) in the calls of one clip, and in those of another.

    Attributes:
        path: where it is.
        values: one per call of a clip.
        other: the same of another clip that starts from the same noise and has another text or label.
    """

    path: Path
    values: Sequence[Any]
    other: Sequence[Any]

    @property
    def name(self) -> str:
        """Of the argument."""
        return str(self.path[0])

    @property
    def changes(self) -> bool:
        """Whether it is not the same in all calls."""
        return any(not _equal(self.values[0], value) for value in self.values)

    @property
    def follows_steps(self) -> bool:
        """A number, or one per clip, that changes in one direction only."""
        if any(isinstance(value, Tensor) and (value.ndim > 1 or not value.numel()) for value in self.values) or not self.changes:
            return False
        course = [float(torch.as_tensor(value).float().amax()) for value in self.values]
        return course in (sorted(course), sorted(course, reverse=True))

    @property
    def is_latent(self) -> bool:
        """A float tensor of three or more axes that changes."""
        return all(_floats(value, 3) for value in self.values) and self.changes

    @property
    def is_condition(self) -> bool:
        """Other for another text or label although all else is equal so far; or labels: integers, one per clip, that do not change."""
        if any(not _equal(*pair) for pair in zip(self.values[:1], self.other[:1], strict=False)):
            return True
        first = self.values[0]
        return isinstance(first, Tensor) and not first.is_floating_point() and first.ndim == 1 and not self.changes

    @property
    def words(self) -> str:
        """For messages: ``x [2, 4, 8, 8] float32 (changes)``."""
        first = self.values[0]
        what = f"{list(first.shape)} {str(first.dtype).removeprefix('torch.')}" if isinstance(first, Tensor) else type(first).__name__
        return f"{'.'.join(map(str, self.path))} {what} ({'changes' if self.changes else 'stays'})"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and one == other


def _floats(value: Any, axes: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= axes


def learned(calls: Sequence[Arguments], other: Sequence[Arguments], given: Mapping[str, Kind], owner: str) -> dict[str, Kind]:
    """Kinds of arguments that their names do not tell, or tell wrongly.

    Args:
        calls: arguments by name of the first calls of one clip, in their order.
        other: the same of another clip that starts from the same noise and has another text or label; may be empty.
        given: what the user says; it is taken as it is.
        owner: class of the module, for messages.

    Raises:
        UnsupportedError: if nothing looks like the timestep or the latent.
    """
    seen = [one for one in _seen(calls, other) if one.name not in given]
    found = dict(given)
    for kind, fits in (("timestep", "follows_steps"), ("latent", "is_latent")):
        if kind not in found.values():
            found |= _only(kind, seen, fits, owner)  # pyright: ignore[reportArgumentType]
    for one in seen:
        if one.name not in found and kind_of(one.path) == "other" and one.is_condition:
            found[one.name] = "image" if _floats(one.values[0], 4) else "prompt"
    return found


def _seen(calls: Sequence[Arguments], other: Sequence[Arguments]) -> list[Seen]:
    """Every tensor and number that all calls have, the first call's order."""
    every, others = [dict(leaves(dict(call))) for call in calls], [dict(leaves(dict(call))) for call in other]
    paths = [path for path in every[0] if all(path in call for call in every)]
    return [Seen(path, [call[path] for call in every], [call[path] for call in others if path in call]) for path in paths]


def _only(kind: Kind, seen: Sequence[Seen], fits: str, owner: str) -> dict[str, Kind]:
    """The argument of this kind: one with a telling name that behaves like it, then any that does, then the name alone.

    Arguments of such names that do not behave like it are something else: ``t`` may be the number of frames.
    """
    named = [one for one in seen if kind_of(one.path) == kind]
    behaves = [one for one in named if getattr(one, fits)]
    unnamed = [one for one in seen if kind_of(one.path) == "other" and getattr(one, fits)]
    chosen = (behaves or unnamed or named)[:1]
    if not chosen:
        words = "; ".join(one.words for one in seen) or "none"
        raise UnsupportedError(
            f"no argument of {owner}.forward looks like the {kind}: {_LOOKS[kind]}; seen: {words}; "
            f"say which one it is: Denoiser(module, sampler, arguments={{'NAME': '{kind}'}})"
        )
    if chosen[0] in behaves:
        return {}
    others: dict[str, Kind] = {one.name: "other" for one in named if one.name != chosen[0].name}
    return others | {chosen[0].name: kind}


_LOOKS = {
    "timestep": "a number, or one per clip, that changes from step to step in one direction",
    "latent": "a float tensor of three or more axes that changes from step to step",
}
