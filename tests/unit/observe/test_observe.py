from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reelquant._errors import CalibrationError
from reelquant.clock import BOTH
from reelquant.kernels import Permutation, Rotation, Scaling, hadamard
from reelquant.observe import (
    STATISTICS,
    Call,
    ChannelRange,
    Features,
    Geometry,
    Gram,
    InputStatistics,
    RotatedRange,
    Rows,
    Steps,
    Watched,
    observe,
)
from tests.single import statistics


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_ranges_and_means_per_step() -> None:
    seen = ChannelRange(Geometry(4))
    a, b, c = torch.randn(2, 3, 4), torch.randn(2, 3, 4) + 5, torch.randn(1, 3, 4) - 5
    for x, step in ((a, 0), (b, 1), (c, 1)):
        seen.update(x, Call(step))
    low, high = seen.envelope(per_step=True)
    later = torch.cat([b, c]).flatten(0, 1)
    assert low.shape == (2, 1, 4)
    assert torch.equal(low[0, 0], a.amin((0, 1))) and torch.equal(low[1, 0], later.amin(0)) and torch.equal(high[1, 0], later.amax(0))
    low, high = seen.envelope()
    everything = torch.cat([a, b, c]).flatten(0, 1)
    assert low.shape == (1, 1, 4) and torch.equal(low[0, 0], everything.amin(0)) and torch.equal(high[0, 0], everything.amax(0))
    torch.testing.assert_close(seen.mean[1, 0], later.mean(0))


@pytest.mark.parametrize("axis", [-1, 1])
def test_ranges_per_frame(axis: int) -> None:
    frames, channels = 3, 4
    seen = ChannelRange(Geometry(channels), axis, frames)
    x = torch.randn(2 * frames, 5, channels)  # two clips of three frames
    seen.update(x.movedim(-1, axis), Call(0))
    low, high = seen.envelope()
    by_hand = x.reshape(2, frames, 5, channels)
    assert torch.equal(low[0], by_hand.amin((0, 2))) and torch.equal(high[0], by_hand.amax((0, 2)))
    torch.testing.assert_close(seen.mean[0], by_hand.mean((0, 2)))


def test_a_leading_axis_that_frames_do_not_divide_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="frame-4"):
        ChannelRange(Geometry(3), frames=4).update(torch.randn(6, 2, 3), Call(0))


def test_padding_puts_zero_in_the_range_and_not_in_the_mean() -> None:
    x = torch.rand(2, 3, 4) + 1
    seen = ChannelRange(Geometry(3, (3,), (1,), (1, 1), (1,)), 1)
    seen.update(x, Call(0))
    low, high = seen.envelope()
    assert bool((low == 0).all()) and torch.equal(high[0, 0], x.amax((0, 2)))
    torch.testing.assert_close(seen.mean[0, 0], x.mean((0, 2)))


def test_unseen_ranges_are_the_jackknife_of_independent_runs() -> None:
    seen = ChannelRange(Geometry(2))
    for part, values in enumerate(([1.0, 10.0], [1.0, 16.0], [1.0, 13.0])):
        seen.update(torch.tensor([values, [-v for v in values]]), Call(0, part))
        seen.update(torch.zeros(1, 2), Call(1, part))
    low, high = seen.envelope(unseen=True)
    assert high[0, 0].tolist() == [1.0, 19.0] and low[0, 0].tolist() == [-1.0, -19.0]  # 2 * 16 - 13; a steady channel stays
    assert seen.envelope()[1][0, 0].tolist() == [1.0, 16.0]
    one = ChannelRange(Geometry(2))
    one.update(torch.tensor([[3.0, 4.0]]), Call(0))
    assert one.envelope(unseen=True)[1][0, 0].tolist() == [3.0, 4.0]  # one run tells nothing of others


def test_moments_of_data_with_a_large_mean() -> None:
    """float32 sums of squares around 1e4 would lose the unit variance: 1e8 * 2^-24 is 6."""
    x = torch.randn(500, 6) @ torch.randn(6, 6) + 1e4
    gram = Gram(Geometry(6), generator())
    for part in x.split(100):
        gram.update(part, Call(0))
    reference = x.double().numpy()
    np.testing.assert_allclose(gram.mean.numpy(), reference.mean(0), rtol=1e-6)
    expected = np.cov(reference.T, bias=True)
    # inputs themselves are rounded to 2^-10 at 1e4, in both; what is left is the float32 of sums around an origin near the mean
    np.testing.assert_allclose(gram.covariance.numpy(), expected, atol=1e-4 * np.abs(expected).max())
    assert gram.count == 500


def test_moments_after_operations_on_channels_are_those_of_the_changed_rows() -> None:
    """Patches of a convolution: the operations act on channels, whatever the taps."""
    geometry = Geometry(4, (2,), (1,), (0, 0), (1,))
    rows = torch.randn(300, 4, 2, generator=generator()) * torch.tensor([1.0, 3.0, 0.2, 7.0])[:, None] + 1
    gram = Gram(geometry, generator())
    gram.absorb({"rows": rows.flatten(1)}, Call(0))
    mixes = (Scaling(torch.tensor([1.0, -2.0, 0.5, 4.0])), Rotation(2), Permutation(torch.tensor([2, 0, 3, 1])))
    changed = rows.double()
    for mix in mixes:
        changed = mix(changed, 1)
    found, flat = gram.mixed(mixes), changed.flatten(1).numpy()
    np.testing.assert_allclose(found.mean.numpy(), flat.mean(0), rtol=1e-5, atol=1e-5)
    expected = np.cov(flat, rowvar=False, bias=True)
    np.testing.assert_allclose(found.covariance.numpy(), expected, atol=1e-5 * np.abs(expected).max())
    assert gram.mixed((Scaling(torch.tensor([1.0, -2.0, 0.5, 4.0])), *mixes[1:])) is found  # layers that share an input share the answer
    assert gram.mixed(mixes[:2]) is not found


def test_a_convolution_s_moments_are_those_of_its_patches() -> None:
    layer = nn.Conv2d(2, 1, 3, padding=1)
    x = torch.randn(2, 2, 5, 4) + 3
    gram = Gram(Geometry.of(layer), generator())
    gram.update(x, Call(0))
    patches = F.unfold(x, 3, padding=1).movedim(1, -1).flatten(0, 1).double().numpy()
    np.testing.assert_allclose(gram.covariance.numpy(), np.cov(patches.T, bias=True), atol=1e-4)
    np.testing.assert_allclose(gram.mean.numpy(), patches.mean(0), atol=1e-5)


def patches_by_hand(x: Tensor, layer: Any) -> Tensor:
    """``[positions, channels * taps]`` as the columns that a convolution with one-hot kernels gives."""
    taps = int(np.prod(layer.kernel_size))
    weight = torch.eye(layer.in_channels * taps).view(layer.in_channels * taps, layer.in_channels, *layer.kernel_size)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
    out = convolve(x, weight, None, layer.stride, layer.padding, layer.dilation)
    return out.movedim(1, -1).flatten(0, -2)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(
    seed=st.integers(0, 999), dims=st.sampled_from([1, 2, 3]), kernel=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    stride=st.lists(st.integers(1, 2), min_size=3, max_size=3), dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
)  # fmt: skip
def test_patches_of_any_convolution(seed: int, dims: int, kernel: list[int], stride: list[int], dilation: int, padding: int | str) -> None:
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    steps = 1 if padding == "same" else tuple(stride[:dims])
    layer = kind(2, 3, tuple(kernel[:dims]), steps, padding, dilation)
    x = torch.randn(2, 2, 6, 5, 7, generator=torch.Generator().manual_seed(seed))[(..., *[0] * (3 - dims))]
    geometry = Geometry.of(layer)
    assert geometry.taps == int(np.prod(kernel[:dims]))
    expected = patches_by_hand(x, layer)
    found = geometry.rows(x, 10_000, generator())  # all positions, in order
    assert torch.equal(found, expected)
    some = geometry.rows(x, 5, generator())
    assert some.shape == (min(5, len(expected)), expected.shape[1])
    assert all(bool((expected == row).all(1).any()) for row in some)


def test_unfold_agrees_in_two_dimensions() -> None:
    layer, x = nn.Conv2d(3, 1, (3, 2), (2, 1), (1, 0), (1, 2)), torch.randn(2, 3, 7, 6)
    expected = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).movedim(1, -1).flatten(0, 1)
    assert torch.equal(Geometry.of(layer).rows(x, 10_000, generator()), expected)


def test_rows_are_a_sample_of_every_call() -> None:
    rows = Rows(Geometry(3), generator(), steps_per_part=3, total=96)
    for i in range(3):
        rows.update(torch.full((2, 20, 3), float(i)), Call(i))
    assert rows.rows.shape == (96, 3) and rows.rows[:, 0].tolist() == [0.0] * 32 + [1.0] * 32 + [2.0] * 32
    assert rows.steps.tolist() == [0] * 32 + [1] * 32 + [2] * 32


@given(steps=st.integers(1, 60), parts=st.integers(1, 40), more=st.integers(0, 2))
def test_rows_are_bounded_and_even_whatever_the_number_of_calls(steps: int, parts: int, more: int) -> None:
    rows = Rows(Geometry(1), generator(), steps, parts)
    for part in range(parts + more):  # more sampler runs than expected change what is kept, not how much
        for step in range(steps):
            rows.update(torch.full((1, 2000, 1), float(step)), Call(step, part))
    assert 512 < len(rows.rows) <= 1024
    assert torch.equal(rows.rows[:, 0], rows.steps.float())
    counts = torch.bincount(rows.steps, minlength=steps)
    assert counts.amax() - counts.amin() <= 3 * rows.per_call


def test_calls_of_one_step_share_its_rows() -> None:
    """A sampler that calls the denoiser twice a step, for guidance, leaves as many rows of both calls."""
    rows = Rows(Geometry(1), generator(), total=12)
    for call in range(3):
        rows.update(torch.full((1, 50, 1), float(call)), Call(0))
    assert torch.bincount(rows.rows[:, 0].long()).tolist() == [4, 4, 4]


def test_features_are_one_row_per_step_and_know_when_they_vary() -> None:
    steady = Features(4)
    a, b = torch.randn(4), torch.randn(4)
    for _ in range(2):
        steady.update(a.expand(3, 4), Call(0))
        steady.update(b.expand(2, 4), Call(1))
    assert not steady.varies and torch.equal(steady.features, torch.stack([a, b]))
    within, between = Features(4), Features(4)
    within.update(torch.stack([a, b]), Call(0))
    between.update(a[None], Call(0))
    between.update(b[None], Call(0))
    assert within.varies and between.varies


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_inputs_that_are_not_finite_name_layer_and_step(bad: float) -> None:
    calls = [torch.randn(2, 4), torch.randn(2, 4)]
    calls[1][0, 2] = bad
    with pytest.raises(CalibrationError, match=r"layer 'layer' holds NaN or inf at step 1 \(timestep 1\)"):
        statistics(nn.Linear(4, 2), calls)


def test_of_several_broken_layers_the_first_to_break_is_named() -> None:
    """At the next step everything is NaN, the very first layer included, and says nothing of the cause."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(1, 1), nn.Linear(1, 1)

        def forward(self, x: Tensor, timestep: float) -> Tensor:
            return self.second(self.first(x) / (0 if timestep == 5 else 1))

    model = Two()
    watched = {name: statistics(module, [torch.zeros(1, 1)]) for name, module in model.named_children()}
    for name, seen in watched.items():
        seen.name, seen.members = name, {"range": ChannelRange(Geometry(1))}

    def run() -> None:
        x = torch.ones(1, 1)
        for timestep in (9.0, 5.0, 1.0):
            x = model(x, timestep)

    with pytest.raises(CalibrationError, match=r"'second' holds NaN or inf at step 1 \(timestep 5\)"):
        observe(model, lambda args, kwargs: args[1], watched, run)


def test_a_layer_that_never_ran_is_named() -> None:
    with pytest.raises(CalibrationError, match="'layer' never ran while sampling"):
        statistics(nn.Linear(4, 2), [])


def test_steps_count_parts_and_keep_sampling_order() -> None:
    steps = Steps()
    told = []
    for timestep in [900, 900, 500, 100, 100, 900, 500, 500, 100]:  # two runs, some steps with two guidance calls
        steps.see(torch.tensor([timestep, 0]))
        told.append((steps.current, steps.part))
    assert steps.timesteps == [900.0, 500.0, 100.0] and steps.calls == 9
    assert told == [(0, 0), (0, 0), (1, 0), (2, 0), (2, 0), (0, 1), (1, 1), (1, 1), (2, 1)]


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, timestep: float) -> Tensor:
        return self.layer(input=x)


def void(value: Any) -> None:
    del value


def test_observe_sees_keywords_and_leaves_no_hooks() -> None:
    denoiser = Denoiser()
    seen = statistics(denoiser.layer, [torch.zeros(1, 2)])
    steps = observe(denoiser, lambda args, kwargs: args[1], {"layer": seen}, lambda: void(denoiser(torch.ones(1, 2), 7.0)))
    assert steps.timesteps == [7.0] and steps.example[0][1] == 7.0
    assert seen.range.envelope()[1].flatten().tolist() == [1.0, 1.0]
    assert not denoiser._forward_pre_hooks and not denoiser.layer._forward_pre_hooks

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        observe(denoiser, lambda args, kwargs: args[1], {"layer": seen}, broken)
    assert not denoiser._forward_pre_hooks and not denoiser.layer._forward_pre_hooks
    with pytest.raises(CalibrationError, match="never called the denoiser"):
        observe(denoiser, lambda args, kwargs: args[1], {}, lambda: None)


@given(parts=st.integers(1, 6), seed=st.integers(0, 99))
def test_running_extremes_give_the_bits_of_all_parts(parts: int, seed: int) -> None:
    """What is kept are two extremes over parts; a table of all of them must give the same endpoint."""
    draw = torch.Generator().manual_seed(seed)
    seen = ChannelRange(Geometry(3), steps=1)  # fewer than come: memory doubles
    values = torch.randn(parts, 4, 5, 3, generator=draw)
    for part in range(parts):
        for step in range(4):
            seen.update(values[part, step], Call(step, part))
    high = values.amax(2)  # [parts, steps, channels]
    for per_step, maxima in ((True, high), (False, high.amax(1, keepdim=True))):
        first, second = maxima.topk(2, dim=0).values if parts > 1 else (maxima[0], maxima[0])
        found = seen.envelope(per_step=per_step, unseen=True)[1][:, 0]
        assert torch.equal(found, 2 * first - second if parts > 1 else first)
        assert torch.equal(seen.envelope(per_step=per_step)[1][:, 0], first)


def test_more_sampler_runs_take_no_more_memory() -> None:
    wish = Watched("layer", Geometry(8), -1, 1, "main", 8, generator(), frozenset({"gram", "rotated", "halves"}), 4, 2)
    sizes = []
    seen = InputStatistics.for_input(wish)
    for part in range(8):
        for step in range(4):
            seen.update(torch.randn(2, 600, 8), Call(step, part, BOTH))
        tensors = [value for member in seen.members.values() for name, value in member.state.items() if name != "waiting"]
        sizes.append(sum(value.numel() for value in tensors))
    assert sizes == sizes[:1] * 8


@pytest.mark.parametrize("kind", ["range", "rotated", "rows", "gram", "features", "halves"])
def test_a_state_goes_on_with_the_same_bits(kind: str) -> None:
    wish = Watched("layer", Geometry(8), -1, 1, "temporal", 8, generator(), frozenset({"rotated"}), 4, 2)
    calls = [(torch.randn(2, 300, 8), Call(step, part, BOTH)) for part in range(2) for step in range(4)]
    whole, begun, resumed = (STATISTICS[kind].for_input(wish) for _ in range(3))
    assert whole is not None and begun is not None and resumed is not None
    looks = [(whole.look(x, call), call) for x, call in calls]
    for seen, call in looks:
        whole.absorb(seen, call)
    for seen, call in looks[:5]:
        begun.absorb(seen, call)
    resumed.state = {name: value.clone() for name, value in begun.state.items()}
    for seen, call in looks[5:]:
        resumed.absorb(seen, call)
    assert whole.state.keys() == resumed.state.keys()
    assert all(torch.equal(value, resumed.state[name]) for name, value in whole.state.items())


@pytest.mark.parametrize("kind", STATISTICS)
def test_a_copy_of_an_empty_statistic_is_independent_of_it(kind: str) -> None:
    """Statistics in files are read into copies, as often as a layer is built."""
    wish = Watched("layer", Geometry(8), -1, 1, "temporal", 8, generator(), frozenset({"rotated"}), 4, 2)
    empty, fresh = (STATISTICS[kind].for_input(wish) for _ in range(2))
    assert empty is not None and fresh is not None
    calls = [(torch.randn(2, 300, 8), Call(step, half=BOTH, frames=2)) for step in range(4)]
    looks = [(empty.look(x, call), call) for x, call in calls]
    first, second = copy.copy(empty), copy.copy(empty)
    for filled in (first, second, fresh):
        for seen, call in looks:
            filled.absorb(seen, call)
    assert fresh.state
    for one in (first, second):
        assert all(torch.equal(value, one.state[name]) for name, value in fresh.state.items())


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frames", [1, 2])
def test_the_rotated_range_is_that_of_the_rotated_input(axis: int, dtype: torch.dtype, frames: int) -> None:
    x = torch.randn(4, 70, 24, generator=generator()).to(dtype).movedim(-1, axis)
    found = RotatedRange(Geometry(24), axis, frames).look(x, Call(0))
    expected = ChannelRange(Geometry(24), axis, frames).look(hadamard(x.float(), axis), Call(0))
    for name in ("low", "high", "sum", "count"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=2e-5)


def test_probes_widen_ranges_and_count_for_nothing_else() -> None:
    written, probe = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]), torch.tensor([[-3.0, 0.5]])
    of = Watched("layer", Geometry(2), -1, 1, "main", 1, generator(), frozenset({"range", "rows", "gram"}), 1, 1)
    alone, both = InputStatistics.for_input(of), InputStatistics.for_input(of)
    for seen in (alone, both):
        seen.update(written, Call(0, 0))
    both.update(probe, Call(0, 1, probe=True))
    low, high = both.range.envelope(per_step=True, unseen=True)
    assert low.flatten().tolist() == [-3.0, -1.0] and high.flatten().tolist() == [1.0, 1.0]
    assert torch.equal(both.range.mean, alone.range.mean)
    assert both.rows is not None and alone.rows is not None and torch.equal(both.rows.rows, alone.rows.rows)
    assert both.gram is not None and alone.gram is not None and torch.equal(both.gram.covariance, alone.gram.covariance)
