"""Errors as guidance makes them count, and steps that count alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from reelquant._errors import RecipeError
from reelquant.clock import ANY, BOTH, FIRST, SECOND
from reelquant.reconstruct import AdaRound, Scales
from reelquant.reconstruct.error import output_error, split
from reelquant.reconstruct.guided import as_one, guided_error, units_of
from reelquant.reconstruct.soft import soften
from reelquant.stages import BlockWork, RecordedCall
from tests.unit.reconstruct.pieces import block

WANTED = torch.tensor([[1.0, -1.0], [3.0, -3.0]])  # the first half of a pair, and the second one


def call(half: int, output: Any = WANTED, step: int = 0) -> RecordedCall:
    return RecordedCall((), {}, output, step, half)


@pytest.mark.parametrize("scale", [1.0, 2.0, 5.0])
def test_the_error_is_that_of_guidance_from_either_half(scale: float) -> None:
    first, second = torch.tensor([[0.5, 0.1]]), torch.tensor([[-0.2, 0.3]])
    found = WANTED + torch.cat([first, second])
    made = [one + scale * (other - one) for one, other in ((first, second), (second, first))]
    expected = torch.cat(made).square().mean() / WANTED.var(correction=0)
    assert float(guided_error(found, call(BOTH), scale)) == pytest.approx(float(expected), rel=1e-5)


def test_what_is_no_pair_has_its_plain_error() -> None:
    found = WANTED + torch.tensor([[0.5, 0.1], [-0.2, 0.3]])
    plain = output_error(found, WANTED)
    assert torch.equal(guided_error(found, call(BOTH), 1.0), plain)
    for half in (ANY, FIRST, SECOND):
        assert torch.equal(guided_error(found, call(half), 5.0), plain)
    odd = torch.randn(3, 4)
    assert torch.equal(guided_error(odd + 1, call(BOTH, odd), 5.0), output_error(odd + 1, odd))


def test_no_error_has_a_gradient() -> None:
    found = WANTED.clone().requires_grad_()
    guided_error(found, call(BOTH), 5.0).backward()
    assert found.grad is not None and not found.grad.any()


def test_halves_that_are_calls_of_their_own_are_pairs() -> None:
    halves = [(FIRST, 0), (SECOND, 0), (SECOND, 1), (FIRST, 1), (FIRST, 2), (SECOND, 2), (FIRST, 3), (SECOND, 4), (BOTH, 5), (ANY, 6)]
    assert units_of([call(half, step=step) for half, step in halves]) == [(0, 1), (2,), (3,), (4, 5), (6,), (7,), (8,), (9,)]


def test_a_pair_of_calls_counts_like_one_call_that_makes_both() -> None:
    found = WANTED + torch.tensor([[0.5, 0.1], [-0.2, 0.3]])
    apart = [call(FIRST, (WANTED[:1], "word")), call(SECOND, (WANTED[1:], "word"))]
    together = as_one(apart, [(found[:1], "word"), (found[1:], "word")])
    assert torch.equal(guided_error(*together, 5.0), guided_error(found, call(BOTH), 5.0))
    alone = as_one(apart[:1], [found[:1]])
    assert alone[1] is apart[0] and alone[0] is not None


def paired(start: BlockWork) -> BlockWork:
    """The block with its calls as pairs of halves."""
    calls = [replace(one, half=(FIRST, SECOND)[number % 2], step=number // 2) for number, one in enumerate(start.calls(True))]
    return replace(start, calls=lambda quantized: calls)


def test_guided_errors_of_held_out_pairs_fall() -> None:
    stage, start = AdaRound(iterations=150, calls=24, guidance=5.0, unit="own", weight=30.0), paired(block(count=24))
    calls, (_, held_out) = start.calls(True), split(12)
    before = stage._errors(start, calls, held_out)
    solutions = stage.solve_block(start)
    again, soft = soften(paired(block(count=24)))
    for path, solution in solutions.items():
        soft[path].take(solution)
    assert set(solutions) == {"first", "second"} and stage._mean(stage._errors(again, calls, held_out), before) < 0.7


def test_in_its_own_unit_a_call_of_small_errors_counts_as_much() -> None:
    """Two calls that pull one scale to either side: in the mean error's unit the larger one decides, else both."""
    errors = {0: 1.0, 1: 0.01}
    even, own = AdaRound(), AdaRound(unit="own")
    assert even._counted(errors) == pytest.approx({0: 0.505, 1: 0.505}) and own._counted(errors) == errors
    better = {0: 0.9, 1: 0.02}  # the small one twice as large as before
    assert even._mean(better, errors) < even._mean(errors, errors) == pytest.approx(1)
    assert own._mean(better, errors) > own._mean(errors, errors) == pytest.approx(1)


def test_only_guidance_asks_for_halves() -> None:
    assert not Scales().reads_halves and Scales(guidance=3.0).reads_halves


@pytest.mark.parametrize(("options", "said"), [({"guidance": 0.5}, "at least 1"), ({"unit": "owm"}, "did you mean 'own'")])
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        AdaRound(**options)
