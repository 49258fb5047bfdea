"""Every member of SOLVERS, on every family of formats and every granularity of weights."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reelquant import formats
from reelquant._errors import CalibrationError, UnsupportedError
from reelquant.formats import RANGES, SCALES, Granularity, Int, Kept, MiniFloat, MinMax, QuantSpec, fit, parse_format, parse_granularity
from reelquant.observe import inverse_factor
from reelquant.sites import Layer
from reelquant.solvers import SOLVERS, Problem, Solution, Solver
from reelquant.stages import Specs, StageSite
from tests.single import one_group, plan_of

SMALL_FLOATS = tuple(name for name in formats.FORMATS if isinstance(parse_format(name), MiniFloat))
FORMATS = ("int2", "int4", "int8", "uint3", "uint8", *SMALL_FLOATS, "log2_4", "log_uniform_4", "power_4", "power_8")
GRAINS = ("tensor", "channel", "group-8")


def site(spec: QuantSpec) -> StageSite:
    """A linear layer whose weight gets these numbers."""
    return StageSite(Layer("layer", "Linear", "main", frozenset({"latent"}), (8, 8)), Specs(spec))


def correlated(width: int, rank: int = 3, noise: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(400, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    return torch.cov((rows + noise * torch.randn(400, width, generator=generator)).T, correction=0).reshape(width, width)


def spec_of(fmt: str, grain: str, rule: str = "minmax") -> QuantSpec:
    return QuantSpec(parse_format(fmt), parse_granularity(grain), RANGES[rule]())


def check(problem: Problem, solver: Solver) -> Solution:
    """What holds for every solution."""
    solution = solver.checked(problem)
    quantizer, codes = solution.quantizer, solution.codes
    assert codes.dtype == torch.uint8 and codes.shape == problem.weight.shape
    assert int(codes.max()) < 2**quantizer.format.bits
    values = solution.values
    assert torch.equal(values, quantizer.dequantize(codes)) and bool(values.isfinite().all())
    # codes stand for what the quantizer rounds to: rounding them again changes nothing, bit for bit
    assert torch.equal(quantizer(values), values)
    assert torch.equal(quantizer.dequantize(quantizer.codes(values)), values)
    assert problem.objective(values) <= problem.objective(least(problem, solution))
    return solution


def least(problem: Problem, solution: Solution) -> Tensor:
    """What no solver may lose to, with its own scales: rounding to nearest, of the largest weights where some have to go."""
    rounded = solution.quantizer(problem.weight)
    if not solution.kept:
        return rounded
    kept = Kept.parse(solution.kept)
    groups = kept.in_groups(problem.weight.abs(), -1.0)
    return rounded * kept.best(groups).flatten(1)[:, : rounded.shape[1]]


@pytest.mark.parametrize(("name", "fmt", "grain"), list(itertools.product(SOLVERS, FORMATS, GRAINS)))
def test_solutions_are_valid_and_never_worse_than_nearest(name: str, fmt: str, grain: str) -> None:
    weight = torch.randn(6, 20)  # 20 is not a multiple of 8: the last group is shorter
    spec, solver = spec_of(fmt, grain), SOLVERS[name]()
    assert solver.supports(site(spec)) is None
    solution = check(Problem(weight, spec, correlated(20)), solver)
    assert solution.quantizer.scale.shape == ({"tensor": 1, "channel": 6, "group-8": 18}[grain],)


@pytest.mark.parametrize(("name", "fmt", "scale"), list(itertools.product(SOLVERS, ("int4", "e2m1", "e4m3"), SCALES)))
def test_solutions_with_scales_of_eight_bits_are_valid_too(name: str, fmt: str, scale: str) -> None:
    spec = QuantSpec(parse_format(fmt), parse_granularity("group-8", scale=scale))
    solution = check(Problem(torch.randn(6, 20), spec, correlated(20)), SOLVERS[name]())
    assert solution.quantizer.granularity.scale == scale and (solution.quantizer.whole is not None) == SCALES[scale].two_levels


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("shape", [(1, 20), (6, 1), (1, 1), (3, 65)], ids=str)
@pytest.mark.parametrize("covariance", ["singular", "zero", "dead channels", "huge", "tiny"])
def test_awkward_shapes_and_covariances(name: str, shape: tuple[int, int], covariance: str) -> None:
    width = shape[1]
    matrix = {
        "singular": torch.ones(width, width),
        "zero": torch.zeros(width, width),
        "dead channels": torch.diag((torch.arange(width) % 2).float()),
        "huge": correlated(width) * 1e12,
        "tiny": correlated(width) * 1e-12,
    }[covariance]
    for grain in GRAINS:
        check(Problem(torch.randn(shape), spec_of("int4", grain), matrix), SOLVERS[name]())


@pytest.mark.parametrize("name", SOLVERS)
def test_a_weight_of_zeros_stays_zero(name: str) -> None:
    for fmt, grain in itertools.product(FORMATS, GRAINS):
        problem = Problem(torch.zeros(3, 9), spec_of(fmt, grain), correlated(9))
        solution = SOLVERS[name]().checked(problem)
        assert bool((solution.quantizer.dequantize(solution.codes) == 0).all()), (fmt, grain)


@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 5),
    width=st.integers(1, 30),
    grain=st.sampled_from(GRAINS),
    rule=st.sampled_from(["minmax", "mse"]),
)
def test_nearest_is_the_rounding_of_the_quantizer(seed: int, rows: int, width: int, grain: str, rule: str) -> None:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    spec = spec_of("int4", grain, rule)
    solution = SOLVERS["nearest"]().solve(Problem(weight, spec))
    assert torch.equal(solution.quantizer.dequantize(solution.codes), fit(spec, weight)(weight))


def test_the_objective_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    error = torch.tensor([[1.0, 0.0], [1.0, -1.0]])
    # data-free: (1 + 2) / 2 rows; with C: row 1 gives 2, row 2 gives 2 - 2 * 1 + 5 = 5
    spec = QuantSpec()
    assert Problem(weight, spec).objective(weight + error) == pytest.approx(1.5)
    assert Problem(weight, spec, torch.tensor([[2.0, 1.0], [1.0, 5.0]])).objective(weight + error) == pytest.approx(3.5)


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("fmt", ["int3", "int4", "uint4", "e2m1", "power_4"])
def test_gptq_beats_nearest_on_correlated_inputs(fmt: str, grain: str) -> None:
    problem = Problem(torch.randn(16, 48), spec_of(fmt, grain), correlated(48))
    ours = SOLVERS["gptq"]().checked(problem)
    assert ours.replaced is None
    assert problem.objective(ours.values) < 0.7 * problem.objective(SOLVERS["nearest"]().solve(problem).values)


def plain_gptq(problem: Problem, damping: float, ordered: bool) -> Tensor:
    """Column by column with the inverse itself (OBQ's update) in float64: slow, and none of our code."""
    covariance = problem.covariance.double()
    inverse = torch.linalg.inv(covariance + damping * torch.diag(covariance.diagonal()))
    quantizer, work = fit(problem.spec, problem.weight), problem.weight.double().clone()
    out = torch.zeros_like(problem.weight)
    variances = covariance.diagonal().tolist()
    columns = sorted(range(work.shape[1]), key=lambda column: -variances[column] if ordered else column)
    for column in columns:
        out[:, column] = quantizer.round_columns(work[:, column : column + 1].float(), column)[:, 0]
        error = (work[:, column] - out[:, column].double()) / inverse[column, column]
        work -= torch.outer(error, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return out


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("block", [7, 64])
@pytest.mark.parametrize("grain", GRAINS)
def test_gptq_is_the_published_algorithm(grain: str, block: int, ordered: bool) -> None:
    problem = Problem(torch.randn(8, 20), spec_of("int4", grain), correlated(20, noise=0.5))
    solution = SOLVERS["gptq"](block=block, ordered=ordered).solve(problem)
    # float32 against float64 may flip a weight that lies on a rounding border: none does here
    assert torch.equal(solution.quantizer.dequantize(solution.codes), plain_gptq(problem, 0.01, ordered))


def test_the_order_of_columns_pays_where_variances_differ() -> None:
    spread = torch.logspace(-1, 1, 32)[torch.randperm(32)]
    problem = Problem(torch.randn(48, 32), spec_of("int3", "channel"), correlated(32, noise=0.5) * torch.outer(spread, spread))
    first = {ordered: problem.objective(SOLVERS["gptq"](ordered=ordered).solve(problem).values) for ordered in (False, True)}
    assert first[True] < 0.9 * first[False]


def test_gptq_with_diagonal_covariance_is_nearest() -> None:
    problem = Problem(torch.randn(8, 20), spec_of("int4", "channel"), torch.diag(torch.rand(20) + 0.1))
    assert torch.equal(SOLVERS["gptq"]().solve(problem).codes, SOLVERS["nearest"]().solve(problem).codes)


def test_the_inverse_factor_follows_a_rescaling_of_the_channels() -> None:
    covariance, scale = correlated(12), torch.rand(12) + 0.5
    direct = inverse_factor(covariance / torch.outer(scale, scale), 0.01)
    torch.testing.assert_close(inverse_factor(covariance, 0.01) * scale, direct, rtol=1e-3, atol=1e-4 * float(direct.abs().amax()))
    order = torch.randperm(len(covariance))
    moved = inverse_factor(covariance[order][:, order], 0.01)
    torch.testing.assert_close(inverse_factor(covariance, 0.01, order), moved, rtol=0, atol=0)
    damped = covariance.double() + 0.01 * torch.diag(covariance.diagonal().double())
    factor = direct.double() / scale.double()
    torch.testing.assert_close((factor.T @ factor) @ damped, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-3)


def test_an_overflowed_covariance_is_an_error_not_an_endless_loop() -> None:
    with pytest.raises(CalibrationError, match="overflowed"):
        inverse_factor(torch.full((3, 3), torch.inf), 0.01)


@dataclass(frozen=True)
class Worst(Solver):
    """Rounds everything to the lowest level."""

    def solve(self, problem: Problem) -> Solution:
        quantizer = fit(problem.spec, problem.weight)
        return Solution(quantizer, torch.zeros_like(problem.weight, dtype=torch.uint8))

    def supports(self, site: StageSite) -> str | None:
        return "worst knows int8 only" if site.specs.weight.format.name != "int8" else None


def test_a_solver_that_loses_is_replaced_and_named() -> None:
    problem = Problem(torch.randn(4, 8), spec_of("int8", "channel"))
    solution = Worst().checked(problem)
    assert solution.replaced == "worst"  # it never entered the table: plug-ins that are subclasses are named too
    assert torch.equal(solution.codes, SOLVERS["nearest"]().solve(problem).codes)


def test_refusals_come_when_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOLVERS, "worst", Worst)
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match=r"layer '0': worst knows int8 only"):
        plan_of(model, one_group(model, ["0"]), {"format": "int4"}, None, [{"solve": "worst"}])
    assert plan_of(model, one_group(model, ["0"]), {"format": "int8"}, None, [{"solve": "worst"}]).quantized


def test_gptq_refuses_scales_that_columns_cannot_have() -> None:
    refusal = SOLVERS["gptq"]().supports(site(QuantSpec(Int(4), Granularity("token"), MinMax())))
    assert refusal is not None and "tensor, channel, group" in refusal
