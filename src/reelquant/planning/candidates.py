"""What every component may become, the most wanted first, and what each of these takes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources

from reelquant._errors import ReelQuantError
from reelquant._progress import Progress
from reelquant._remarks import remark
from reelquant.discover.components import Kind
from reelquant.engine.components import check_stepless
from reelquant.engine.plan import Plan, make_plan
from reelquant.planning.formats import Formats
from reelquant.planning.kept import follow, reuse_of
from reelquant.planning.memory import Footprint, footprint, running
from reelquant.planning.parts import Part
from reelquant.planning.rehearsal import Rehearsal
from reelquant.planning.rounding import rounding_of, tokenwise
from reelquant.planning.speed import seconds
from reelquant.planning.timing import Timings
from reelquant.planning.trace import NONE, Rounding, Trace
from reelquant.policies.resolution import ChangeResolution, SizeStage
from reelquant.recipes.recipe import Recipe, load_recipe

FLOAT = "float"
FILE = "tried.json"
DENOISERS = "denoisers"
"""The slot that all denoisers and ControlNets share: they get the same recipe."""


@functools.cache
def tried(kind: Kind) -> tuple[str, ...]:
    """Recipes that are tried for components of a kind where nobody names any, :data:`FLOAT` among them, the most wanted first."""
    table = json.loads(resources.files("reelquant.planning").joinpath(FILE).read_text(encoding="utf-8"))
    return tuple(table[kind])


@dataclass(frozen=True, eq=False)
class Candidate:
    """One recipe for the components of a slot.

    Attributes:
        slot: name of the component, or :data:`DENOISERS`.
        name: of the recipe, or :data:`FLOAT`.
        recipe: it; None for float.
        plans: by component.
        parts: bytes by component.
        rank: place in the order of preference.
        own: recipes that were made for this model, by component; empty for one of the library.
        last: height and width of the clip in the end over those of the call; see ``docs/resolution.md``.
        chosen_later: whether formats are chosen while quantizing, so that nothing is known of the speed.
    """

    slot: str
    name: str
    recipe: Recipe | None
    plans: Mapping[str, Plan]
    parts: Mapping[str, Footprint]
    rank: int
    own: Mapping[str, Recipe] = field(default_factory=dict)
    last: float = 1.0
    chosen_later: bool = False


def sizes_of(plan: Plan) -> tuple[SizeStage, ...]:
    """The sizes of clips along the steps, if the recipe changes them."""
    return next((entry.stage.sizes for entry in plan.entries if isinstance(entry.stage, ChangeResolution)), ())


def slots_of(parts: Mapping[str, Part]) -> dict[str, list[Part]]:
    """Components that get one recipe together, denoisers first."""
    timed = [part for part in parts.values() if part.denoises]
    return {DENOISERS: timed} | {part.name: [part] for part in parts.values() if not part.denoises}


class Bench:
    """Works out candidates: each part is mapped once, each call is followed once per kind of rounding.

    Attributes:
        parts: the components.
        seen: the rehearsed clip.
        device: where the pipeline shall run.
        larger: rehearses the clip with height and width times a number.
        formats: who gives layers their formats; a map that has to be measured is measured when this is first asked for.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        seen: Rehearsal,
        device: str,
        larger: Callable[[float], Rehearsal],
        formats: Callable[[Mapping[str, Part]], Formats] | None = None,
    ) -> None:
        self.parts, self.seen, self.device = parts, seen, device
        self.seen_at = functools.cache(lambda scale: seen if scale == 1 else larger(scale))
        self._ask = formats or (lambda parts: Formats())
        self.slots = slots_of(parts)
        self._blocks = {part.name: tokenwise(part.model) for part in self.slots[DENOISERS]}
        self._traces: dict[tuple[str, str, float], list[Trace]] = {}
        self.resized = functools.cache(self._resized)

    def candidates(self, recipes: Sequence[str] | None, bits: float | None) -> dict[str, list[Candidate]]:
        """Of every slot.

        Args:
            recipes: those of the denoisers, in order of preference; by default those of :func:`tried`.
            bits: denoisers get formats by layer with so many bits on average, and nothing else.

        Raises:
            ReelQuantError: if a recipe that was named does not fit.
        """
        found: dict[str, list[Candidate]] = {}
        for slot, parts in self.slots.items():
            if slot == DENOISERS and bits is not None:
                found[slot] = [self.allocated(bits)]
                continue
            asked = recipes if slot == DENOISERS else None
            names = asked or tried("denoiser" if slot == DENOISERS else parts[0].kind)
            found[slot] = [one for rank, name in enumerate(names) if (one := self._try(slot, name, rank, strict=bool(asked))) is not None]
        return found

    @functools.cached_property
    def formats(self) -> Formats:
        """Who gives layers their formats.

        Raises:
            RecipeError: for a map of another model.
        """
        found = self._ask(self.parts)
        for part in self.slots[DENOISERS]:
            found.check(part.name, dict(part.model.named_modules()))
        return found

    def allocated(self, bits: float, formats: Formats | None = None) -> Candidate:
        """Formats by layer for the denoisers, by :attr:`formats` or others."""
        formats = formats or self.formats
        own = formats.recipes(bits, [part.name for part in self.slots[DENOISERS]])
        made = self.made(DENOISERS, own, 0)
        return replace(made, own=own, chosen_later=formats.table is None)

    def smallest(self) -> Candidate:
        """Every layer of the denoisers in the smallest format. Nothing is measured for that."""
        formats = self.__dict__.get("formats", Formats())
        return self.allocated(formats.reach[0], formats)

    def _try(self, slot: str, name: str, rank: int, *, strict: bool) -> Candidate | None:
        """A candidate; None, and a remark, if the recipe does not suit the components and nobody asked for it."""
        try:
            return self.made(slot, None if name == FLOAT else load_recipe(name), rank)
        except ReelQuantError as error:
            if strict:
                raise
            remark(f"{name} is not tried for {', '.join(part.name for part in self.slots[slot])}: {error}")
            return None

    def made(self, slot: str, recipe: Recipe | Mapping[str, Recipe] | None, rank: int) -> Candidate:
        """A recipe (None for float), or one for each, for the components of a slot."""
        plans: dict[str, Plan] = {}
        for part in self.slots[slot] if recipe is not None else ():
            own = recipe[part.name] if isinstance(recipe, Mapping) else recipe
            if not part.denoises:
                check_stepless(own, part.name, part.kind)
            plans[part.name] = make_plan(own, part.map, part.model)
        scales = [1.0, *(size.scale for plan in plans.values() for size in sizes_of(plan))]
        bytes_ = {part.name: self._bytes(part, plans.get(part.name), max(scales)) for part in self.slots[slot]}
        first = next(iter(plans.values())).recipe if plans else None
        return Candidate(slot, FLOAT if first is None else first.name, first, plans, bytes_, rank, last=scales[-1])

    def _resized(self, candidate: Candidate, scale: float) -> Candidate:
        """A candidate for a component that works once, with height and width of the clip times a number."""
        parts = {part.name: self._bytes(part, candidate.plans.get(part.name), scale) for part in self.slots[candidate.slot]}
        return replace(candidate, parts=parts)

    def _bytes(self, part: Part, plan: Plan | None, scale: float = 1.0) -> Footprint:
        """Of a component; results that are kept are those of as many calls as a step has."""
        traces, steps, reuse = self.traces(part.name, plan, scale), self.seen.steps, reuse_of(plan)
        if reuse is None:
            return footprint(part, plan, traces, self.device, steps=steps)
        seen = self.seen_at(scale)
        found = [follow(part, reuse, scene, self._rounding(part.name, plan)) for scene in seen.scenes_of(part.name)]
        most = max(running(one.trace, self.device) - one.once for one in found)
        kept = max(one.once * one.results for one in found) * seen.most[part.name]
        return replace(footprint(part, plan, traces, self.device, kept, steps), running=most)

    def _rounding(self, name: str, plan: Plan | None) -> Rounding:
        return NONE if plan is None or name not in self._blocks else rounding_of(plan, self._blocks[name])

    def traces(self, name: str, plan: Plan | None, scale: float = 1.0) -> list[Trace]:
        """The calls of a component, with what a plan changes in what they hold, and height and width of the clip times a number."""
        rounding = self._rounding(name, plan)
        key = name, str(rounding), scale
        if key not in self._traces:
            self._traces[key] = [scene.trace(rounding) for scene in self.seen_at(scale).scenes_of(name)]
        return self._traces[key]

    def step_seconds(self, candidate: Candidate, timings: Timings, progress: Progress | None = None) -> float | None:
        """Seconds of a denoising step; None if they depend on what is chosen later."""
        if candidate.chosen_later:
            return None
        total = 0.0
        for part in self.slots[DENOISERS]:
            plan = candidate.plans.get(part.name)
            specs = {} if plan is None else {row.layer.name: row.specs for row in plan.quantized if row.specs is not None}
            for trace in self.traces(part.name, plan):
                total += self.seen.calls[part.name] * seconds(part.model, trace, specs, timings, progress)
        return total
