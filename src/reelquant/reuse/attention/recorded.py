"""What every place of attention gives at every step, and how far an error of it reaches: what :mod:`.planned` plans with."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from reelquant._errors import UnsupportedError
from reelquant.nn import AttentionCall
from reelquant.nn.around.attention_running import Where
from reelquant.reuse.attention.courses import ByTable, Course
from reelquant.reuse.attention.following import Following
from reelquant.reuse.attention.installed import InstalledAttention
from reelquant.reuse.attention.share import Share
from reelquant.stages import ModelWork

ELEMENTS = 65_536
"""Values of an output that inner products are taken of, of every call."""
POINTS = 6
"""Steps at which the reach of errors is measured; between them its logarithm is interpolated."""

Array = np.ndarray
Key = tuple[tuple[int, int], int]  # row and number of a call of a place, and the number of the denoiser's call within its step


@dataclass(frozen=True, eq=False)
class Recorded:
    """What plans are made from.

    Attributes:
        timesteps: of the sampler's steps, in sampling order.
        grams: by place, ``[steps, steps]`` inner products of its outputs, summed over clips and calls.
        weights: by place, ``[steps]`` damage to the final latents (squared error over their variance) per squared error of its output.
        multiplications: by place, those of one step.
    """

    timesteps: tuple[float, ...]
    grams: Mapping[str, Array]
    weights: Mapping[str, Array]
    multiplications: Mapping[str, float]


class Outputs(Following):
    """Computes everything, and takes inner products of what places give at all steps."""

    def __init__(self, model: nn.Module, names: Mapping[str, Any], sites: Sequence[str]) -> None:
        self.timesteps: dict[int, float] = {}
        self.products: defaultdict[str, defaultdict[tuple[int, int], float]] = defaultdict(lambda: defaultdict(float))
        self.multiplications: Counter[str] = Counter()
        super().__init__(model, names, sites)

    def attend(self, call: AttentionCall, where: Where) -> Tensor:
        output = self.compute(call, where)
        if (found := self.placed(call, where)) is not None:
            place, trajectory = found
            site = self.names[where.row]
            self.timesteps[place.step] = place.timestep
            self.multiplications[site] += call.multiplications
            some = output.flatten()[:: max(output.numel() // ELEMENTS, 1)].float()
            known = trajectory.notes.setdefault(("outputs", place.name, place.half), {})
            known[place.step] = some
            for step, other in known.items():
                self.products[site][step, place.step] += float(some @ other) * output.numel() / some.numel()
        return output

    def gram(self, site: str) -> Array:
        """Inner products of a place, ``[steps, steps]``."""
        steps = len(self.timesteps)
        found = np.zeros((steps, steps))
        for (one, other), value in self.products[site].items():
            found[one, other] = found[other, one] = value
        return found


class Reach(Following):
    """At some steps, calls the denoiser again for every place with the output of the step before in its stead.

    Attributes:
        errors: by place and step: squared errors of its output, and of the denoiser's.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, Any], sites: Sequence[str], points: Sequence[int]) -> None:
        self.points = frozenset(points)
        self.errors: defaultdict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.before: dict[Key, Tensor] = {}
        self.latest: dict[Key, tuple[int, Tensor]] = {}
        self.only: str | None = None
        super().__init__(model, names, sites)
        self.after = model.register_forward_hook(self.again, with_kwargs=True)

    def attend(self, call: AttentionCall, where: Where) -> Tensor:
        found = self.placed(call, where)
        if found is None:
            return self.compute(call, where)
        place, site = found[0], self.names[where.row]
        key = place.name, place.half
        if self.only is not None:
            before = self.before.get(key) if site == self.only else None
            return before.clone() if place.fits(before) else self.compute(call, where)
        output = self.compute(call, where)
        step, before = self.latest.pop(key, (None, None))
        if place.step in self.points and step == place.step - 1 and before is not None and place.fits(before):
            self.before[key] = before
            self.errors[site, place.step][0] += float((before.float() - output.float()).square().sum())
        if place.step + 1 in self.points:
            self.latest[key] = place.step, output.clone()
        return output

    @torch.compiler.disable
    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self.only is None:
            super().begin(model, args, kwargs)
        else:
            self.now.calls = Counter()

    @torch.compiler.disable
    def again(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After a call of the denoiser at one of the points."""
        step = None if self.now.trajectory is None else self.now.trajectory.step
        if self.only is not None or step not in self.points or not self.before:
            return
        try:
            for site in self.sites:
                self.only = site
                self.errors[site, step][1] += _squared(model(*args, **kwargs), output)
        finally:
            self.only = None
        self.before.clear()

    def remove(self) -> None:
        self.after.remove()
        super().remove()


def _squared(found: Any, wanted: Any) -> float:
    """Summed squared differences of two outputs of a denoiser."""
    pairs = zip(tree_leaves(found), tree_leaves(wanted), strict=True)
    return sum(float((one.float() - other.float()).square().sum()) for one, other in pairs if isinstance(one, Tensor))


def samplings(steps: int) -> int:
    """How often :func:`record` samples; the calls for single places are not counted."""
    return 2 + min(max(steps - 1, 0), POINTS)


def record(work: ModelWork, names: Mapping[str, Any], sample: Callable[[], Tensor]) -> Recorded:
    """Sample a few clips again and again, and measure what attention gives and how far its errors reach.

    One sampling takes inner products of outputs. One calls the denoiser again for every place at up to :data:`POINTS` steps, with the
    output of the step before: how much of an error arrives at the denoiser's output. One for each of these steps repeats all places at
    that step alone: how much of it arrives at the final latents.

    Raises:
        UnsupportedError: if the sampler's timesteps do not fall.
    """
    sites = [site.name for site in work.map.attention]
    outputs = Outputs(work.denoiser, names, sites)
    with _removed(outputs):
        latents = sample()
    times = [outputs.timesteps[step] for step in sorted(outputs.timesteps)]
    if len(times) < 2:
        raise UnsupportedError(f"reuse 'attention' needs a sampler with falling timesteps, and '{work.component}' was called at {times}")
    points = sorted({round(one) for one in np.linspace(1, len(times) - 1, min(len(times) - 1, POINTS))})
    reach = Reach(work.denoiser, names, sites, points)
    with _removed(reach):
        sample()
    called = [site for site in sites if outputs.multiplications[site]]
    ratios = {site: np.array([_ratio(*reach.errors[site, point]) for point in points]) for site in called}
    grams = {site: outputs.gram(site) for site in called}
    gains = []
    for number, point in enumerate(points):
        arrives = sum(ratios[site][number] * _repeated(grams[site], point) for site in called)
        gains.append(_damage(work.denoiser, names, called, times, point, sample, latents) / max(arrives, 1e-30))
    found = {site: _between(points, ratios[site] * np.array(gains), len(times)) for site in called}
    return Recorded(tuple(times), grams, found, {site: outputs.multiplications[site] / len(times) for site in called})


@contextmanager
def _removed(following: Following) -> Iterator[None]:
    try:
        yield
    finally:
        following.remove()


def _ratio(site: float, output: float) -> float:
    return output / site if site > 0 else 0.0


def _repeated(gram: Array, step: int) -> float:
    """Squared error of a place that repeats the step before."""
    return max(float(gram[step, step] - 2 * gram[step, step - 1] + gram[step - 1, step - 1]), 0.0)


def _between(points: Sequence[int], values: Array, steps: int) -> Array:
    """Values at all steps, ``[steps]``."""
    return np.exp(np.interp(range(steps), points, np.log(np.maximum(values, 1e-30))))


def _damage(
    model: nn.Module,
    names: Mapping[str, Any],
    sites: Sequence[str],
    times: Sequence[float],
    step: int,
    sample: Callable[[], Tensor],
    latents: Tensor,
) -> float:
    """What repeating all places at one step does to the final latents: the geometric mean over clips."""
    course: Course = ByTable(tuple(times), tuple(Share() if number == step else None for number in range(len(times))))
    installed = InstalledAttention(model, names, dict.fromkeys(sites, course))
    with _removed(installed):
        found = sample()
    wanted = latents.float().flatten(1)
    errors = (found.float().flatten(1) - wanted).square().mean(1) / wanted.var(1)
    return math.exp(float(errors.clamp_min(1e-20).log().mean()))
