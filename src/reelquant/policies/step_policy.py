"""Protected steps in the words of other programs: ``diffusion_step_policy``, schema 1.

NVIDIA's quantized Cosmos3 checkpoints carry it in ``quantization_config.runtime``, and runtimes of diffusion models read it::

    {"schema_version": 1, "type": "first_last_n", "index_space": "denoising_loop_iteration",
     "first_steps": {"count": 3, "mode": "a16"}, "last_steps": {"count": 3, "mode": "a16"}}

It says that the first and the last iterations of the denoising loop keep 16-bit activations. Iterations are those of the sampler that runs;
ours are found by the timestep, so with another number of steps than in calibration as many timesteps are protected as are nearest to ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reelquant._errors import RecipeError

RUNTIME, POLICY = "runtime", "diffusion_step_policy"
FIXED = {"schema_version": 1, "type": "first_last_n", "index_space": "denoising_loop_iteration"}
ENDS = ("first_steps", "last_steps")
MODES = {"a16": "float"}  # their word -> ours, of protected inputs
MOST = 1000  # steps at an end


def is_policy(value: Any) -> bool:
    """Whether a value is such a policy, or a ``runtime`` that holds one."""
    return isinstance(value, Mapping) and bool({POLICY, "index_space", *ENDS} & value.keys())


def read_policy(value: Mapping[str, Any]) -> dict[str, Any]:
    """What ``protect_steps`` of a recipe says the same with.

    Args:
        value: the policy, or the ``runtime`` that holds it.

    Raises:
        RecipeError: for another schema, kind or mode, or counts that are none.
    """
    policy = value.get(POLICY, value)
    if not isinstance(policy, Mapping):
        raise RecipeError(f"{POLICY} is a mapping, got {policy!r:.60}")
    for key, expected in FIXED.items():
        if policy.get(key) != expected:
            raise RecipeError(
                f"{POLICY}.{key} is {policy.get(key)!r:.40}, and only {expected!r} can be followed; write protect_steps yourself"
            )
    if unknown := sorted(str(key) for key in policy.keys() - {*FIXED, *ENDS}):
        raise RecipeError(f"{POLICY} says {unknown[0]!r:.40}, which schema 1 does not have; write protect_steps yourself")
    first, last = (_count(policy, end) for end in ENDS)
    if not first + last:
        raise RecipeError(f"{POLICY} protects no step; leave it out")
    return {"steps": [*range(first), *range(-last, 0)], "inputs": MODES["a16"]}


def _count(policy: Mapping[str, Any], end: str) -> int:
    one = policy.get(end, {"count": 0, "mode": "a16"})
    count, mode = (one.get("count"), one.get("mode")) if isinstance(one, Mapping) else (None, None)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST:
        raise RecipeError(f"{POLICY}.{end}.count is a number of steps from 0 to {MOST}, got {count!r:.40}")
    if mode not in MODES:
        raise RecipeError(f"{POLICY}.{end}.mode is {mode!r:.40}, and only {', '.join(MODES)} can be followed")
    return count


def written_policy(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """``{"runtime": {"diffusion_step_policy": ...}}`` for a recipe whose protected steps can be said so; empty for all others.

    Steps that were found by measuring (``auto``), steps in the middle, and 8-bit inputs cannot.

    Args:
        recipe: as a mapping.
    """
    found = recipe.get("protect_steps")
    given = found if isinstance(found, Mapping) else {"steps": found}
    if is_policy(given):
        given = read_policy(given)
    steps = given.get("steps")
    if not isinstance(steps, Sequence) or isinstance(steps, str) or given.get("inputs", "float") != "float" or not steps:
        return {}
    first, last = {step for step in steps if step >= 0}, {step for step in steps if step < 0}
    if first != set(range(len(first))) or last != set(range(-len(last), 0)):
        return {}
    ends = {end: {"count": len(some), "mode": "a16"} for end, some in zip(ENDS, (first, last), strict=True)}
    return {RUNTIME: {POLICY: {**FIXED, **ends}}}


def protected_slots(value: Mapping[str, Any], slots: int) -> tuple[int, ...]:
    """Slots of a denoiser that runs in every one of so many steps.

    Raises:
        RecipeError: as :func:`read_policy`; if the policy protects more steps than there are.
    """
    steps = read_policy(value)["steps"]
    if len(steps) > slots:
        raise RecipeError(f"{POLICY} protects {len(steps)} steps, and the model was calibrated with {slots}")
    return tuple(sorted(step % slots for step in steps))
