"""A budget of bits over denoising steps and groups of layers: bits of inputs, or of weights, for every group at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from reelquant._errors import RecipeError, nearest
from reelquant.allocate.exchange import descend, together
from reelquant.allocate.greedy import greedy
from reelquant.allocate.milp import solve
from reelquant.allocate.problem import Picks, Problem
from reelquant.allocate.step_map import KEYS, StepMap, step_map
from reelquant.allocate.table import EVERY, Measure, Part, SensitivityTable

TAKEN: dict[Measure, int] = {"gradient": 1, "noise": 1}  # bits below the budget that a step may get, by what holds for small errors only
STARTS: dict[str, Callable[[Problem], Picks]] = {
    "milp": lambda problem: solve(problem.damage, problem.sizes, problem.budget),
    "greedy": greedy,
}
"""Method -> where the descent begins: the best choice if damages only add up, or one that is climbed to."""
Over = Literal["nothing", "steps", "layers", "both"]
OVER: tuple[Over, ...] = get_args(Over)


@dataclass(frozen=True)
class LayerBits:
    """What a group of layers gets.

    Attributes:
        layers: their names; :data:`EVERY` for all of the denoiser.
        share: of all multiplications.
        bits: at each step of the denoiser.
    """

    layers: tuple[str, ...]
    share: float
    bits: tuple[int, ...]


@dataclass(frozen=True)
class StepPlan:
    """Bits by group of layers and step.

    Attributes:
        component: the denoiser.
        part: what has them, inputs or weights.
        over: what has numbers of its own: single ``steps``, groups of ``layers``, ``both`` or ``nothing``.
        groups: of layers, with their bits.
        damage: predicted.
        uniform: the most bits for all within the budget, and what they are predicted to do.
        tried: what the plan did to clips of other texts, and what the uniform bits did; None if they were not sampled.
    """

    component: str
    part: Part
    over: Over
    groups: tuple[LayerBits, ...]
    damage: float
    uniform: tuple[int, float]
    tried: tuple[float, float] | None = None

    @property
    def content(self) -> tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]:
        """Layers and their bits."""
        return tuple((group.layers, group.bits) for group in self.groups)

    @property
    def mean(self) -> float:
        """Bits, mean over steps and layers, weighted by multiplications."""
        return sum(group.share * sum(group.bits) / len(group.bits) for group in self.groups)

    @property
    def unweighted(self) -> float:
        """Bits, mean over steps and layers, all layers alike."""
        return sum(len(one.layers) * sum(one.bits) / len(one.bits) for one in self.groups) / sum(len(one.layers) for one in self.groups)

    def entries(self, table: SensitivityTable) -> list[dict[str, Any]]:
        """The entries of ``step_bits`` in a recipe that say the same: of the largest group without ``on``, then those of the others.

        Recipes count steps through the whole sampler, of which each of two experts makes its own part. Steps of the other one get the
        uniform bits; its own recipe says what it gets.
        """
        several = len(table.timesteps) > 1
        own = table.timesteps[self.component]
        whole = sorted({one for times in table.timesteps.values() for one in times}, reverse=True) if several else own
        made = []
        for group in sorted(self.groups, key=lambda group: -len(group.layers)):
            bits = dict(zip(own, group.bits, strict=True))
            on = {"on": " | ".join(group.layers)} if made else {}
            made.append(on | {KEYS[self.part]: [bits.get(time, self.uniform[0]) for time in whole]})
        return made


def allocate_steps(
    table: SensitivityTable,
    bits: float,
    component: str | None = None,
    measure: Measure | None = None,
    *,
    part: Part = "input",
    method: str = "milp",
    over: Over | None = None,
) -> StepPlan:
    """Divide a budget of bits among the steps of a denoiser, and among its layers.

    Rounding at one step moves the final latents by an error; errors of several steps add up as vectors. Their squares are the damages of
    single steps, and :attr:`SensitivityTable.together` holds the cosines between them: near 1 between neighbouring steps for weights,
    whose rounding error is the same at all steps, and small for inputs. Errors of different bits, and of different layers, are taken to be
    independent. The plan begins at the best one by damages alone, and units exchange bits as long as the predicted square of the sum
    becomes less.

    The budget is a mean over steps and layers, in which a layer counts by its multiplications. Layers are told apart where the table
    holds rows of layers at ranges of steps that cover all steps, see :func:`reelquant.allocate.step_map.step_map`.

    Damages of single steps count with the upper end of their interval: where few bits change what a clip shows, they do it in one clip of
    many. Between numbers of bits that were measured the logarithm of the damage is interpolated. Damages by gradients or noise hold for
    small errors, so plans made of them take one bit at most from the budget anywhere.

    Args:
        table: with damages of all inputs, or of all weights, at single steps.
        bits: most bits, mean over steps and multiplications.
        component: the denoiser; the only one if none is named.
        measure: which damages of single steps count; by default the most trusted ones that the table has.
        part: ``input`` or ``weight``.
        method: ``milp`` begins at the optimum of the sum of damages (HiGHS), ``greedy`` where bits are given one by one.
        over: what may have bits of its own, ``nothing``, ``steps``, ``layers`` or ``both``; by default the least damage: of plans that were
            tried (:attr:`SensitivityTable.tried`) what they did, else what is predicted.

    Raises:
        RecipeError: if the table has no such damages, or the budget is out of reach.
    """
    name = component or table.components[0]
    plans = plans_over(table, bits, name, measure, part=part, method=method)
    if over is not None:
        if over not in plans:
            raise RecipeError(
                f"no plan over '{over}' from the table of '{table.model}': it has {', '.join(plans)}"
                + (", as it does not tell layers apart at all steps; measure with --by-step and gradients" if over in OVER else "")
            )
        return plans[over]
    done = {one.groups: one.damage for one in table.tried if (one.component, one.part) == (name, part)}
    if any(plan.content not in done for plan in plans.values()):
        return min(plans.values(), key=lambda plan: plan.damage)
    best = min(plans.values(), key=lambda plan: done[plan.content])
    return replace(best, tried=(done[best.content], done[plans["nothing"].content]))


def plans_over(
    table: SensitivityTable, bits: float, component: str, measure: Measure | None = None, *, part: Part = "input", method: str = "milp"
) -> dict[Over, StepPlan]:
    """The plans that :func:`allocate_steps` chooses among, by what has bits of its own; uniform bits first."""
    if method not in STARTS:
        raise RecipeError(f"unknown method '{method}' of a plan over steps; {nearest(method, STARTS)}")
    table.of(component)
    found = step_map(table, component, measure, part)
    found = found.restricted(int(bits) - TAKEN.get(found.measure, int(bits)))
    if len(found.choices) < 2 or found.choices[0] > bits:
        raise RecipeError(
            f"{bits} bits a step are out of reach: {KEYS[part]} were measured at single steps with "
            f"{', '.join(map(str, found.choices)) or 'no'} bits; a plan chooses among two numbers or more, one of them within the budget"
        )
    known = OVER if found.groups != ((EVERY,),) else OVER[:2]
    return {over: _plan(found, component, part, bits, method, over) for over in known}


def _plan(found: StepMap, component: str, part: Part, bits: float, method: str, over: Over) -> StepPlan:
    """The plan with bits of their own for what ``over`` says; all of them are judged on the whole map."""
    own = found.merged(layers=over in ("nothing", "steps"), steps=over in ("nothing", "layers"))
    choices = np.array(own.choices, dtype=float)
    sizes = np.outer(np.outer(own.shares, own.lengths).ravel(), choices)
    problem = Problem(own.damage.reshape(sizes.shape), sizes, bits * float(own.lengths.sum()))
    flat = [max(number for number, one in enumerate(found.choices) if one <= bits)] * problem.layers
    grams = _grams(own)
    starts = [] if over == "nothing" else [flat, STARTS[method](problem)]
    picks = min((descend(grams, problem, start) for start in starts), key=lambda one: together(grams, one), default=flat)
    whole = _grams(found)
    damages = [together(whole, _unmerged(own, found, one)) for one in (picks, flat)]
    picks = picks if damages[0] <= damages[1] else flat
    uniform = (found.choices[flat[0]], damages[1])
    return StepPlan(component, part, over, _layer_bits(own, picks), min(damages), uniform)


def _grams(found: StepMap) -> np.ndarray:
    """``[choices, units, units]``, a unit for each group and range of steps, group after group; different groups are independent."""
    groups, spans, choices = found.damage.shape
    grams = np.zeros((choices, groups, spans, groups, spans))
    roots = np.sqrt(found.damage)
    for group in range(groups):
        grams[:, group, :, group] = found.cosines * np.einsum("sc,tc->cst", roots[group], roots[group])
    return grams.reshape(choices, groups * spans, groups * spans)


def _unmerged(own: StepMap, found: StepMap, picks: Sequence[int]) -> list[int]:
    """Picks of a merged map as picks of the whole one."""
    shape = own.damage.shape[:2]
    return np.broadcast_to(np.array(picks).reshape(shape), found.damage.shape[:2]).ravel().tolist()


def _layer_bits(own: StepMap, picks: Sequence[int]) -> tuple[LayerBits, ...]:
    """Bits by group and step; groups with the same bits are one."""
    bits = np.array(own.choices)[np.array(picks).reshape(own.damage.shape[:2])].repeat(own.lengths, axis=1).tolist()
    made: dict[tuple[int, ...], LayerBits] = {}
    for group, share, row in zip(own.groups, own.shares.tolist(), bits, strict=True):
        before = made.get(tuple(row), LayerBits((), 0.0, tuple(row)))
        made[tuple(row)] = LayerBits((*before.layers, *group), before.share + share, tuple(row))
    return tuple(made.values())
