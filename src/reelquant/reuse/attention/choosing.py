"""Which mode every place of attention gets at every step: the cheapest one whose error stays below a threshold.

Paper: DiTFastAttn (arXiv 2406.08552) goes from step to step and from layer to layer, tries its modes from the cheapest to the dearest, and
takes the first one whose change of the output stays below a threshold that grows with depth. Ours grows with the step, too: from nothing at
the first step to the whole threshold at the last one, because what goes wrong early is carried through a clip (``tiny-dit`` at half of the
multiplications: +5 dB). Ours measures the output of attention (theirs:
that of the layer), by the root of summed squares over that of the output (theirs: a mean of differences over sizes). Everything else is
computed while one place is measured, in one sampling pass of the float pipeline; so errors of places and steps do not add up in what is
measured. A mode that repeats may lie some steps behind: its error is measured for every such distance.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.nn import AttentionCall
from reelquant.nn.around.attention_running import Where
from reelquant.reuse.attention.following import Following
from reelquant.reuse.attention.mode import Mode, Place
from reelquant.stages import ModelWork

HEADS = 4
"""Errors are measured on so many heads of a place: what is kept for them takes memory times :attr:`AttentionReuse.longest`."""


class Measured:
    """What a mode does at a place, at one step and so many steps behind the computed one.

    Attributes:
        error, power: summed squares of the difference, and of the output.
        made, every: multiplications, and those of computing, where it gave something.
        calls, missing: how often it was asked, and how often it gave nothing.
    """

    def __init__(self) -> None:
        self.error = self.power = 0.0
        self.made = self.every = self.calls = self.missing = 0

    @property
    def relative(self) -> float:
        """The error over the size of the output; infinite if the mode gave nothing somewhere."""
        return math.inf if self.missing else math.sqrt(self.error / self.power) if self.power else 0.0


class Comparing(Following):
    """Computes all attention, and measures what modes would have made of it."""

    def __init__(self, model: nn.Module, names: Mapping[str, Any], sites: Sequence[str], modes: Sequence[Mode], longest: int) -> None:
        self.modes, self.longest = modes, longest
        self.found: dict[tuple[str, int, int, int], Measured] = {}  # by site, step, mode and distance
        self.timesteps: dict[int, float] = {}
        super().__init__(model, names, sites)

    def attend(self, call: AttentionCall, where: Where) -> Tensor:
        output = self.compute(call, where)
        if (found := self.placed(call, where)) is not None:
            place, trajectory = found
            self.timesteps[trajectory.step] = trajectory.timestep
            self._compare(self.names[where.row], _some_heads(place), _heads_of(output), trajectory.notes)
        return output

    def _compare(self, site: str, place: Place, output: Tensor, notes: MutableMapping[Hashable, Any]) -> None:
        """Measure every mode against every step that is not too far behind, then let this step be one of them."""
        steps = notes.setdefault(("compared", place.name, place.half), deque(maxlen=self.longest))
        for step, kept in steps:
            place.kept, place.given = kept, notes.setdefault(("given", place.name, place.step - step), {})
            for number, mode in enumerate(self.modes):
                self._measure(place, mode, output, (site, place.step, number, place.step - step))
        place.kept = {}
        for mode in self.modes:
            mode.keep(place, output)
        steps.append((place.step, place.kept))

    def _measure(self, place: Place, mode: Mode, output: Tensor, key: tuple[str, int, int, int]) -> None:
        found = self.found.setdefault(key, Measured())
        place.multiplied, found.calls = 0, found.calls + 1
        given = mode.attend(place)
        if given is None:
            found.missing += 1
            return
        exact = output.float()
        found.error += float((given.float() - exact).square().sum())
        found.power += float(exact.square().sum())
        found.made += place.multiplied
        found.every += place.call.multiplications


def _heads_of(tensor: Tensor) -> Tensor:
    """Some heads, evenly: ``[batch, up to 4, tokens, head]``."""
    return tensor[:, :: max(tensor.shape[1] // HEADS, 1)][:, :HEADS]


def _some_heads(place: Place) -> Place:
    query, key, value, scale, mask = place.call
    mask = mask if mask is None or mask.shape[1] == 1 else _heads_of(mask)
    place.call = AttentionCall(_heads_of(query), _heads_of(key), _heads_of(value), scale, mask)
    return place


def compare(work: ModelWork, names: Mapping[str, Any], modes: Sequence[Mode], longest: int) -> Comparing:
    """Sample the texts that choices are made on once, and measure every mode at every place and step.

    Raises:
        UnsupportedError: if the sampler's timesteps do not fall.
    """
    comparing = Comparing(work.denoiser, names, [site.name for site in work.map.attention], modes, longest)
    try:
        with work.timed("compare attention", work.steps):
            work.held_out_latents()
    finally:
        comparing.remove()
    if len(comparing.timesteps) < 2:
        times = list(comparing.timesteps.values())
        raise UnsupportedError(f"reuse 'attention' needs a sampler with falling timesteps, and '{work.component}' was called at {times}")
    return comparing


def table_of(comparing: Comparing, threshold: float) -> dict[str, Any]:
    """The choice: ``timesteps``, and ``table``, by site the number of the mode at every step, -1 for what is computed."""
    times = [comparing.timesteps[step] for step in sorted(comparing.timesteps)]
    sites, found, modes, longest = comparing.sites, comparing.found, len(comparing.modes), comparing.longest
    table = {site: chosen(found, site, len(times), modes, threshold * (n + 1) / len(sites), longest) for n, site in enumerate(sites)}
    return {"timesteps": times, "table": table}


def chosen(
    found: Mapping[tuple[str, int, int, int], Measured], site: str, steps: int, modes: int, threshold: float, longest: int
) -> list[int]:
    """The number of the mode of a site at every step; -1: computed. The threshold is that of the last step."""
    cells, computed = [-1], 0
    cost = {number: _cost(found, site, number) for number in range(modes)}
    for step in range(1, steps):
        behind, limit = step - computed, threshold * step / (steps - 1)
        good = [
            number
            for number in sorted(cost, key=cost.__getitem__)
            if behind <= longest and (known := found.get((site, step, number, behind))) is not None and known.relative < limit
        ]
        cells.append(good[0] if good else -1)
        computed = computed if good else step
    return cells


def _cost(found: Mapping[tuple[str, int, int, int], Measured], site: str, mode: int) -> float:
    """Multiplications of a mode over those of computing."""
    own = [known for (name, _, number, _), known in found.items() if name == site and number == mode]
    return sum(known.made for known in own) / max(sum(known.every for known in own), 1)
