from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from reelquant.clock import FIRST, NAME, SECOND, Clock, attach, timestep_reader

TIMES = [999.0, 749.0, 499.0, 249.0]


@pytest.mark.parametrize(("timestep", "slot"), [(999, 0), (1000, 0), (875, 0), (873, 1), (499.4, 2), (0, 3), (-5, 3)])
def test_slot_is_the_nearest_stored_timestep(timestep: float, slot: int) -> None:
    clock = Clock(TIMES)
    clock.tick(timestep)
    assert int(clock.slot) == slot
    assert clock.slot.shape == () and clock.slot.dtype == torch.long


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.float32, torch.float64, torch.float16])
def test_stored_timesteps_are_exact_in_every_dtype(kind: torch.dtype) -> None:
    clock = Clock([999.0, 501.0, 250.0])
    for slot, value in enumerate(clock.timesteps.tolist()):
        clock.tick(torch.tensor(value).to(kind))
        assert clock.stored and int(clock.slot) == slot


@pytest.mark.parametrize("fraction", [0.9994, 0.3333, 0.0017])
def test_a_fraction_that_went_through_half_precision_is_exact(fraction: float) -> None:
    clock = Clock([fraction * 1000, 0.5])
    clock.tick(torch.tensor(fraction * 1000).half())
    assert clock.stored and int(clock.slot) == 0


def test_the_next_integer_is_another_timestep() -> None:
    clock = Clock(TIMES)
    for timestep in (998, 1000, 748, 250):
        clock.tick(timestep)
        assert not clock.stored, timestep


def test_zero_is_exact_only_for_zero() -> None:
    clock = Clock([0.0, 1.0])
    clock.tick(0)
    assert clock.stored
    clock.tick(1e-4)
    assert not clock.stored and int(clock.slot) == 0


def test_a_batch_of_equal_timesteps_is_exact_and_of_different_ones_is_not() -> None:
    clock = Clock(TIMES)
    clock.tick(torch.tensor([749, 749, 749]))
    assert clock.stored and int(clock.slot) == 1
    clock.tick(torch.tensor([749, 499]))
    assert not clock.stored and int(clock.slot) == 1


def test_tokens_of_a_given_frame_carry_zero_and_do_not_set_the_slot() -> None:
    clock = Clock(TIMES)
    timestep = torch.full((2, 6), 499.0)
    timestep[:, :2] = 0  # image to video: the first frame is known
    clock.tick(timestep)
    assert int(clock.slot) == 2 and not clock.stored


def test_every_thread_has_pairs_of_its_own() -> None:
    """Two samplers that start from the same noise call the denoiser in turns."""
    clock, latent = Clock(TIMES, pairs="sequential", latent="x"), torch.randn(2, 3)

    def half() -> int:
        clock.tick(999, latent)
        return clock.now().half

    with ThreadPoolExecutor(1) as other:
        assert [half(), other.submit(half).result(), half(), other.submit(half).result()] == [FIRST, FIRST, SECOND, SECOND]


def test_falling_back_is_told_once_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(TIMES)
    with caplog.at_level(logging.WARNING, "reelquant"):
        clock.tick(300)
        assert not caplog.records  # a clock that drives scales only has nothing to tell
        clock.fall_back()
        clock.tick(310)
        clock.fall_back()
    assert [record.getMessage() for record in caplog.records] == [
        "timestep 300 is none of the 4 in the table: temporal layers are computed"
    ]
    mixed = Clock(TIMES)
    with caplog.at_level(logging.WARNING, "reelquant"):
        mixed.tick(torch.tensor([999.0, 0.0]))
        mixed.fall_back()
    assert "timestep 999 is not the only one of its call" in caplog.records[-1].getMessage()


def test_a_cast_leaves_the_timesteps_alone() -> None:
    clock = Clock([999.0, 501.5])
    for cast in (clock.to(torch.bfloat16), clock.half(), clock.double()):
        assert cast.timesteps.dtype == torch.float32 and cast.timesteps.tolist() == [999.0, 501.5] and cast.slot.dtype == torch.long


def test_a_clock_has_no_tensors_in_the_checkpoint_and_survives_no_timesteps() -> None:
    assert Clock(TIMES).state_dict() == {}
    assert Clock([]).timesteps.tolist() == [0.0]
    assert "slots=4" in repr(Clock(TIMES))


class Denoiser(nn.Module):
    def forward(self, sample: Tensor, t: Tensor | int, scale: float = 1.0) -> Tensor:
        return sample * 0 + getattr(self, NAME).slot


def test_the_denoiser_ticks_its_clock_by_position_and_by_keyword() -> None:
    denoiser, clock = Denoiser(), Clock(TIMES)
    handle = attach(denoiser, clock, "t")
    x = torch.ones(2)
    assert denoiser(x, 499).tolist() == [2, 2]
    assert denoiser(x, t=torch.tensor(249)).tolist() == [3, 3]
    assert denoiser(sample=x, t=999.0).tolist() == [0, 0]
    twin = copy.deepcopy(denoiser)
    twin(x, 249)
    assert int(clock.slot) == 0 and int(getattr(twin, NAME).slot) == 3
    handle.remove()
    assert denoiser(x, 249).tolist() == [0, 0]


def test_timesteps_that_a_call_does_not_have_read_as_none() -> None:
    read = timestep_reader(Denoiser(), "t")
    assert read((1, 2), {}) == 2 and read((1,), {"t": 5}) == 5 and read((1,), {}) is None


def test_a_compiled_graph_follows_the_timestep_and_knows_whether_it_is_stored() -> None:
    clock = Clock(TIMES)
    clock.tick(999)
    assert clock.now()[:2] == (0, True)

    def step(timestep: Tensor) -> tuple[Tensor, Tensor]:
        clock.tick(timestep)
        return clock.slot + 0, clock.stored & True

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert compiled(torch.tensor(490.0)) == (2, False) and clock.now()[:2] == (2, False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert compiled(torch.tensor(TIMES[3])) == (3, True) and clock.now()[:2] == (3, True)
