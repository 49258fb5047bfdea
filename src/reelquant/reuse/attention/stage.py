"""Attention that is not computed at every step, or not to all tokens.

Papers: DiTFastAttn (arXiv 2406.08552) shares the output of attention between steps and between the halves of guidance, and computes
windows plus a kept residual; it chooses layer by layer and step by step, by a threshold. AdaSpa (arXiv 2502.21079) computes the heaviest
blocks only. Ours is one mechanism with these as its modes; what is ours in a mode stands in its file, and what is ours in the choice in
:mod:`reelquant.reuse.attention.choosing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from reelquant._errors import RecipeError, SiteError, UnsupportedError
from reelquant.reuse.attention.choosing import compare, table_of
from reelquant.reuse.attention.courses import ByRule, ByTable, Course, Rule, parse_rule, ruled
from reelquant.reuse.attention.installed import InstalledAttention
from reelquant.reuse.attention.mode import Mode
from reelquant.reuse.attention.modes import parse_mode
from reelquant.reuse.attention.planned import forecasting, plan
from reelquant.reuse.attention.recorded import record
from reelquant.reuse.reuse import Reuse
from reelquant.stages import ModelWork

RULES = ({"on": "*", "mode": "share"},)
CANDIDATES = ({"mode": "share"}, {"mode": "halves", "window": 0.25}, {"mode": "window", "window": 0.25}, {"mode": "halves"})


@dataclass(frozen=True)
class AttentionReuse(Reuse):
    """Leave a part of a denoiser's attention uncomputed.

    A call under autograd computes everything. A new trajectory begins when the timestep
    rises, or when the latents change in shape, dtype or device; after an interrupted clip, call ``reset()`` of what is installed.

    Attributes:
        rules: mappings with ``on``, a pattern over the modules that ask for attention, ``mode`` and its options, and when attention is
            computed all the same: ``every`` (2), ``first`` (1) and ``at``, see :class:`reelquant.reuse.schedule.Schedule`. The last rule
            that names a place holds; ``mode: computed`` makes an exception. ``every: 1`` computes everything, bit for bit.
        threshold: instead of rules: every place and step gets the cheapest of the candidates that changes the output of attention by less
            than this, relative to its size, in the clips that choices are made on. Early places and steps get less: the n-th of L places
            n / L of it, and the share of the steps that have passed of that. 0 computes everything.
        budget: instead of rules: the share of attention's multiplications that is made. Which places are computed at which steps, and what
            weights of their last outputs stand for the others, is planned from outputs that are recorded in the clips that choices are
            made on, see :mod:`reelquant.reuse.attention.planned`. 1 computes everything.
        candidates: mappings with ``mode`` and its options.
        longest: with a threshold, what was computed once stands for so many steps at most.
    """

    rules: tuple[Mapping[str, Any], ...] = RULES
    threshold: float | None = None
    budget: float | None = None
    candidates: tuple[Mapping[str, Any], ...] = CANDIDATES
    longest: int = 4
    always: ClassVar[Mapping[str, Any]] = {"threshold": 0.0}
    unit: ClassVar[str] = "multiplications"
    things: ClassVar[str] = "attention sites"

    def __post_init__(self) -> None:
        given = {"rules": tuple(self.rules) != RULES, "threshold": self.threshold is not None, "budget": self.budget is not None}
        if sum(given.values()) > 1:
            raise RecipeError(f"reuse 'attention' has {' and '.join(name for name in given if given[name])} beside each other; keep one")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise RecipeError(f"'budget' of reuse 'attention' is a share of its multiplications, above 0 and up to 1, got {self.budget}")
        if self.threshold is None and (tuple(self.candidates), self.longest) != (CANDIDATES, 4):
            raise RecipeError("'candidates' and 'longest' of reuse 'attention' belong to a threshold; add one, like threshold: 0.05")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise RecipeError(
                f"'threshold' of reuse 'attention' is an error relative to attention's output, from 0 to 1, got {self.threshold}"
            )
        if self.longest < 1 or not self.candidates:
            raise RecipeError(
                f"'longest' of reuse 'attention' is 1 or more, and there is a candidate, got {self.longest} and {self.candidates}"
            )
        _ = self.parsed, self.modes

    @property
    def parsed(self) -> list[Rule]:
        """The rules."""
        return [parse_rule(number, rule) for number, rule in enumerate(self.rules)]

    @property
    def modes(self) -> list[Mode]:
        """The candidates."""
        found = [parse_mode(f"candidates.{number} of reuse 'attention'", one) for number, one in enumerate(self.candidates)]
        return [one for one in found if one is not None]

    @property
    def needs_data(self) -> bool:
        return bool(self.threshold) or self._plans

    @property
    def _plans(self) -> bool:
        return self.budget is not None and self.budget < 1

    @property
    def in_memory(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "what attention's errors do is tried out on the whole denoiser; give rules" if self.needs_data else None

    def held_out_runs(self, steps: int) -> int:
        del steps
        return 1 if self.needs_data else 0

    def facts(self, work: ModelWork) -> dict[str, Any]:
        """Paths of the modules that ask for attention, names of two arguments of the denoiser, and what each site does."""
        timestep, latent = work.map.timestep_argument, work.map.latent_argument
        if timestep is None or latent is None:
            raise UnsupportedError(f"reuse 'attention' follows the timestep, and '{work.component}' has none; use it for a denoiser")
        if not work.map.attention:
            raise UnsupportedError(f"nothing of {work.map.cls} calls scaled_dot_product_attention, so reuse 'attention' has nothing to do")
        names = {"timestep": timestep, "latent": latent}
        if self.budget is not None:
            return names | (planned(work, names, self.budget) if self._plans else {})
        if self.threshold is None:
            if not (found := ruled(self.parsed, work.map.attention)):
                count = len(work.map.attention)
                raise SiteError(f"the rules of reuse 'attention' name none of the {count} places where {work.map.cls} attends; try on: '*'")
            return names | {"rules": found}
        return names | (table_of(compare(work, names, self.modes, self.longest), self.threshold) if self.threshold else {})

    def widest(self, work: ModelWork) -> tuple[AttentionReuse, dict[str, Any]]:
        """Every place that is not always computed keeps its output from the first call on: no mode keeps more than that size."""
        rules = tuple({"on": rule["on"], "mode": "computed" if rule["mode"] == "computed" else "share"} for rule in self.rules)
        found = replace(self, threshold=None, rules=RULES if self.threshold is not None else rules, candidates=CANDIDATES, longest=4)
        return found, found.facts(work)

    def install(self, model: nn.Module, facts: Mapping[str, Any]) -> InstalledAttention:
        return InstalledAttention(model, facts, self.courses(facts))

    def courses(self, facts: Mapping[str, Any]) -> dict[str, Course]:
        """What every site does."""
        if "rules" in facts:
            parsed = dict(enumerate(self.parsed))
            return {site: ByRule(parsed[number]) for site, number in facts["rules"].items()}
        times, table = tuple(facts.get("timesteps", ())), facts.get("table", facts.get("forecasts", {}))
        if any(len(row) != len(times) for row in table.values()):
            raise RecipeError(
                f"a table of reuse 'attention' has a mode for each of its {len(times)} timesteps in every row, and one has not"
            )
        if "forecasts" in facts:
            return {site: ByTable(times, forecasting(row)) for site, row in table.items()}
        modes: dict[int, Mode | None] = {-1: None, **dict(enumerate(self.modes))}
        return {site: ByTable(times, tuple(modes[cell] for cell in row)) for site, row in table.items()}


def planned(work: ModelWork, names: Mapping[str, Any], budget: float) -> dict[str, Any]:
    """``timesteps``, and ``forecasts``: by site the weights of its last outputs at every step, None where it is computed."""
    with work.timed("compare attention", work.steps):
        recorded = record(work, names, work.held_out_latents)
    rows = plan(recorded, budget)
    return {"timesteps": list(recorded.timesteps), "forecasts": {site: [row and list(row) for row in rows[site]] for site in rows}}
