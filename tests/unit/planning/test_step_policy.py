"""Protected steps in the words of other programs."""

from __future__ import annotations

from typing import Any

import pytest

from reelquant._errors import CheckpointError, RecipeError
from reelquant.checkpoint.stored import Slots, Stored
from reelquant.policies.step_policy import protected_slots, read_policy, written_policy
from reelquant.recipes.recipe import load_recipe

POLICY: dict[str, Any] = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "first_steps": {"count": 3, "mode": "a16"},
    "last_steps": {"count": 2, "mode": "a16"},
}
RUNTIME = {"diffusion_step_policy": POLICY}
TIMES = tuple(float(999 - 100 * step) for step in range(8))


def test_a_policy_is_a_recipes_protected_steps() -> None:
    assert read_policy(RUNTIME) == {"steps": [0, 1, 2, -2, -1], "inputs": "float"}
    stage = load_recipe({"extends": "minmax-w8a8", "protect_steps": POLICY}).entries[-1].stage
    assert stage.steps == (0, 1, 2, -2, -1) and stage.inputs == "float"


def test_what_was_read_is_written_the_same() -> None:
    assert written_policy({"protect_steps": read_policy(POLICY)}) == {"runtime": RUNTIME}
    assert written_policy({"protect_steps": POLICY}) == {"runtime": RUNTIME}
    assert written_policy({"protect_steps": [-1]})["runtime"]["diffusion_step_policy"]["first_steps"]["count"] == 0


@pytest.mark.parametrize("steps", ["auto", [1, 2], [0, -2], {"steps": [0], "inputs": "8-bit"}, None])
def test_what_the_policy_cannot_say_is_not_written(steps: Any) -> None:
    assert written_policy({"protect_steps": steps}) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, "schema_version is 2, and only 1 can be followed"),
        ({"type": "every_n"}, "type is 'every_n'"),
        ({"last_steps": {"count": 2, "mode": "a8"}}, "last_steps.mode is 'a8'"),
        ({"first_steps": {"count": -1, "mode": "a16"}}, "first_steps.count is a number of steps"),
        ({"middle": 3}, "says 'middle'"),
        ({"first_steps": {"count": 0, "mode": "a16"}, "last_steps": {"count": 0, "mode": "a16"}}, "protects no step"),
    ],
)
def test_a_policy_that_cannot_be_followed_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        read_policy(POLICY | change)


def stored(**more: Any) -> dict[str, Any]:
    content = Stored({}, {}, slots=Slots(TIMES, "timestep"), recipe={"protect_steps": POLICY}).to_json()
    return content | more


def test_a_checkpoint_whose_policy_protects_steps_protects_them() -> None:
    assert "runtime" not in stored()  # no slot is protected, whatever the recipe says: another expert has these steps
    found = Stored.from_json(stored(runtime=RUNTIME))
    assert found.slots is not None and found.slots.protected == (0, 1, 2, 6, 7)
    assert found.to_json()["runtime"] == RUNTIME
    assert Stored.from_json(found.to_json()).slots == found.slots


def test_slots_of_a_checkpoint_go_before_its_policy() -> None:
    slots = Slots(TIMES, "timestep", (0,)).to_json()
    found = Stored.from_json(stored(slots=slots, runtime=RUNTIME))
    assert found.slots is not None and found.slots.protected == (0,)


def test_a_broken_policy_names_its_place() -> None:
    with pytest.raises(CheckpointError, match=r"quantization_config.runtime: diffusion_step_policy.type is 'odd'"):
        Stored.from_json(stored(runtime={"diffusion_step_policy": POLICY | {"type": "odd"}}))
    with pytest.raises(RecipeError, match="protects 5 steps, and the model was calibrated with 4"):
        protected_slots(POLICY, 4)
