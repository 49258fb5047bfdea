"""A stretch of blocks whose change is reused: which blocks, at which steps, by which trajectory."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reelquant._errors import RecipeError, UnsupportedError
from reelquant.discover import discover
from reelquant.reuse import BlockReuse, installed_reuse
from reelquant.reuse.criteria import content
from reelquant.reuse.installed import InstalledBlocks
from reelquant.reuse.magnitude import computed_at
from reelquant.reuse.planned import recorded
from reelquant.reuse.plans import Errors
from reelquant.reuse.profile import differences
from reelquant.reuse.schedule import Schedule
from reelquant.reuse.stretch import Stretch
from reelquant.reuse.trajectory import Trajectory
from reelquant.sites import DenoiserMap
from tests.families.models import FAMILIES

FACTS = {"blocks": ["blocks.1", "blocks.2"], "timestep": "timestep", "latent": "x"}


class Block(nn.Module):
    """Adds a tenth of the timestep, times its own number: the change of a block is known by hand."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.number * timestep / 10


class Denoiser(nn.Module):
    """Four blocks; the output is ``x + (1 + 2 + 3 + 4) * timestep / 10``."""

    def __init__(self, kind: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind(number) for number in range(1, 5))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, timestep=timestep)
        return x


def work(model: nn.Module, blocks: tuple[str, ...], **names: Any) -> Any:
    return SimpleNamespace(denoiser=model, component="transformer", map=DenoiserMap("Denoiser", {}, (), blocks, **names))


def blocks_of(count: int, stage: BlockReuse) -> list[str]:
    """The numbers of the blocks in the stretch."""
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Identity() for _ in range(count))
    facts = stage.facts(work(model, tuple(f"blocks.{number}" for number in range(count))))
    return [name.removeprefix("blocks.") for name in facts["blocks"]]


def installed(**options: Any) -> tuple[Denoiser, InstalledBlocks]:
    model = Denoiser()
    return model, BlockReuse(**options).install(model, FACTS)


@torch.no_grad()
def added(model: nn.Module, timestep: float, x: Tensor | None = None) -> float:
    """What the model adds to its latents."""
    x = torch.zeros(1) if x is None else x
    return float((model(x, torch.tensor(timestep)) - x)[0])


# --- parameters and facts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "numbers"), [(2, "01"), (3, "012"), (4, "12"), (6, "1234"), (8, "2345")])
def test_the_stretch_is_the_middle_half(count: int, numbers: str) -> None:
    assert blocks_of(count, BlockReuse()) == list(numbers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "1 or more, got 0 and 1"),
        ({"first": 0}, "1 or more, got 2 and 0"),
        ({"stretch": (0.5, 0.5)}, r"start and an end, like \[0.25, 0.75\], got \[0.5, 0.5\]"),
        ({"stretch": (0.0, 1.5)}, r"got \[0.0, 1.5\]"),
        ({"stretch": (0.5,)}, r"got \[0.5\]"),
        ({"order": 3}, r"0 \(the last result\), 1 \(a line\) or 2 \(a parabola\), got 3"),
        ({"fitted": (8.0, 1.0, 1.0)}, "a timestep and 1 weights for every step, 2 numbers each, got 3 numbers"),
        ({"late": (0.5, 0.25)}, r"'late' of reuse 'blocks' is a start and an end, like \[0.25, 0.75\], got \[0.5, 0.25\]"),
        ({"threshold": -0.1}, "a relative change like 0.1, or 0 for none, got -0.1"),
        ({"threshold": float("nan")}, "or 0 for none, got nan"),
        ({"threshold": 0.1, "criterion": "sums"}, "unknown 'criterion' of reuse 'blocks': 'sums'; did you mean 'sum'"),
        ({"criterion": "sum"}, "belongs to a threshold, and there is none; add one, or drop sum"),
        ({"magnitude": -1.0}, "the cost of a pause like 0.06, or 0 for none, got -1.0"),
        ({"magnitude": 0.1, "at": (2.0, 1.0)}, "plans a schedule of its own; drop 'at'"),
        ({"boundary": 1.0}, "between 0 and 1, got 1.0"),
        ({"profiled": 1.5}, "a share of the blocks, 0 to 1, got 1.5"),
        ({"profiled": 0.5, "late": (0.0, 0.5)}, r"takes the place of stretches; drop it, or 'late': \[0.0, 0.5\]"),
        ({"budget": 1.5}, "a share of the steps, above 0 and up to 1, or 0 for none, got 1.5"),
        ({"budget": 0.5, "at": (2.0, 1.0)}, "plans when one stretch is computed; drop it, or 'at'"),
        ({"at": (1.0, 2.0)}, r"from the largest to the smallest, each once, got \[1.0, 2.0\]"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        BlockReuse(**options)


def test_a_stretch_of_one_block_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"two blocks or more, and the stretch \[0.0, 0.25\] of the 4 blocks of Denoiser holds 1"):
        blocks_of(4, BlockReuse(stretch=(0.0, 0.25)))


def test_a_component_without_timestep_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="follows the timestep, and 'transformer' has none"):
        BlockReuse().facts(work(Denoiser(), ("blocks.0", "blocks.1"), timestep_argument=None))


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("latte", ["transformer_blocks.0", "temporal_transformer_blocks.0", "transformer_blocks.1", "temporal_transformer_blocks.1"]),
        ("animatediff", ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]),
        ("wan-2.1", None),
    ],
)
def test_without_a_chain_of_blocks_the_output_of_each_is_kept(family: str, blocks: list[str] | None) -> None:
    model = FAMILIES[family].make()
    facts = BlockReuse(stretch=(0.0, 1.0)).facts(SimpleNamespace(denoiser=model, component="transformer", map=discover(model)))
    assert facts["keeps"] == ("outputs" if blocks else "change")
    assert facts["blocks"] == (blocks or [f"blocks.{number}" for number in range(len(model.blocks))])


# --- steps and trajectories ---------------------------------------------------------------------------------------------------------


def test_a_reused_change_is_that_of_the_step_before() -> None:
    model, reuse = installed()
    assert added(model, 10.0) == pytest.approx(10.0)  # all four blocks: 1 + 2 + 3 + 4
    assert added(model, 8.0) == pytest.approx(0.8 * (1 + 4) + 1.0 * (2 + 3))  # the first and the last block are computed
    assert added(model, 6.0) == pytest.approx(6.0)
    assert added(model, 4.0) == pytest.approx(0.4 * (1 + 4) + 0.6 * (2 + 3))
    assert reuse.counts() == {"computed": 2, "reused": 2}


def test_a_rising_timestep_begins_a_new_trajectory() -> None:
    model, reuse = installed()
    first = [added(model, time) for time in (10.0, 8.0, 6.0)]
    assert [added(model, time) for time in (10.0, 8.0, 6.0)] == first
    assert reuse.counts() == {"computed": 4, "reused": 2}


@pytest.mark.parametrize("other", [torch.zeros(2), torch.zeros(1, dtype=torch.float64)])
def test_other_latents_begin_a_new_trajectory(other: Tensor) -> None:
    model, reuse = installed()
    added(model, 10.0)
    assert added(model, 8.0, other) == pytest.approx(8.0)
    assert reuse.counts() == {"computed": 2, "reused": 0}


def test_both_calls_of_a_step_have_changes_of_their_own() -> None:
    class Sided(Block):
        side = 1.0

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return x + self.side * self.number * timestep / 10

    model = Denoiser(Sided)
    reuse = BlockReuse().install(model, FACTS)

    def both(time: float) -> list[float]:
        found = []
        for Sided.side in (1.0, -3.0):
            found.append(added(model, time))
        return found

    assert both(10.0) == pytest.approx([10.0, -30.0])
    assert both(8.0) == pytest.approx([9.0, -27.0])
    assert reuse.counts() == {"computed": 2, "reused": 2}


def test_other_latents_at_the_same_timestep_are_another_clip() -> None:
    model, reuse = installed()
    for start in (0.0, 1.0):  # the first clip was interrupted after one step
        added(model, 10.0, torch.full((1,), start))
    assert added(model, 8.0) == pytest.approx(9.0)
    assert reuse.counts() == {"computed": 2, "reused": 1}


def test_a_call_that_was_not_made_at_the_step_before_is_computed() -> None:
    model, reuse = installed()
    added(model, 10.0)
    assert [added(model, 8.0), added(model, 8.0)] == pytest.approx([9.0, 8.0])
    assert reuse.counts() == {"computed": 2, "reused": 1}


def test_every_thread_has_a_trajectory_of_its_own() -> None:
    model, _ = installed()
    with ThreadPoolExecutor(1) as other:
        assert added(model, 10.0) == pytest.approx(10.0)
        assert other.submit(added, model, 8.0).result() == pytest.approx(8.0)
        assert added(model, 8.0) == pytest.approx(9.0)


def test_reset_frees_what_is_kept() -> None:
    model, reuse = installed()
    added(model, 10.0)
    reuse.reset()
    assert added(model, 8.0) == pytest.approx(8.0)
    assert reuse.counts() == {"computed": 1, "reused": 0}


def test_a_call_with_gradients_computes_everything() -> None:
    model, reuse = installed()
    added(model, 10.0)
    x = torch.zeros(1, requires_grad=True)
    output = model(x, torch.tensor(8.0))
    output.backward()
    assert float(output.detach()) == pytest.approx(8.0) and float(x.grad) == 1.0
    assert reuse.counts() == {"computed": 2, "reused": 0}


def test_an_early_end_of_a_call_leaves_nothing_behind() -> None:
    model, _ = installed()
    added(model, 10.0)
    handle = model.blocks[2].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        added(model, 8.0)
    handle.remove()
    assert added(model, 10.0) == pytest.approx(10.0) and added(model, 8.0) == pytest.approx(9.0)


# --- copies, wrappers, compilers ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_copied_block_computes() -> None:
    model, _ = installed()
    added(model, 10.0)
    block = copy.deepcopy(model.blocks[1])
    assert block.forward.__self__.block is block
    assert float(block(torch.zeros(1), torch.tensor(8.0))) == pytest.approx(1.6)


def test_copies_and_pickles_start_over() -> None:
    model, reuse = installed()
    model.reuse = reuse
    added(model, 10.0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [added(twin, time) for time in (8.0, 6.0)] == pytest.approx([8.0, 0.6 * 5 + 0.8 * 5])
        assert twin.reuse.counts() == {"computed": 1, "reused": 1}
        twin.reuse.remove()
        assert "forward" not in vars(twin.blocks[1]) and not twin._forward_pre_hooks and not twin._forward_pre_hooks_with_kwargs
    assert reuse.counts() == {"computed": 1, "reused": 0}


def test_a_forward_that_was_replaced_before_comes_back() -> None:
    model = Denoiser()
    before = model.blocks[1].forward = lambda x, timestep: x + 7
    reuse = BlockReuse().install(model, FACTS)
    assert added(model, 10.0) == pytest.approx(10.0 - 2.0 + 7.0)
    reuse.remove()
    assert model.blocks[1].forward is before and "forward" not in vars(model.blocks[2])


def test_a_forward_that_was_wrapped_later_computes_after_removal() -> None:
    model, reuse = installed()
    inner = model.blocks[1].forward
    model.blocks[1].forward = lambda *args, **kwargs: inner(*args, **kwargs)
    reuse.remove()
    assert [added(model, time) for time in (10.0, 8.0)] == pytest.approx([10.0, 8.0])


@pytest.mark.parametrize("whole", [True, False], ids=["model", "blocks"])
def test_compiled_models_reuse_the_same_way(whole: bool) -> None:
    model, reuse = installed()
    torch._dynamo.reset()
    if whole:
        model.compile(backend="eager")
    else:
        for block in model.blocks:
            block.compile(backend="eager")
    assert [added(model, time) for time in (10.0, 8.0, 6.0)] == pytest.approx([10.0, 9.0, 6.0])
    assert reuse.counts() == {"computed": 2, "reused": 1}


def test_a_cache_of_diffusers_is_refused() -> None:
    model, _ = installed()
    model.is_cache_enabled = True
    with pytest.raises(UnsupportedError, match=r"Denoiser reuses blocks already; call disable_cache\(\)"):
        added(model, 10.0)


# --- how blocks are wired -----------------------------------------------------------------------------------------------------------


class Mixed(Block):
    """Gives a dictionary."""

    def forward(self, x: Tensor, timestep: Tensor) -> Any:
        return {"x": x}


class WithNone(Block):
    """Gives something beside a tensor."""

    def forward(self, x: Tensor, timestep: Tensor) -> Any:
        return (x, None) if self.number == 2 else x


class Between(Denoiser):
    """Something is added between two blocks, as control networks do."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x + 1, timestep=timestep)
        return x


class Wider(Block):
    """The stretch doubles the width."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.cat([x, x]) if self.number == 2 else x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Between(), "'blocks.2' does not take all that the block before it gives"),
        (Denoiser(Wider), "'blocks.2' does not give tensors like those that the first block of the stretch takes"),
        (Denoiser(WithNone), "'blocks.1' gives Tensor, NoneType, and only tensors"),
        (Denoiser(Mixed), "'blocks.1' gives dict, and only tensors"),
    ],
)
def test_blocks_that_are_no_chain_are_refused_at_the_first_call(model: nn.Module, message: str) -> None:
    BlockReuse().install(model, FACTS)
    with pytest.raises(UnsupportedError, match=message):
        added(model, 10.0)


@pytest.mark.parametrize("keeps", ["change", "outputs"])
@pytest.mark.parametrize(
    ("order", "times", "expected"),
    [
        (0, [10.0, 8.0], 0.8 * 5 + 1.0 * 5),
        (1, [10.0, 8.0, 6.0, 4.0], 4.0),  # what blocks add is linear in the timestep, so a line through two steps is right
        (2, [10.0, 8.0, 6.0, 4.0], 4.0),  # with two steps behind it, a parabola is a line
    ],
)
def test_a_forecast_is_the_polynomial_through_the_last_steps(keeps: str, order: int, times: list[float], expected: float) -> None:
    model = Denoiser()
    reuse = BlockReuse(every=4, first=len(times) - 1, order=order).install(model, FACTS | {"keeps": keeps})
    if keeps == "outputs":  # what a block gives is kept, so the first block's change of this step is lost behind the stretch
        expected = {0: 0.4 * 0 + 0.8 * 4 + (1 + 5) * 1.0, 1: expected, 2: expected}[order]
    assert [added(model, time) for time in times][-1] == pytest.approx(expected)
    assert reuse.counts() == {"computed": len(times) - 1, "reused": 1}


def test_fitted_weights_take_the_place_of_the_polynomial_where_there_are_some() -> None:
    model = Denoiser()
    options: dict[str, Any] = {"at": (10.0, 8.0), "order": 1, "fitted": (6.0, -0.5, 2.0)}
    reuse = BlockReuse(**options).install(model, FACTS)
    found = [added(model, time) for time in (10.0, 8.0, 6.0, 4.0)]
    assert found[2] == pytest.approx(0.6 * 5 + 2.0 * 4.0 - 0.5 * 5.0)  # the stretch added 5 at 10 and 4 at 8
    assert found[3] == pytest.approx(4.0)  # no weights are known for 4: a line
    assert reuse.counts() == {"computed": 2, "reused": 2}


def test_fitted_weights_of_fewer_results_are_the_last_ones() -> None:
    model = Denoiser()
    BlockReuse(at=(10.0,), order=1, fitted=(8.0, 0.0, 0.9)).install(model, FACTS)
    assert [added(model, time) for time in (10.0, 8.0)][-1] == pytest.approx(0.8 * 5 + 0.9 * 5)


def test_a_schedule_in_timesteps_serves_any_number_of_steps() -> None:
    model = Denoiser()
    reuse = BlockReuse(at=(10.0, 6.0)).install(model, FACTS)
    assert [added(model, time) for time in (10.0, 8.0, 6.0, 4.0)] == pytest.approx([10.0, 9.0, 6.0, 5.0])
    reuse.reset()
    for time in (10.0, 7.0, 5.0, 3.0):  # 5 is the first that reaches 6
        added(model, time)
    assert reuse.counts() == {"computed": 2, "reused": 2}


@pytest.mark.parametrize(("threshold", "computed"), [(0.0, 1), (0.35, 2), (0.15, 4)])
def test_a_stretch_is_computed_where_what_enters_it_has_changed(threshold: float, computed: int) -> None:
    model = Denoiser()
    reuse = BlockReuse(every=9, threshold=threshold).install(model, FACTS)
    for time in (10.0, 8.0, 6.0, 4.0):  # what enters the stretch is a tenth of the timestep: 20, 40 and 60 % below the first
        added(model, time, torch.zeros(1, 1, 1))
    assert reuse.counts() == {"computed": computed, "reused": 4 - computed}


@pytest.mark.parametrize(("criterion", "computed"), [("change", [0, 3, 5]), ("sum", [0, 2, 3, 5])])
def test_changes_are_added_up_or_counted_from_the_last_computed_step(criterion: str, computed: list[int]) -> None:
    """What enters the stretch comes back to where it was at the third step, which only their sum takes for a change."""
    seen = [1.0, 0.8, 1.0, 0.6, 0.6, 1.0]
    stretch, trajectory = Stretch(Schedule(9), 0, threshold=0.3, criterion=criterion), Trajectory(10.0, torch.zeros(1))
    found = []
    for step, value in enumerate(seen):
        trajectory.step, stretch.now.trajectory = step, trajectory
        stretch.begin()
        stretch.enter({0: torch.full((1, 1, 1), value)}, lambda _: True)
        found += [] if stretch.running.reuses else [step]
    assert found == computed


def test_content_is_what_the_filter_leaves_of_the_latents() -> None:
    """Noise alone is left out at the start; at the end all is content; in between low frequencies weigh most."""
    steps = torch.arange(8.0)
    slow, fast = (torch.cos(2 * torch.pi * steps * waves / 8).expand(1, 1, 8, 8) for waves in (1, 4))
    at = {time: [content({}, _at(time, wave)) for wave in (slow, fast)] for time in (10.0, 5.0, 0.0)}
    assert all(float(one.abs().max()) == 0 for one in at[10.0])
    assert all(torch.allclose(one, wave, atol=1e-6) for one, wave in zip(at[0.0], (slow, fast), strict=True))
    kept = [float((one * wave).sum() / wave.square().sum()) for one, wave in zip(at[5.0], (slow, fast), strict=True)]
    assert 0.5 < kept[0] < 1 and kept[1] < kept[0] / 2


def _at(timestep: float, latent: Tensor) -> Trajectory:
    trajectory = Trajectory(10.0, latent)
    trajectory.timestep = timestep
    return trajectory


def test_every_call_of_a_step_is_compared_with_its_own() -> None:
    model = Denoiser()
    reuse = BlockReuse(every=9, threshold=0.5).install(model, FACTS)
    for time in (10.0, 9.0):
        for _ in range(2):
            added(model, time, torch.zeros(1, 1, 1))
    assert reuse.counts() == {"computed": 2, "reused": 2}


def test_late_in_a_trajectory_another_stretch_takes_over() -> None:
    model = Denoiser()
    reuse = BlockReuse(every=9, late=(0.0, 0.5)).install(model, FACTS | {"late": ["blocks.0", "blocks.1", "blocks.2"]})
    assert added(model, 10.0) == pytest.approx(10.0)
    assert added(model, 6.0) == pytest.approx(0.6 * (1 + 4) + 1.0 * (2 + 3))
    assert added(model, 5.0) == pytest.approx(5.0)  # half of the first timestep: nothing is known of the late stretch yet
    assert added(model, 4.0) == pytest.approx(0.4 * 4 + 0.5 * (1 + 2 + 3))
    assert reuse.counts() == {"computed": 2, "reused": 2}
    assert reuse.by_step() == {0: (1, 0), 1: (0, 1), 2: (1, 0), 3: (0, 1)} and reuse.parts == ["blocks.1", "blocks.2", "blocks.0"]
    assert added(model, 10.0) == pytest.approx(10.0)  # another clip: the early one again
    reuse.remove()
    assert added(model, 6.0) == pytest.approx(6.0)


class Steps:
    """What a reuse asks of the engine: held-out clips of a denoiser whose last block but one changes least."""

    def __init__(self) -> None:
        self.denoiser = Denoiser()
        for block, number in zip(self.denoiser.blocks, (4, 3, 1, 2), strict=True):
            block.number = number
        self.map = DenoiserMap(
            "Denoiser", {}, (), tuple(f"blocks.{n}" for n in range(4)), timestep_argument="timestep", latent_argument="x"
        )
        self.component, self.timesteps = "transformer", [10.0, 8.0, 6.0]

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def held_out_latents(self) -> None:
        for time in (*self.timesteps, *self.timesteps):  # two clips
            added(self.denoiser, time)

    @contextmanager
    def timed(self, phase: str, total: int) -> Iterator[None]:
        yield


@pytest.mark.parametrize(
    ("share", "runs"), [(0.25, [["blocks.2"]]), (0.5, [["blocks.2", "blocks.3"]]), (0.75, [["blocks.1", "blocks.2", "blocks.3"]])]
)
def test_profiled_are_the_blocks_that_change_least_from_step_to_step(share: float, runs: list[list[str]]) -> None:
    steps = Steps()
    facts = BlockReuse(profiled=share).facts(steps)
    assert facts["runs"] == runs and facts["blocks"] == [name for run in runs for name in run]
    assert not installed_reuse(steps.denoiser)


@pytest.mark.parametrize(
    ("threshold", "first", "longest", "expected"),
    [
        (0.0, 1, 9, [10, 9, 8, 7, 6, 5]),  # every step costs something
        (0.25, 1, 9, [10, 8, 6]),  # costs of 0.1 and 0.2, then of 1/8 and 2/8
        (0.25, 3, 9, [10, 9, 8, 6]),
        (9.0, 1, 2, [10, 8, 6]),
        (9.0, 1, 9, [10]),
    ],
)
def test_pauses_cost_what_the_size_of_the_change_has_moved(threshold: float, first: int, longest: int, expected: list[float]) -> None:
    assert computed_at(_sizes(range(10, 4, -1)), threshold, first=first, longest=longest) == expected


def _sizes(sizes: Sequence[float]) -> Errors:
    """What was recorded of a stretch with changes of these sizes at timesteps 10, 9, ..."""
    return Errors([10.0 - step for step in range(len(sizes))], np.diag([float(size) ** 2 for size in sizes]), np.ones(len(sizes)))


def test_a_schedule_by_magnitude_is_measured_on_clips_and_kept_in_the_facts() -> None:
    steps = Steps()
    facts = BlockReuse(magnitude=0.25, every=9).facts(steps)
    assert facts["at"] == [10.0, 6.0] and not installed_reuse(steps.denoiser)  # 8 costs 0.2, 6 another 0.4
    assert BlockReuse(magnitude=0.25).needs_data and BlockReuse(magnitude=0.25).in_memory
    reuse = BlockReuse(magnitude=0.25, every=9).install(steps.denoiser, facts)
    for time in steps.timesteps:
        added(steps.denoiser, time)
    assert reuse.by_step() == {0: (1, 0), 1: (0, 1), 2: (1, 0)}


def test_a_stretch_that_changes_nothing_has_no_magnitude() -> None:
    with pytest.raises(UnsupportedError, match="at timestep 9 they change nothing; give a schedule instead"):
        computed_at(_sizes([1.0, 0.0]), 0.1, first=1, longest=9)


def test_a_block_counts_by_the_square_of_what_its_change_differs() -> None:
    steps = Steps()
    names = [f"blocks.{number}" for number in range(4)]
    found = differences(steps, names, BlockReuse(every=1), FACTS | {"blocks": names})
    assert list(found.values()) == pytest.approx([4 * (number * 0.2) ** 2 for number in (4, 3, 1, 2)])  # two steps of two clips


def test_blocks_that_do_not_follow_each_other_are_reused_one_by_one() -> None:
    model = Denoiser()
    reuse = BlockReuse().install(model, FACTS | {"blocks": ["blocks.0", "blocks.2"], "runs": [["blocks.0"], ["blocks.2"]]})
    assert added(model, 10.0) == pytest.approx(10.0)
    assert added(model, 8.0) == pytest.approx(1.0 * (1 + 3) + 0.8 * (2 + 4))
    assert reuse.counts() == {"computed": 2, "reused": 2}  # two stretches


class Skipping(nn.Module):
    """Three blocks; the last one reads what the first one gives beside its output, and writes into what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid, self.up = nn.ModuleList([Down()]), Block(2), nn.ModuleList([Up()])

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x, skips = self.down[0](x, timestep)
        return self.up[0](self.mid(x, timestep), skips, timestep)


class Down(Block):
    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor, timestep: Tensor) -> Any:
        x = super().forward(x, timestep)
        return x, (x, None)


class Up(nn.Module):
    def forward(self, x: Tensor, skips: Any, timestep: Tensor) -> Tensor:
        x += skips[0] + timestep / 10
        return x


def test_outputs_are_kept_with_their_skips_and_nobody_writes_into_them() -> None:
    model = Skipping()
    facts = FACTS | {"blocks": ["down.0", "mid"], "keeps": "outputs"}
    reuse = BlockReuse(every=3).install(model, facts)
    found = [added(model, time) for time in (10.0, 8.0, 6.0, 4.0)]
    assert found == pytest.approx([5.0, 4.0 + 0.8, 4.0 + 0.6, 2.0])
    assert reuse.counts() == {"computed": 2, "reused": 2}
    assert added(model, 2.0, torch.zeros(2)) == pytest.approx(1.0)  # other latents: nothing kept fits


def test_counts_are_kept_by_step() -> None:
    model, reuse = installed()
    for time in (10.0, 8.0, 6.0, 10.0, 8.0):
        added(model, time)
    assert reuse.by_step() == {0: (2, 0), 1: (0, 2), 2: (1, 0)}
    assert reuse.parts == ["blocks.1", "blocks.2"]


def test_blocks_are_counted_by_themselves_where_stretches_take_turns() -> None:
    model = Denoiser()
    reuse = BlockReuse(every=9, late=(0.0, 0.5)).install(model, FACTS | {"late": ["blocks.0", "blocks.1", "blocks.2"]})
    for time in (10.0, 6.0, 5.0, 4.0):
        added(model, time)
    both = {0: (1, 0), 1: (0, 1), 2: (1, 0), 3: (0, 1)}
    assert reuse.by_cell() == {"blocks.1": both, "blocks.2": both, "blocks.0": {2: (1, 0), 3: (0, 1)}}


# --- planned while quantizing -------------------------------------------------------------------------------------------------------


class Early(Block):
    """Turns what it adds above a timestep of 6, and not below."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        angle = timestep.clamp(min=6)
        return x + self.number * torch.stack([angle.cos(), angle.sin()])


class FewSteps(Steps):
    """Eight steps of a denoiser that gives the same at the last five."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Denoiser(Early)
        self.timesteps = [10.0, 9.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]

    def clip(self) -> list[float]:
        """What is added at each step."""
        return [added(self.denoiser, time, torch.zeros(2)) for time in self.timesteps]

    def held_out_latents(self) -> None:
        for _ in range(2):
            self.clip()


def test_a_budget_computes_where_the_result_changes() -> None:
    steps = FewSteps()
    stage = BlockReuse(budget=0.5, stretch=(0.0, 1.0), order=0)
    facts = stage.facts(steps)
    assert facts["at"] == [10.0, 9.0, 7.0, 6.0] and not installed_reuse(steps.denoiser)
    assert facts["fitted"][::2] == [5.0, 4.0, 3.0, 2.0] and facts["fitted"][1::2] == pytest.approx([1.0] * 4, abs=1e-4)
    plain = steps.clip()
    reuse = stage.install(steps.denoiser, facts)
    assert steps.clip() == pytest.approx(plain, rel=1e-4)
    assert reuse.counts() == {"computed": 4, "reused": 4}


def test_clips_that_are_sampled_one_by_one_all_count() -> None:
    steps = FewSteps()
    gram = recorded(steps, BlockReuse(stretch=(0.0, 1.0)).facts(steps), BlockReuse(every=1), "budget").gram
    assert gram[0, 1] == pytest.approx(2 * (1 + 2 + 3 + 4) ** 2 * math.cos(10 - 9), rel=1e-5)  # two clips, one after the other


def test_steps_that_do_not_fall_are_refused_with_a_budget() -> None:
    steps = FewSteps()
    steps.timesteps = [1.0, 2.0, 3.0]
    with pytest.raises(UnsupportedError, match="'budget' of reuse 'blocks' needs three steps or more"):
        BlockReuse(budget=0.5).facts(steps)
    assert not installed_reuse(steps.denoiser)


@pytest.mark.parametrize("keeps", ["change", "outputs", "answer"])
def test_rounded_results_are_reused(keeps: str) -> None:
    model = Denoiser()
    blocks = [""] if keeps == "answer" else ["blocks.1", "blocks.2"]
    stretch = () if keeps == "answer" else (0.25, 0.75)
    reuse = BlockReuse(rounded=True, stretch=stretch).install(model, FACTS | {"blocks": blocks, "keeps": keeps})
    latents = torch.tensor([0.0, 1.0])
    first = added(model, 10.0, latents)
    assert first == pytest.approx(10.0)
    later = {"change": 0.8 * (1 + 4) + 1.0 * (2 + 3), "outputs": 1.0 * (1 + 2 + 3) + 0.8 * 4, "answer": 10.0}
    assert added(model, 8.0, latents) == pytest.approx(later[keeps], rel=0.01)
    assert reuse.counts() == {"computed": 1, "reused": 1}
    twin = pickle.loads(pickle.dumps(reuse.stretches[0]))
    assert twin.rounded
