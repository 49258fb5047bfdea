"""What every component may become, the most wanted first, and what each of these takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reelquant._errors import ReelQuantError
from reelquant._progress import Progress
from reelquant._remarks import remark
from reelquant.engine.components import check_stepless
from reelquant.engine.plan import Plan, make_plan
from reelquant.planning.formats import choose_formats
from reelquant.planning.memory import Footprint, footprint
from reelquant.planning.parts import Part
from reelquant.planning.rehearsal import Rehearsal
from reelquant.planning.rounding import rounding_of, tokenwise
from reelquant.planning.speed import seconds
from reelquant.planning.timing import Timings
from reelquant.planning.trace import NONE, Trace
from reelquant.recipes.recipe import Recipe, load_recipe

FLOAT = "float"
DENOISER = (FLOAT, "qvd-w8a8", "w8a16", "reel-w6a6", "reel-w4a8", "w4a16")
ENCODER, VAE = (FLOAT, "w8a16", "w4a16"), (FLOAT, "w8a16")
BY_KIND: Mapping[str, Sequence[str]] = {"text encoder": ENCODER, "image encoder": ENCODER, "vae": VAE}
DENOISERS = "denoisers"
"""The slot that all denoisers and ControlNets share: they get the same recipe."""


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
        chosen_later: whether formats are chosen while quantizing, so that nothing is known of the speed.
    """

    slot: str
    name: str
    recipe: Recipe | None
    plans: Mapping[str, Plan]
    parts: Mapping[str, Footprint]
    rank: int
    chosen_later: bool = False


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
    """

    def __init__(self, parts: Mapping[str, Part], seen: Rehearsal, device: str) -> None:
        self.parts, self.seen, self.device = parts, seen, device
        self.slots = slots_of(parts)
        self._blocks = {part.name: tokenwise(part.model) for part in self.slots[DENOISERS]}
        self._traces: dict[tuple[str, str], list[Trace]] = {}

    def candidates(self, recipes: Sequence[str] | None, bits: float | None) -> dict[str, list[Candidate]]:
        """Of every slot.

        Args:
            recipes: those of the denoisers, in order of preference; by default :data:`DENOISER`.
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
            names = asked or (DENOISER if slot == DENOISERS else BY_KIND[parts[0].kind])
            found[slot] = [one for rank, name in enumerate(names) if (one := self._try(slot, name, rank, strict=bool(asked))) is not None]
        return found

    def allocated(self, bits: float) -> Candidate:
        """Formats by layer for the denoisers."""
        return self.made(DENOISERS, choose_formats(bits), 0, chosen_later=True)

    def _try(self, slot: str, name: str, rank: int, *, strict: bool) -> Candidate | None:
        """A candidate; None, and a remark, if the recipe does not suit the components and nobody asked for it."""
        try:
            return self.made(slot, None if name == FLOAT else load_recipe(name), rank)
        except ReelQuantError as error:
            if strict:
                raise
            remark(f"{name} is not tried for {', '.join(part.name for part in self.slots[slot])}: {error}")
            return None

    def made(self, slot: str, recipe: Recipe | None, rank: int, *, chosen_later: bool = False) -> Candidate:
        """A recipe (None for float) for the components of a slot."""
        plans: dict[str, Plan] = {}
        for part in self.slots[slot] if recipe is not None else ():
            if not part.denoises:
                check_stepless(recipe, part.name, part.kind)
            plans[part.name] = make_plan(recipe, part.map, part.model)
        bytes_ = {
            part.name: footprint(part, plans.get(part.name), self.traces(part.name, plans.get(part.name)), self.device)
            for part in self.slots[slot]
        }
        return Candidate(slot, FLOAT if recipe is None else recipe.name, recipe, plans, bytes_, rank, chosen_later)

    def traces(self, name: str, plan: Plan | None) -> list[Trace]:
        """The calls of a component, with what a plan changes in what they hold."""
        rounding = NONE if plan is None or name not in self._blocks else rounding_of(plan, self._blocks[name])
        key = name, str(rounding)
        if key not in self._traces:
            self._traces[key] = [scene.trace(rounding) for scene in self.seen.scenes_of(name)]
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
