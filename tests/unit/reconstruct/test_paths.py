"""Where errors of outputs lead: shares of a sampler that is known, and the error of a run worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelquant._errors import RecipeError
from reelquant.observe import RecordedCall
from reelquant.reconstruct import StraightThrough
from reelquant.reconstruct.objective import OfOutputs, OfPaths, of_paths
from reelquant.reconstruct.paths import paths
from reelquant.stages import BlockWork

SCALE, MOVES = 3.0, (0.5, 0.3, 0.2)
SHAPE = (2, 4, 5)


def outputs(latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What a made-up denoiser gives with and without the text."""
    first = -latents + torch.randn(SHAPE, generator=generator)
    return first, first + 0.1 * torch.randn(SHAPE, generator=generator)


def recorded(runs: int, *, batched: bool = False, shrink: float = 1.0) -> list[RecordedCall]:
    """Calls of a sampler ``x' = shrink x + move (u + 3 (c - u))``."""
    generator, calls = torch.Generator().manual_seed(0), []
    for _ in range(runs):
        latents = torch.randn(SHAPE, generator=generator)
        for step, move in enumerate(MOVES):
            with_text, without = outputs(latents, generator)
            if batched:
                calls.append(RecordedCall((torch.cat([latents] * 2),), {}, torch.cat([without, with_text]), step))
            else:
                calls += [RecordedCall((latents,), {}, output, step) for output in (with_text, without)]
            latents = shrink * latents + move * (without + SCALE * (with_text - without))
    return calls


@pytest.mark.parametrize("shrink", [1.0, 0.7])
def test_shares_are_those_of_the_sampler_and_the_last_step_moves_as_the_one_before(shrink: float) -> None:
    first, second = paths(recorded(2, shrink=shrink))
    assert list(first.shares) == list(range(6)) and list(second.shares) == list(range(6, 12))
    wanted = [share for move in (0.5, 0.3, 0.3) for share in (SCALE * move, (1 - SCALE) * move)]
    assert [share for (share,) in first.shares.values()] == pytest.approx(wanted, rel=1e-3)


def test_a_call_that_holds_both_halves_has_a_share_for_each() -> None:
    first, _ = paths(recorded(2, batched=True))
    assert first.shares[0] == pytest.approx(((1 - SCALE) * 0.5, SCALE * 0.5), rel=1e-3)
    error = torch.cat([torch.ones(SHAPE), torch.zeros(SHAPE)])
    assert torch.allclose(first.moved(0, error), torch.full(SHAPE, -1.0), rtol=1e-3)


def test_missing_calls_and_samplers_that_look_back_give_no_paths() -> None:
    assert paths(recorded(2)[:-1]) == [] and paths([]) == []
    calls = recorded(4)
    shuffled = [RecordedCall((torch.randn(SHAPE),), {}, call.output, call.step) for call in calls]
    assert paths(shuffled) == []


class Off(nn.Module):
    """Gives the recorded outputs, each with an error of its own."""

    def __init__(self, calls: Sequence[RecordedCall], errors: Sequence[float]) -> None:
        super().__init__()
        self.calls, self.errors = calls, errors

    def forward(self, latents: Tensor, number: int) -> Tensor:
        return self.calls[number].output + self.errors[number]


def block_of(calls: Sequence[RecordedCall], errors: Sequence[float], warn: Any = lambda sentence: None) -> BlockWork:
    numbered = [RecordedCall((*call.args, number), {}, call.output, call.step) for number, call in enumerate(calls)]
    return BlockWork("", Off(calls, errors), {}, lambda quantized: numbered, warn=warn)


def test_errors_that_are_alike_add_up_and_halves_that_err_alike_cancel() -> None:
    calls = recorded(2)
    alike = block_of(calls, [0.1] * 12)
    objective = OfPaths(alike, alike.calls(True), paths(calls))
    shares = [SCALE * 0.5, -2 * 0.5, SCALE * 0.3, -2 * 0.3, SCALE * 0.3, -2 * 0.3]
    total, alone = sum(shares) * 0.1, sum((share * 0.1) ** 2 for share in shares)
    assert objective.held_out_error() == pytest.approx(total**2 + alone, rel=1e-3)
    apart = block_of(calls, [0.1, -0.1] * 6)
    assert OfPaths(apart, apart.calls(True), paths(calls)).held_out_error() > 5 * objective.held_out_error()


def test_a_loss_knows_the_errors_of_the_other_calls_of_its_run() -> None:
    calls = recorded(2)
    block = block_of(calls, [0.1] * 12)
    objective = OfPaths(block, block.calls(True), paths(calls))
    objective.begin()
    assert list(objective.trained) == list(range(6))
    moved, first = 0.1 * (1.1 - 1.5), 0.15  # all others together, and the first call as it was
    start = (0.1 * 1.1) ** 2 + sum((0.1 * share) ** 2 for share in (1.5, 1.0, 0.9, 0.6, 0.9, 0.6))
    assert float(objective.loss(0, calls[0].output + 0.1)) == pytest.approx(((moved + first) ** 2 + first**2) / start, rel=1e-3)
    assert float(objective.loss(0, calls[0].output)) == pytest.approx(moved**2 / start, rel=1e-3)
    assert float(objective.loss(2, calls[2].output + 0.1)) == pytest.approx((moved**2 + 0.09**2) / start, rel=1e-3)


def test_without_whole_runs_every_call_counts_alike_and_a_warning_says_so() -> None:
    told: list[str] = []
    block = block_of(recorded(2)[:-1], [0.1] * 12, told.append)
    assert isinstance(of_paths(block, block.calls(True)), OfOutputs)
    assert len(told) == 1 and "raise calls" in told[0]


def test_paths_are_of_the_whole_denoiser() -> None:
    with pytest.raises(RecipeError, match="scope: model"):
        StraightThrough(error="path")
    assert StraightThrough(error="path", scope="model").error == "path"
