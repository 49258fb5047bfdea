"""What a denoiser's attention rounds, place by place and step by step. Patterns are resolved here once; nothing that runs reads any."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from reelquant._errors import RecipeError, SiteError
from reelquant.kernels.attention import FLOAT, Asked, AttentionQuant, AttentionRule, parse_attention
from reelquant.sites import AttentionSite, select


@dataclass(frozen=True)
class Placed:
    """Numbers of some of a denoiser's attention.

    Attributes:
        numbers: what is rounded; None rounds nothing.
        sites: the modules that ask for it; None for all, whether they are known or not.
        slots: the steps; None for all.
    """

    numbers: AttentionQuant | None
    sites: tuple[str, ...] | None = None
    slots: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.sites is None:
            return str(self.numbers)
        steps = "" if self.slots is None else f", {len(self.slots)} steps"
        return f"{self.numbers or FLOAT} ({len(self.sites)} sites{steps})"

    def to_json(self) -> dict[str, Any]:
        """As checkpoints write it beside others."""
        numbers = {"scores": FLOAT, "values": FLOAT} if self.numbers is None else self.numbers.to_json()
        slots = {} if self.slots is None else {"slots": list(self.slots)}
        return {"sites": list(self.sites or ()), **slots, **numbers}


@dataclass(frozen=True)
class AttentionPlan:
    """Where which numbers hold: of several that name a place and a step, the last ones."""

    placed: tuple[Placed, ...]

    @classmethod
    def everywhere(cls, numbers: AttentionQuant) -> AttentionPlan:
        """The same numbers for every call."""
        return cls((Placed(numbers),))

    def __str__(self) -> str:
        by_numbers: dict[AttentionQuant | None, list[Placed]] = {}
        for one in self.placed:
            by_numbers.setdefault(one.numbers, []).append(one)
        return "; ".join(str(those[0]) if len(those) == 1 else _together(those) for those in by_numbers.values())

    @property
    def uniform(self) -> bool:
        """Whether it does not matter where a call comes from."""
        return all(one.sites is None for one in self.placed)

    @property
    def numbers(self) -> tuple[AttentionQuant, ...]:
        """All that are asked for somewhere, each once."""
        return tuple(dict.fromkeys(one.numbers for one in self.placed if one.numbers is not None))

    @cached_property
    def rows(self) -> tuple[tuple[Placed, ...], ...]:
        """What may hold at a place, each combination once. Row 0 is that of places that no one names."""
        return tuple(dict.fromkeys([self._at(None), *(self._at(site) for site in self.sites)]))

    @property
    def sites(self) -> tuple[str, ...]:
        """The places that are named."""
        return tuple(dict.fromkeys(site for one in self.placed for site in one.sites or ()))

    def row_of(self, site: str) -> int:
        """The row of a place."""
        return self.rows.index(self._at(site))

    def _at(self, site: str | None) -> tuple[Placed, ...]:
        return tuple(one for one in self.placed if one.sites is None or site in one.sites)

    @property
    def follows_steps(self) -> bool:
        """Whether it matters which step a call belongs to."""
        return any(one.slots is not None for one in self.placed)

    def at(self, row: int, slot: int) -> AttentionQuant | None:
        """Numbers of a call, None for floats."""
        holding = [one for one in self.rows[row] if one.slots is None or slot in one.slots]
        return holding[-1].numbers if holding else None

    def to_json(self) -> Any:
        """As checkpoints write it: the mapping that recipes write where one holds everywhere, a list otherwise."""
        first = self.placed[0]
        if self.uniform and first.numbers is not None:
            return first.numbers.to_json()
        return [one.to_json() for one in self.placed]

    @classmethod
    def from_json(cls, data: Any) -> AttentionPlan | None:
        """Read :meth:`to_json` back.

        Raises:
            RecipeError: naming what is wrong.
        """
        if isinstance(data, list):
            return cls(tuple(_placed(one) for one in data)) if data else None
        numbers = parse_attention(data)
        return None if numbers is None else cls.everywhere(numbers)


def _together(those: Sequence[Placed]) -> str:
    """Several with the same numbers."""
    sites = {site for one in those for site in one.sites or ()}
    return f"{those[0].numbers or FLOAT} ({len(sites)} sites{', at some steps' if any(one.slots is not None for one in those) else ''})"


def _placed(data: Any) -> Placed:
    sites = data.get("sites") if isinstance(data, Mapping) else None
    slots = data.get("slots") if isinstance(data, Mapping) else None
    if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
        raise RecipeError(f"attention holds {data!r:.80}, which names no sites")
    if slots is not None and not (isinstance(slots, list) and all(type(slot) is int and slot >= 0 for slot in slots)):
        raise RecipeError(f"attention.slots are the numbers of steps, got {slots!r:.80}")
    numbers = parse_attention({key: word for key, word in data.items() if key not in ("sites", "slots")})
    return Placed(numbers, tuple(sites), None if slots is None else tuple(slots))


Choose = Callable[[Sequence[str], Sequence[AttentionQuant]], Mapping[str, Sequence[int]]]
"""Of sites and candidates, which candidate each site gets at each slot."""


def placed(
    asked: Asked,
    sites: Iterable[AttentionSite],
    timesteps: Sequence[float] = (),
    sampled: Sequence[float] = (),
    choose: Choose | None = None,
) -> AttentionPlan | None:
    """What a recipe asks of a denoiser's attention, with its patterns and steps resolved; None if it asks for nothing.

    Args:
        sites: the modules that ask for attention, see :func:`reelquant.discover.discover`.
        timesteps: at which the denoiser was calibrated; the slots of its clock.
        sampled: those of the whole sampler, of which one of two experts sees a part; empty if it sees all.
        choose: chooses where a rule has several numbers; None where nothing is known to choose by.

    Raises:
        RecipeError: if rules are asked of a denoiser whose sites are not known, or of steps of one that was not calibrated.
        SiteError: if a pattern names no site.
    """
    if not isinstance(asked, tuple):
        return None if asked is None else AttentionPlan.everywhere(asked)
    known = list(sites)
    if asked and not known:
        raise RecipeError(
            "rules of attention name modules, and nothing is known of those of this model: it was not run, or none of them calls "
            "scaled_dot_product_attention; give one mapping for all, like attention: {scores: int8}"
        )
    found: list[Placed] = []
    for number, rule in enumerate(asked):
        one = Placed(rule.numbers, _named(number, rule, known), _slots(rule, timesteps, sampled or timesteps))
        found += _divided(one, rule.candidates, timesteps, choose) if rule.others else [one]
    return AttentionPlan(tuple(found)) if any(one.numbers is not None for one in found) else None


def _divided(whole: Placed, candidates: Sequence[AttentionQuant], timesteps: Sequence[float], choose: Choose | None) -> list[Placed]:
    """What several numbers become: each with the sites that get it at the same slots."""
    if choose is None or not timesteps:
        raise RecipeError(
            f"attention.values {[one.values for one in candidates]} are a choice, which is made while a recipe that calibrates quantizes a "
            "denoiser; give one word"
        )
    every = range(len(timesteps)) if whole.slots is None else whole.slots
    alike: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for site, picks in choose(whole.sites or (), candidates).items():
        for place in range(len(candidates)):
            if slots := tuple(slot for slot in every if picks[slot] == place):
                alike.setdefault((place, slots), []).append(site)
    complete = tuple(range(len(timesteps)))
    return [Placed(candidates[place], tuple(sites), None if slots == complete else slots) for (place, slots), sites in alike.items()]


def _named(number: int, rule: AttentionRule, sites: Sequence[AttentionSite]) -> tuple[str, ...]:
    try:
        return select(rule.on, sites, "attention sites")
    except SiteError as error:
        raise SiteError(f"attention.{number}.on: {error}") from None


def _slots(rule: AttentionRule, timesteps: Sequence[float], sampled: Sequence[float]) -> tuple[int, ...] | None:
    """Slots of the steps whose middle lies in the part of the trajectory that a rule names."""
    if rule.steps is None:
        return None
    if not timesteps:
        raise RecipeError(
            f"attention.steps {list(rule.steps)} follow the timestep, and no denoising step is known here: the recipe has "
            "'calibrate: null', or the component is called without a timestep; drop steps"
        )
    start, end = rule.steps
    inside = [start <= (step + 0.5) / len(sampled) < end for step in range(len(sampled))]
    if not any(inside):
        raise RecipeError(f"attention.steps {list(rule.steps)} hold none of the {len(sampled)} steps; give a wider part")
    wanted = {time for time, chosen in zip(sampled, inside, strict=True) if chosen}
    return tuple(slot for slot, timestep in enumerate(timesteps) if timestep in wanted)
