"""What is trained beside rounding: scales of inputs, updates inside the rounding, dropped rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from reelquant._errors import RecipeError
from reelquant.clock import Clock
from reelquant.formats import Granularity, Int, Quantizer, parse_format
from reelquant.kernels import backend
from reelquant.reconstruct import AdaRound, Lsq, StraightThrough
from reelquant.reconstruct.drop import Drop
from reelquant.reconstruct.error import mean_error, split
from reelquant.reconstruct.input_scales import FOLLOWS, InputScales
from reelquant.reconstruct.levels import within_cell
from reelquant.reconstruct.soft import Fixed, SoftLayer, soften
from reelquant.reconstruct.straight_through import Updated
from reelquant.reconstruct.through import clipped, rounded
from reelquant.stages import RecordedCall
from tests.unit.reconstruct.pieces import INT4, Pieces, block

# ---------------------------------------------------------------------------------------------------------------------- gradients

VALUES = [0.3, -0.8, 1.9, -5.0]  # with int2 of scale 1: -2 ... 1


def gradients(through: Any) -> tuple[list[float], list[float], float]:
    """Values, gradients of the input, and that of the scale."""
    x, scale = torch.tensor(VALUES, requires_grad=True), torch.tensor([1.0], requires_grad=True)
    found = through(Quantizer(Int(2), Granularity("tensor"), scale), x)
    found.sum().backward()
    assert x.grad is not None and scale.grad is not None
    return found.tolist(), x.grad.tolist(), float(scale.grad)


def test_gradients_of_a_step_by_hand() -> None:
    values, inputs, scale = gradients(rounded)
    assert values == pytest.approx([0.0, -1.0, 1.0, -2.0]) and inputs == [1, 1, 0, 0]
    assert scale == pytest.approx((0 - 0.3) + (-1 + 0.8) + 1 - 2)


def test_gradients_of_a_range_by_hand() -> None:
    values, inputs, scale = gradients(clipped)
    assert values == pytest.approx([0.0, -1.0, 1.0, -2.0]) and inputs == [1, 1, 0, 0]
    assert scale == pytest.approx(1 - 2)  # only the two clipped values


@pytest.mark.parametrize("through", [rounded, clipped])
@pytest.mark.parametrize("fmt", ["int4", "uint4", "e2m1", "log_uniform_4"])
@pytest.mark.parametrize("grain", [Granularity("tensor"), Granularity("channel", axis=-1), Granularity("group", 3)])
def test_values_are_those_of_the_quantizer(through: Any, fmt: str, grain: Granularity) -> None:
    x, units = torch.randn(5, 7), {"tensor": 1, "channel": 7, "group": 15}[grain.kind]
    number = parse_format(fmt)
    zero = torch.full((units,), 6.0) if number.needs_zero_point else None
    quantizer = Quantizer(number, grain, torch.rand(units) + 0.1, zero)
    torch.testing.assert_close(through(quantizer, x), quantizer(x), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- scales of inputs


def steps_of(count: int, inputs: dict[str, Any]) -> tuple[Pieces, Clock, list[torch.Tensor]]:
    """A layer with a row of scales for each of some steps, whose inputs grow from step to step."""
    torch.manual_seed(1)
    calls = [torch.randn(20, 12) * (1 + step) for step in range(count)]
    pieces = Pieces(nn.Linear(12, 10), calls, INT4, inputs, [{"solve": "nearest"}])
    clock = Clock([float(step) for step in range(count)])
    pieces.built.layer.clock = (clock,)
    return pieces, clock, calls


@pytest.mark.parametrize("follow", FOLLOWS)
@pytest.mark.parametrize("inputs", [{"format": "int8", "slots": "per_step"}, {"format": "uint4"}], ids=["per step", "shared"])
def test_scales_start_as_stored_and_hardened_layers_give_the_bits_of_the_reference_kernel(follow: str, inputs: dict[str, Any]) -> None:
    pieces, clock, calls = steps_of(6, inputs)
    built, scale = pieces.built, pieces.built.layer.input_scale
    scales = InputScales(scale, built.work, follow, "step")
    assert torch.equal(scales.scale(), scale)
    for parameter in scales.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape)
    soft = SoftLayer(built.layer, built.work, Fixed.of(built.layer, built.work), scales)
    solution = soft.solution()
    assert solution.input_scale is not None and not torch.equal(solution.input_scale, scale)
    layer = pieces.with_codes(replace(built.work.with_input_scale(solution.input_scale), solution=solution)).layer
    layer.clock = (clock,)
    taken = SoftLayer(built.layer, built.work, Fixed.of(built.layer, built.work))
    taken.take(solution)
    for step, x in enumerate(calls):
        clock.tick(float(step))
        with backend("reference"):
            assert torch.equal(soft(x), layer(x)) and torch.equal(taken(x), layer(x))


def test_a_fitted_factor_moves_steps_that_are_never_trained() -> None:
    pieces, _, _ = steps_of(9, {"format": "int8", "slots": "per_step"})
    scale = pieces.built.layer.input_scale
    fitted, each = (InputScales(scale, pieces.built.work, follow, "step") for follow in ("fitted", "each"))
    for scales in (fitted, each):
        optimizer = torch.optim.Adam(scales.parameters(), lr=0.02)
        for _ in range(200):
            optimizer.zero_grad()
            (scales.scale()[::2] / scale[::2] - 0.5).square().sum().backward()
            optimizer.step()
    factors = (fitted.scale() / scale).detach().squeeze(1)
    assert bool((factors[1::2] < 0.8).all()) and torch.equal(each.scale()[1::2], scale[1::2])


@pytest.mark.parametrize(("gradient", "bits", "factor"), [("step", 3, 2.0), ("step", 6, 0.3), ("range", 6, 0.3)])
def test_ranges_that_are_far_off_come_back(gradient: str, bits: int, factor: float) -> None:
    # only clipped values move an end by itself, so the range has to be too narrow there
    start = block(bits=8, inputs={"format": f"int{bits}"})
    stage = Lsq(iterations=150, calls=12, input_rate=0.02, gradient=gradient)
    calls, (trained, held_out) = start.calls(True), split(12)
    softened, soft = soften(start, scales=stage._scales)
    for layer in soft.values():
        assert layer.scales is not None
        layer.scales.stored *= factor
    before = mean_error(softened, calls, held_out)
    stage.train(softened, list(soft.values()), calls, trained)
    assert mean_error(softened, calls, held_out) < 0.8 * before
    for layer in soft.values():
        assert layer.scales is not None
        assert bool(((layer.scales.scale() > layer.scales.stored) == (factor < 1)).all())


def test_learned_scales_leave_codes_alone_and_name_their_stage() -> None:
    start = block(bits=8, inputs={"format": "int3"})
    codes = {path: layer.packed.unpacked() for path, layer in start.module.named_children()}  # type: ignore[union-attr]
    found = Lsq(iterations=60, calls=12).solve_block(start)
    assert set(found) == {"first", "second"} and found["first"].solver == "lsq"
    for path, solution in found.items():
        assert torch.equal(solution.codes, codes[path]) and solution.input_scale is not None


def test_inputs_without_stored_scales_are_left_with_a_warning() -> None:
    told: list[str] = []
    dynamic = {"format": "int8", "granularity": "token", "dynamic": True}
    assert Lsq(calls=12).solve_block(block(warn=told.append, inputs=dynamic)) == {}
    assert len(told) == 1 and "inputs are float, or ranged in the forward" in told[0]


# ------------------------------------------------------------------------------------------------------------- updates of weights


def test_starts_lie_where_rounding_gives_the_code() -> None:
    quantizer = Quantizer(Int(3), Granularity("channel"), torch.tensor([1.0]))  # -4 ... 3
    target, codes = torch.tensor([[0.2, 0.2, 0.2, 9.0]]), torch.tensor([[4, 5, 3, 7]], dtype=torch.uint8)
    found = within_cell(quantizer, target, codes, 0.98)
    assert found.tolist() == [pytest.approx([0.2, 0.51, -0.51, 3.0])] and torch.equal(quantizer.codes(found), codes)


@pytest.mark.parametrize("weight", ["int4", "uint4", "e2m1", "power_4"])
@pytest.mark.parametrize("grain", ["channel", "group-8"])
@pytest.mark.parametrize("rank", [0, 4])
def test_updates_start_with_the_codes_of_the_solver_and_harden_to_what_they_compute(weight: str, grain: str, rank: int) -> None:
    torch.manual_seed(0)
    spec, steps = {"format": weight, "granularity": grain}, [{"solve": "gptq", "correct_bias": True}]
    pieces = Pieces(nn.Linear(24, 16), [torch.randn(60, 24) @ torch.randn(24, 24)], spec, None, steps)
    updated = Updated(pieces.built.layer, pieces.built.work, rank, torch.Generator().manual_seed(0), scales=True)
    start = pieces.built.work.solution
    assert start is not None and torch.equal(updated.values(hard=True), start.values)
    assert updated.left.shape == (16, rank or 24)
    updated.left.data = torch.randn(updated.left.shape)
    torch.testing.assert_close(updated.values(hard=False), updated.solution().values, rtol=1e-5, atol=1e-5)
    assert not torch.equal(updated.values(hard=True), start.values)
    updated.logarithm.data += 0.3  # type: ignore[union-attr]
    solution = updated.solution()
    scale = solution.quantizer.scale
    assert torch.equal(scale, scale.bfloat16().float()) and torch.equal(solution.quantizer.codes(solution.values), solution.codes)


@pytest.mark.parametrize("options", [{"rank": 8}, {"rank": 0}, {"rank": 8, "scale_rate": 0.005}, {"rank": 8, "input_rate": 0.01}], ids=str)
def test_updates_lower_the_error_on_held_out_calls(options: dict[str, Any]) -> None:
    stage, start = StraightThrough(iterations=150, calls=12, rate=0.01, **options), block()
    calls, (_, held_out) = start.calls(True), split(12)
    before = mean_error(start, calls, held_out)
    found = stage.solve_block(start)
    again, soft = soften(block())
    for path, solution in found.items():
        soft[path].take(solution)
    assert set(found) == {"first", "second"} and mean_error(again, calls, held_out) < 0.8 * before


# ------------------------------------------------------------------------------------------------------------------------ dropping


def test_a_share_of_the_rounding_is_dropped_and_one_seed_drops_the_same() -> None:
    ones, zeros = torch.ones(100, 100), torch.zeros(100, 100)
    first, second = (Drop(0.3, 7)(ones, zeros) for _ in range(2))
    assert torch.equal(first, second) and float(first.mean()) == pytest.approx(0.7, abs=0.02)
    drop = Drop(0.3, 7)
    assert not torch.equal(drop(ones, zeros), drop(ones, zeros))


def test_mixed_calls_take_numbers_from_both_and_the_rest_from_the_first() -> None:
    rounded_call = RecordedCall((torch.ones(50), torch.tensor(3)), {"word": "a"}, "output", 2)
    float_call = RecordedCall((torch.zeros(50), torch.tensor(4)), {"word": "b"}, "other", 2)
    mixed = Drop(0.5, 0).call(rounded_call, float_call)
    assert 0 < float(mixed.args[0].mean()) < 1 and int(mixed.args[1]) == 3
    assert mixed.kwargs == {"word": "a"} and mixed.output == "output" and mixed.step == 2


def test_rounding_is_dropped_while_layers_are_soft_only() -> None:
    pieces, _, calls = steps_of(1, {"format": "int3"})
    soft = SoftLayer(pieces.built.layer, pieces.built.work, Fixed.of(pieces.built.layer, pieces.built.work))
    exact = soft(calls[0])
    soft.drop = Drop(0.5, 0)
    assert torch.equal(soft(calls[0]), exact)
    soft.hard = False
    assert not torch.equal(soft(calls[0]), exact)


@pytest.mark.parametrize("inputs", ["quantized", "mixed"])
def test_dropping_changes_what_is_learned_and_is_the_same_twice(inputs: str) -> None:
    options: dict[str, Any] = {"iterations": 60, "calls": 12, "drop": 0.5, "inputs": inputs}
    plain = AdaRound(iterations=60, calls=12).solve_block(block(inputs={"format": "uint3"}))
    first, second = (AdaRound(**options).solve_block(block(inputs={"format": "uint3"})) for _ in range(2))
    assert all(torch.equal(first[path].codes, second[path].codes) for path in first)
    assert any(not torch.equal(first[path].codes, plain[path].codes) for path in first)


@pytest.mark.parametrize(
    ("member", "options", "message"),
    [
        (Lsq, {"input_rate": 0.0}, "write input_rate above 0"),
        (Lsq, {"drop": 0.5}, "write drop in adaround instead"),
        (StraightThrough, {"rank": -1}, "needs rank >= 0"),
        (StraightThrough, {"scope": "modell"}, "unknown scope 'modell' of straight_through"),
    ],
)
def test_wrong_parameters(member: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        member(**options)


def test_the_whole_denoiser_is_trained_in_memory_only() -> None:
    assert StraightThrough(scope="model").in_memory is not None and StraightThrough().in_memory is None
