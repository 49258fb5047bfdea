"""The integer program against enumeration, damages by hand, and what is refused."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from reelquant._errors import CalibrationError, RecipeError, UnsupportedError
from reelquant.allocate import Milp
from reelquant.allocate.milp import _unheard, solve
from reelquant.observe import RecordedCall
from reelquant.recipes.recipe import load_recipe, names
from reelquant.solvers import SOLVERS, Nearest
from reelquant.stages import Specs, StageSite
from reelquant.streaming.job import Job
from tests.allocation import Work
from tests.single import one_group, plan_of


def test_three_layers_by_hand() -> None:
    sizes = np.array([[1, 2], [1, 2], [2, 4]])
    damage = np.array([[9.0, 1.0], [5.0, 1.0], [20.0, 2.0]])
    # 4 is the least; 18 are saved for 2 more bytes in layer 2, 8 and 4 for one in layers 0 and 1
    assert solve(damage, sizes, 4) == [0, 0, 0]
    assert solve(damage, sizes, 5) == [1, 0, 0]
    assert solve(damage, sizes, 6) == [0, 0, 1]  # 18 beat 8 + 4
    assert solve(damage, sizes, 7) == [1, 0, 1]
    assert solve(damage, sizes, 8) == [1, 1, 1]


@pytest.mark.parametrize("seed", range(8))
def test_the_optimum_is_that_of_enumeration(seed: int) -> None:
    generator = np.random.default_rng(seed)
    damage = np.sort(generator.lognormal(-12, 3, (7, 3)), axis=1)[:, ::-1]
    sizes = generator.integers(1, 40, (7, 1)) * np.array([[17, 24, 32]])
    budget = 0.6 * sizes[:, 0].sum() + 0.4 * sizes[:, 2].sum()
    rows = np.arange(7)
    every = [list(picks) for picks in itertools.product(range(3), repeat=7) if sizes[rows, list(picks)].sum() <= budget]
    best = min(damage[rows, picks].sum() for picks in every)
    picked = solve(damage, sizes, budget)
    assert sizes[rows, picked].sum() <= budget and damage[rows, picked].sum() == pytest.approx(best, rel=1e-6)


def test_no_damage_at_all_is_solved() -> None:
    assert len(solve(np.zeros((4, 2)), np.ones((4, 2)), 4)) == 4


class Scalar(nn.Module):
    """``weight * x`` in one of several kinds of output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(1, 1, bias=False), kind
        nn.init.constant_(self.layer.weight, 2.0)

    def forward(self, x: Tensor) -> Any:
        y = self.layer.weight * x
        return {"tensor": y, "tuple": (y,), "output": Transformer2DModelOutput(sample=y), "mapping": {"sample": y, "note": None}}[self.kind]


class ScalarWork(Work):
    """Every format with 4 bits makes the weight 3, every other one 2.5."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__((64,))
        self.denoiser = Scalar(kind)
        self.map = one_group(self.denoiser, ["layer"])
        self.specs = {"layer": next(iter(self.specs.values()))}
        inputs = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 0.0, 2.0])]
        self.calls = [RecordedCall((x,), {}, self.denoiser(x), step) for step, x in enumerate(inputs)]

    @contextmanager
    def drafted(self, specs: Mapping[str, Specs]) -> Iterator[None]:
        self.denoiser.layer.weight.data.fill_(3.0 if specs["layer"].weight.format.bits == 4 else 2.5)
        yield
        self.denoiser.layer.weight.data.fill_(2.0)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "output", "mapping"])
def test_damage_by_hand(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    monkeypatch.setattr("reelquant.allocate.milp.solve", lambda damage, sizes, budget: seen.append(damage) or [1])
    work = ScalarWork(kind)
    # bytes of one weight: the code and a bfloat16 scale of its channel
    Milp(formats=("int4/channel", "int8/channel"), bits=24, calls=2).choose_specs(work)
    # call 0: float [2 4 6 8], variance 5; weight 3 errs by [1 2 3 4], mean square 7.5: 1.5
    # call 1: float [0 4 0 4], variance 4; weight 3 errs by [0 2 0 2], mean square 2: 0.5; weight 2.5 errs half as much
    np.testing.assert_allclose(seen[0], [[1.0, 0.25]], rtol=1e-6)
    assert work.advanced == work.announced == 2


def test_calls_are_taken_at_different_steps() -> None:
    work = Work((64, 64))
    inputs = [torch.randn(1, 64) for _ in range(12)]
    work.calls = [RecordedCall((x,), {}, work.denoiser(x), number % 4) for number, x in enumerate(inputs)]  # three runs of four steps
    step_of = {id(call.args[0]): call.step for call in work.calls}
    ran: list[int] = []
    work.denoiser.register_forward_pre_hook(lambda module, args: ran.append(step_of[id(args[0])]))
    Milp(calls=4, bits=5).choose_specs(work)
    assert ran == [0, 1, 2, 3] * 7  # once in float, then two layers with three formats each


def test_all_calls_are_taken_if_there_are_fewer_than_wanted() -> None:
    work = Work((64, 64))
    ran: list[Any] = []
    work.denoiser.register_forward_pre_hook(lambda module, args: ran.append(args))
    Milp(calls=100, bits=5).choose_specs(work)
    assert len(ran) == (2 * 3 + 1) * len(work.calls)


def test_money_left_over_is_told() -> None:
    work = ScalarWork()
    work.layer_bytes = lambda name, specs: 100 if specs.weight.format.bits == 4 else 200
    found = Milp(formats=("int4/channel", "int8/channel"), bits=1200).choose_specs(work)
    assert found["layer"].weight.format.bits == 4
    assert work.warnings == ["milp uses 800.00 of 1200 bits per weight: no better choice of formats fits into the rest"]


@pytest.mark.parametrize("bits", [3.9, 8.5])
def test_a_budget_out_of_reach_is_one_sentence_with_both_ends(bits: float) -> None:
    work = Work((64, 128))
    # rows of 64: 4 bits and a scale of 16 bits per 64 weights; 8 bits and the same
    with pytest.raises(RecipeError, match=rf"milp.bits is {bits}.* take 4\.250 to 8\.250 bits per weight .* on the 2 layers"):
        Milp(bits=bits).choose_specs(work)
    assert not any(work.tried.values())


def test_a_draft_that_breaks_the_model_names_the_layer_and_the_format() -> None:
    work = Work((64, 64))
    work.denoiser.layers[1].register_forward_hook(lambda module, args, output: output / 0 * (0 if work.tried["layers.1"] else 1))
    with pytest.raises(CalibrationError, match=r"NaN or inf with int4 group-64 weights in layer 'layers\.\d'"):
        Milp().choose_specs(work)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["int4/group-64"]}, "two or more different formats"),
        ({"formats": ["int4/channel", "int4/channel"]}, "two or more different formats"),
        ({"formats": ["int4", "int8/channel"]}, "FORMAT/GRANULARITY, as in int4/group-64; got 'int4'"),
        ({"formats": ["int4/token", "int8/channel"]}, "a weight has no tokens"),
        ({"formats": ["int44/channel", "int8/channel"]}, "unknown number format 'int44'; "),
        ({"bits": 0}, "milp.bits is a positive number"),
        ({"calls": 0}, "milp.calls is at least 1"),
        ({"bits": [4.5, 5.0]}, "cannot be a choice of the search"),
        ({"budget": 3}, "has no parameter 'budget'"),
    ],
)
def test_wrong_parameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({"name": "x", "defaults": {"weight": {"format": "int8"}}, "steps": [{"allocate": "milp", **options}]})


def test_two_steps_for_the_same_layers_are_refused() -> None:
    with pytest.raises(RecipeError, match="two allocate steps"):
        load_recipe({"name": "x", "defaults": {"weight": {"format": "int8"}}, "steps": [{"allocate": "milp"}, {"allocate": "milp"}]})


@dataclass(frozen=True)
class EightOnly(Nearest):
    def supports(self, site: StageSite) -> str | None:
        return None if site.specs.weight.format.bits == 8 else "needs 8 bits"


def test_layers_that_cannot_have_the_formats_are_refused_when_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    map_ = one_group(model, ["0"])
    with pytest.raises(UnsupportedError, match=r"layer '0': milp chooses among its own formats.*name one format"):
        plan_of(model, map_, {"format": ["int4", "uint4"]}, None, [{"allocate": "milp"}])
    monkeypatch.setitem(SOLVERS, "eight", EightOnly)
    with pytest.raises(UnsupportedError, match=r"layer '0': with int4 group-64 weights, as milp may choose: needs 8 bits"):
        plan_of(model, map_, {"format": "int8"}, None, [{"solve": "eight"}, {"allocate": "milp"}])
    assert plan_of(model, map_, {"format": "int8"}, None, [{"solve": "nearest"}, {"allocate": "milp"}]).quantized


def test_streaming_refuses_with_a_sentence() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    plan = plan_of(model, one_group(model, ["0"]), {"format": "int8"}, None, [{"allocate": "milp"}])
    with pytest.raises(UnsupportedError, match="needs the model in memory, because 'allocate: milp' calls the whole denoiser"):
        Job(None, {"transformer": plan}, None, {}, 0).check()


def test_the_library_recipe_says_what_it_does() -> None:
    assert "mixed-w4.5a8" in names()
    entry = next(entry for entry in load_recipe("mixed-w4.5a8").entries if entry.axis == "allocate")
    assert entry.stage == Milp(formats=("int4/group-64", "int6/channel", "int8/channel"), bits=4.5)
    assert entry.on == "*" and entry.stage.records == 4


@pytest.mark.skipif(os.name != "posix", reason="C's standard output is found by another name")
def test_notes_that_c_prints_while_it_solves_are_not_heard(capfd: pytest.CaptureFixture[str]) -> None:
    puts = ctypes.CDLL(None).puts
    with _unheard():
        puts(b"a note")
    puts(b"a result")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "a result\n"
