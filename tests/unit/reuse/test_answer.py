"""Without a stretch the whole answer of a denoiser is kept: nothing of it runs at other steps."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelquant._errors import RecipeError
from reelquant.discover import discover
from reelquant.reuse import BlockReuse, installed_reuse, put, remove_reuse
from tests.families.models import FAMILIES


class Denoiser(nn.Module):
    """Adds its timestep to the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor, str]:
        self.calls += 1
        return x + timestep, "said"


def reusing(model: nn.Module, **options: Any) -> Any:
    stage = BlockReuse(stretch=(), **options)
    known = SimpleNamespace(timestep_argument="timestep", latent_argument="x", blocks=())
    put(model, "blocks", stage, stage.facts(SimpleNamespace(denoiser=model, component="transformer", map=known)))  # type: ignore[arg-type]
    return installed_reuse(model)["blocks"].installed


@torch.no_grad()
def answered(model: nn.Module, *times: float) -> list[float]:
    return [float(model(torch.zeros(1), timestep=torch.tensor(time))[0]) for time in times]


def test_nothing_runs_at_a_step_that_is_reused() -> None:
    model = Denoiser()
    installed = reusing(model, every=2)
    assert answered(model, 9.0, 7.0, 5.0, 3.0) == [9.0, 9.0, 5.0, 5.0]
    assert model.calls == 2 and installed.by_step() == {0: (1, 0), 1: (0, 1), 2: (1, 0), 3: (0, 1)}
    assert installed.parts == ["Denoiser"]
    with torch.no_grad():
        assert model(torch.zeros(1), timestep=torch.tensor(1.0))[1] == "said"


def test_answers_are_forecast() -> None:
    model = Denoiser()
    reusing(model, at=(9.0, 7.0), order=1)
    assert answered(model, 9.0, 7.0, 5.0, 4.0) == pytest.approx([9.0, 7.0, 5.0, 4.0])
    assert model.calls == 2


def test_writing_into_an_answer_changes_no_later_one() -> None:
    model = Denoiser()
    reusing(model, every=3)
    with torch.no_grad():
        for time in (9.0, 7.0):
            model(torch.zeros(1), timestep=torch.tensor(time))[0].zero_()
    assert answered(model, 5.0) == [9.0]


def test_the_signature_stays_and_the_forward_comes_back() -> None:
    model = Denoiser()
    before = inspect.signature(model.forward)
    reusing(model, every=2)
    assert inspect.signature(model.forward) == before
    remove_reuse(model)
    assert answered(model, 9.0, 7.0) == [9.0, 7.0] and "forward" not in vars(model)


def test_a_copy_keeps_answers_of_its_own() -> None:
    model = Denoiser()
    reusing(model, every=2)
    answered(model, 9.0)
    twin = copy.deepcopy(model)
    assert answered(twin, 7.0) == [7.0] and twin.calls == 2 and model.calls == 1
    assert answered(model, 7.0) == [9.0] and model.calls == 1


class Plain(nn.Module):
    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (x + timestep,)


def test_a_compiled_denoiser_gives_the_same_answers() -> None:
    torch._dynamo.reset()
    model = Plain()
    installed = reusing(model, every=2)
    model.compile(backend="eager")
    assert answered(model, 9.0, 7.0, 5.0, 3.0) == [9.0, 9.0, 5.0, 5.0]
    assert installed.counts() == {"computed": 2, "reused": 2}


@pytest.mark.parametrize("options", [{"late": (0.0, 0.5)}, {"profiled": 0.5}])
def test_what_needs_a_stretch_is_refused_without_one(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="without a stretch keeps the whole answer"):
        BlockReuse(stretch=(), **options)


def test_a_unet_has_an_answer_as_well() -> None:
    model = FAMILIES["animatediff"].make()
    facts = BlockReuse(stretch=()).facts(SimpleNamespace(denoiser=model, component="unet", map=discover(model)))  # type: ignore[arg-type]
    assert facts == {"blocks": [""], "keeps": "answer", "timestep": "timestep", "latent": "sample"}
