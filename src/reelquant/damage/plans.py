"""Whole plans over steps and layers, sampled on texts unlike those of the map: what was predicted of them need not hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from reelquant.allocate.steps import StepPlan
from reelquant.allocate.table import EVERY, Tried
from reelquant.damage.kept import Kept
from reelquant.damage.rounding import inputs_by_step, own_inputs, own_weights, weights_by_step
from reelquant.damage.scene import Scene, Target, following, typical
from reelquant.damage.trajectory import interval
from reelquant.models.condition import texts_of

OWN = {"input": own_inputs, "weight": own_weights}
BY_STEP = {"input": inputs_by_step, "weight": weights_by_step}


def try_plans(scene: Scene, target: Target, plans: Sequence[StepPlan], kept: Kept) -> list[Tried]:
    """Sample the clips once for every different plan, with its part of this denoiser rounded and everything else float.

    Args:
        scene: with clips of its own; it is sampled in float when the first plan needs it.
    """
    different = {plan.content: plan for plan in plans}
    scene.progress.phase(f"{target.component}: plans over steps and layers", len(different))
    found = []
    for groups, plan in different.items():

        def measured(plan: StepPlan = plan) -> list[float]:
            if not scene.reference.numel():
                scene.reference = scene.latents()
            with following(scene.targets), _rounded(target, plan):
                return scene.damages()

        damages = kept.of(f"plan, {target.component}, {plan.part}, {groups}, {texts_of(scene.prompts)}", measured)
        found.append(Tried(target.component, plan.part, groups, typical(damages), *interval(damages)))
        scene.progress.advance()
    return found


@contextmanager
def _rounded(target: Target, plan: StepPlan) -> Iterator[None]:
    """Inside, layers have the bits of the plan."""
    formats = {}
    for group in plan.groups:
        written = [OWN[plan.part](target, (bits,))[0] for bits in group.bits]
        names = [layer.name for layer in target.layers] if group.layers == (EVERY,) else group.layers
        formats |= dict.fromkeys(names, written)
    with BY_STEP[plan.part](target, formats):
        yield
