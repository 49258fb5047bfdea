"""One contract per axis of :mod:`reelquant.formats`, kept by every member of its table: a new member is tested once it is listed."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reelquant._errors import CheckpointError, RecipeError, UnsupportedError
from reelquant.formats import (
    CRITERIA,
    FORMATS,
    LEVEL_DTYPE,
    RANGES,
    SCALES,
    ByCriterion,
    Granularity,
    MinMax,
    Mse,
    NumberFormat,
    Percentile,
    Quantizer,
    QuantSpec,
    bind,
    dynamic,
    fit,
    pack,
    packed_width,
    parse_format,
    read_scales,
    scale_tensors,
    unpack,
)
from reelquant.formats.granularity import KINDS
from reelquant.formats.ranges import bounds
from reelquant.formats.skewed import Log2, LogUniform, Power

FITTED: dict[str, NumberFormat] = {  # shapes that only a fit produces
    "log2 tau 8": Log2(5, tau=8),
    "log_uniform narrow": LogUniform(8, edge=0.95, tau=8),
    "log_uniform wide": LogUniform(4, edge=1e-3, tau=1),
    "power linear": Power(6, gamma=1.0, bottom=-0.1),
    "power positive": Power(4, gamma=4.0, bottom=0.3),
}
MEMBERS = {**{name: make() for name, make in FORMATS.items()}, **FITTED}
EXACT_ZERO = [name for name in FORMATS if not name.startswith("power")]  # a power grid has no level at zero unless it was fitted so
EPS = torch.finfo(torch.float32).eps

every_format = pytest.mark.parametrize("fmt", MEMBERS.values(), ids=MEMBERS.keys())
fractions = st.lists(st.floats(-1.25, 1.25, width=32), min_size=1, max_size=40)
seeds = st.integers(0, 2**16)


def units(fmt: NumberFormat, values: list[float]) -> Tensor:
    """Unit values from a quarter below the lowest number to a quarter above the highest."""
    return torch.tensor(values, dtype=torch.float32) * max(abs(fmt.low), abs(fmt.high))


def normal(seed: int, *shape: int) -> Tensor:
    """Skewed values of very different size per row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return torch.where(x > 1, 4 * x, x) * torch.exp2(4 * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator))


# ---------------------------------------------------------------- formats


@every_format
def test_a_format_rounds_its_own_levels_to_themselves(fmt: NumberFormat) -> None:
    levels = fmt.levels()
    assert torch.equal(fmt.round(levels), levels)
    assert torch.equal(fmt.decode(fmt.encode(levels)), levels)


@every_format
def test_a_format_has_at_most_two_to_the_bits_levels_from_low_to_high(fmt: NumberFormat) -> None:
    levels = fmt.levels()
    assert 2 <= len(levels) <= 2**fmt.bits
    assert (levels.diff() > 0).all()
    assert (float(levels[0]), float(levels[-1])) == (fmt.low, fmt.high)


@every_format
@given(values=fractions)
def test_codes_fit_the_bits_and_decode_to_what_rounding_gives(fmt: NumberFormat, values: list[float]) -> None:
    unit = units(fmt, values)
    codes = fmt.encode(unit)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**fmt.bits
    assert torch.equal(fmt.decode(codes), fmt.round(unit))


@every_format
@given(values=fractions)
def test_rounding_twice_is_rounding_once(fmt: NumberFormat, values: list[float]) -> None:
    once = fmt.round(units(fmt, values))
    assert torch.equal(fmt.round(once), once)


@every_format
@given(values=fractions)
def test_rounding_gives_the_nearest_level(fmt: NumberFormat, values: list[float]) -> None:
    unit = units(fmt, values)
    error = (fmt.round(unit).double() - unit.double()).abs()
    least = (fmt.levels().double() - unit.double()[:, None]).abs().amin(1)
    assert (error <= least + EPS * unit.abs()).all()  # a midpoint of two levels is itself rounded to float32


@every_format
@given(values=fractions)
def test_rounding_is_monotone(fmt: NumberFormat, values: list[float]) -> None:
    assert (fmt.round(units(fmt, values).sort().values).diff() >= 0).all()


@every_format
@pytest.mark.parametrize("beyond", [1.0001, 3.0, 1e30, float("inf")])
def test_values_out_of_range_saturate(fmt: NumberFormat, beyond: float) -> None:
    top = max(abs(fmt.low), abs(fmt.high)) * beyond
    assert fmt.round(torch.tensor([-top, top])).tolist() == [fmt.low, fmt.high]


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(values=fractions)
def test_half_precision_rounds_as_float32_does(fmt: NumberFormat, dtype: torch.dtype, values: list[float]) -> None:
    unit = units(fmt, values).clamp(-65000, 65000).to(dtype)
    assert torch.equal(fmt.encode(unit), fmt.encode(unit.float()))
    assert torch.equal(fmt.round(unit), fmt.round(unit.float()).to(dtype))
    assert fmt.round(unit).dtype == dtype


@every_format
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_stays_nan_and_its_code_fits_the_bits(fmt: NumberFormat, sign: float) -> None:
    unit = torch.copysign(torch.full((3,), torch.nan), torch.tensor(sign))
    unit[1] = 0
    assert fmt.round(unit).isnan().tolist() == [True, False, True]
    assert int(fmt.encode(unit).max()) < 2**fmt.bits


@every_format
def test_an_empty_tensor_rounds_to_an_empty_tensor(fmt: NumberFormat) -> None:
    empty = torch.zeros(3, 0)
    assert fmt.round(empty).shape == empty.shape
    assert fmt.encode(empty).shape == empty.shape


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_carries_the_name_it_is_listed_under(name: str) -> None:
    assert parse_format(name).name == name


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=6)
@given(seed=seeds)
def test_fitting_keeps_the_bits_and_is_never_worse_than_the_default_member(name: str, seed: int) -> None:
    values, default = normal(seed, 6, 16), parse_format(name)
    fitted = default.fit(values, CRITERIA["nmse"])
    assert fitted.bits == default.bits
    assert len(fitted.levels()) <= 2**fitted.bits
    if isinstance(default, Log2):  # the only family whose default member is always among the candidates
        losses = [
            float(CRITERIA["nmse"](values, bind(f, Granularity(), *bounds(values, Granularity()))(values))) for f in (fitted, default)
        ]
        assert losses[0] >= losses[1]


@every_format
def test_a_stored_format_holds_numbers_that_storing_does_not_change(fmt: NumberFormat) -> None:
    """Codes are chosen with the numbers a checkpoint gives back."""
    stored = fmt.stored()
    assert (stored.name, stored.bits) == (fmt.name, fmt.bits)
    assert torch.equal(stored.stored().levels(), stored.levels())
    if stored.table is not None:
        assert torch.equal(stored.table.to(LEVEL_DTYPE).float(), stored.table)
        nearest = (stored.levels() - fmt.levels()[:, None]).abs().amin(1)
        assert (nearest <= 2.0**-12).all()  # half a unit in the last place of a float16 in [1/2, 1]


# ---------------------------------------------------------------- granularities


@st.composite
def grained(draw: st.DrawFn) -> tuple[Granularity, tuple[int, ...], int]:
    """A granularity, a shape it applies to, and how many units that shape has."""
    kind = draw(st.sampled_from(KINDS))
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=5)))
    if kind == "tensor":
        return Granularity(kind), shape, 1
    if kind == "group":
        size = draw(st.integers(1, 9))
        if axis := draw(st.integers(0, len(shape) - 1)):
            return Granularity(kind, size, axis), shape, torch.Size(shape).numel() // shape[axis] * -(-shape[axis] // size)
        return Granularity(kind, size), shape, shape[0] * -(-torch.Size(shape[1:]).numel() // size)
    if kind == "frame":
        frames = draw(st.integers(1, 4))
        return Granularity(kind, frames), (shape[0] * frames, *shape[1:]), frames
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    units = shape[axis] if kind == "channel" else torch.Size(shape).numel() // shape[axis]
    return Granularity(kind, axis=axis), shape, units


@given(case=grained())
def test_blocks_and_unblock_are_inverse(case: tuple[Granularity, tuple[int, ...], int]) -> None:
    granularity, shape, units = case
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 1
    blocks = granularity.blocks(x)
    assert len(blocks) == units
    assert blocks.count_nonzero() == x.numel()  # every element once; anything else is padding
    assert torch.equal(granularity.unblock(blocks, shape), x)


@pytest.mark.parametrize(
    ("granularity", "shape", "units"),
    [
        (Granularity(), (0, 4), 1),
        (Granularity("channel"), (3, 0), 3),
        (Granularity("channel", axis=-1), (0, 4), 4),
        (Granularity("group", 4), (3, 0), 0),
        (Granularity("group", 4), (0, 6), 0),
        (Granularity("group", 4, -1), (2, 0, 6), 0),
        (Granularity("group", 4, 1), (2, 0, 6), 0),
        (Granularity("token", axis=-1), (2, 0, 4), 0),
        (Granularity("frame", 2), (0, 5, 4), 2),
        (Granularity("frame", 2), (4, 0), 2),
    ],
    ids=str,
)
def test_empty_tensors_have_empty_blocks_and_survive_quantization(granularity: Granularity, shape: tuple[int, ...], units: int) -> None:
    x = torch.zeros(shape)
    assert granularity.blocks(x).shape[0] == units
    assert granularity.unblock(granularity.blocks(x), shape).shape == x.shape
    for rule in RANGES.values():
        if rule is not ByCriterion:  # a score of no values has no meaning
            quantizer = dynamic(QuantSpec(parse_format("uint8"), granularity, rule()), x)
            assert quantizer(x).shape == x.shape


def test_a_group_of_one_row_does_not_reach_into_the_next() -> None:
    x = torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    assert Granularity("group", 3).blocks(x).tolist() == [[1, 2, 3], [4, 5, 0], [6, 7, 8], [9, 10, 0]]


def test_frames_are_the_fast_part_of_the_leading_axis() -> None:
    x = torch.tensor([[10.0], [11], [20], [21]])  # batch 1 frame 0, batch 1 frame 1, batch 2 frame 0 ...
    assert Granularity("frame", 2).blocks(x).tolist() == [[10, 20], [11, 21]]


def test_frames_that_do_not_divide_the_leading_axis_are_an_error() -> None:
    with pytest.raises(RecipeError, match=r"frame-3 needs a leading axis of batch \* 3, got shape \(4, 2\)"):
        Granularity("frame", 3).blocks(torch.zeros(4, 2))


# ---------------------------------------------------------------- ranges

WEIGHT_GRAINS = [Granularity(), Granularity("channel"), Granularity("group", 4)]
OF_INPUTS = [Granularity("token", axis=-1), Granularity("sample"), Granularity("frame", 2)]


@pytest.mark.parametrize("rule", RANGES.values(), ids=RANGES.keys())
@pytest.mark.parametrize("granularity", [*WEIGHT_GRAINS, *OF_INPUTS], ids=str)
@settings(max_examples=6)
@given(seed=seeds, offset=st.sampled_from([-100.0, 0.0, 100.0]))
def test_every_range_includes_zero_and_stays_inside_the_values(rule: type, granularity: Granularity, seed: int, offset: float) -> None:
    values = normal(seed, 4, 6) + offset
    find = rule().find(values, granularity, lambda v, low, high: bind(parse_format("uint4"), granularity, low, high)(v))
    least, most = (end * getattr(rule(), "largest", 1.0) for end in bounds(values, granularity))
    for low, high in [find]:
        assert low.shape == high.shape == least.shape
        assert (low <= 0).all()
        assert (high >= 0).all()
        assert (low >= least).all()
        assert (high <= most).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", WEIGHT_GRAINS, ids=str)
@pytest.mark.parametrize("signed", [True, False])
@given(seed=seeds)
def test_minmax_integers_err_by_half_a_scale_at_most(bits: int, granularity: Granularity, signed: bool, seed: int) -> None:
    """Nothing is clipped. A bfloat16 scale may be 1/256 too small: signed codes reach 2^(b-1) <= 128 of it, so the clipped end is still
    within half a scale; affine codes span 2^b - 1 and meet a zero point rounded on top, which is up to one more scale."""
    values = normal(seed, 4, 7)
    quantizer = fit(QuantSpec(parse_format(f"{'' if signed else 'u'}int{bits}"), granularity), values)
    clipped = (2**bits - 1) / 255 if granularity.scale_dtype == torch.bfloat16 and not signed else 0.0
    scale = granularity.unblock(quantizer.scale[:, None].expand_as(granularity.blocks(values)).contiguous(), tuple(values.shape))
    error = (quantizer(values) - values).abs()
    assert (error <= scale * (0.5 + clipped + 2**bits * 4 * EPS)).all()  # the division, the zero point and the product round in float32


@every_format
@given(seed=seeds)
def test_minmax_reaches_every_value_whatever_the_format(fmt: NumberFormat, seed: int) -> None:
    values = normal(seed, 4, 7)
    if fmt.low > 0:
        values = values.abs()  # a grid without negative numbers cannot be asked to reach them
    low, high = bounds(values, Granularity())
    quantizer = bind(fmt, Granularity(), low, high)
    zero = 0 if quantizer.zero_point is None else quantizer.zero_point
    slack = 0.5 if fmt.needs_zero_point else 0.0  # the zero point is rounded
    assert ((fmt.high + slack - zero) * quantizer.scale >= high * (1 - 4 * EPS)).all()
    if fmt.low <= 0:
        assert ((fmt.low - slack - zero) * quantizer.scale <= low * (1 - 4 * EPS)).all()


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "uint4", "e2m1", "e4m3", "log2_4", "power_4"])
@pytest.mark.parametrize("granularity", WEIGHT_GRAINS, ids=str)
@settings(max_examples=6)
@given(seed=seeds, p=st.sampled_from([1.0, 2.0, 2.4, 4.0]))
def test_mse_is_never_worse_than_minmax_on_its_own_objective(name: str, granularity: Granularity, seed: int, p: float) -> None:
    values, fmt = normal(seed, 4, 9), parse_format(name)
    searched, plain = (
        bind(fmt, granularity, *rule.find(values, granularity, lambda v, low, high: bind(fmt, granularity, low, high)(v)))
        for rule in (Mse(p, candidates=9), MinMax())
    )
    losses = [granularity.blocks(q(values) - values).abs().pow(p).sum(1) for q in (searched, plain)]
    assert (losses[0] <= losses[1] * (1 + 8 * EPS)).all()


@pytest.mark.parametrize("score", CRITERIA)
@pytest.mark.parametrize("name", ["int3", "uint4", "log2_3", "log_uniform_4", "power_4"])
@settings(max_examples=6)
@given(seed=seeds)
def test_by_criterion_is_never_worse_than_minmax_on_its_own_criterion(score: str, name: str, seed: int) -> None:
    features, fmt = torch.nn.functional.silu(normal(seed, 6, 12)), parse_format(name)
    searched, plain = (fit(QuantSpec(fmt.fit(features, CRITERIA[score]), range=rule), features) for rule in (ByCriterion(score), MinMax()))
    assert CRITERIA[score](features, searched(features)) >= CRITERIA[score](features, plain(features)) - 1e-6  # nmse is float32


@given(seed=seeds)
def test_the_whole_percentile_is_minmax(seed: int) -> None:
    values, granularity = normal(seed, 3, 8), Granularity("channel")
    for found, expected in zip(Percentile(1.0).find(values, granularity, _unused), bounds(values, granularity), strict=True):
        assert torch.equal(found, expected)


def test_a_percentile_leaves_out_the_same_share_on_each_side() -> None:
    low, high = Percentile(0.9).find(torch.arange(-50.0, 51)[None], Granularity(), _unused)
    assert (low.item(), high.item()) == (-40, 40)


def _unused(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    raise AssertionError("this rule does not need to round")


@settings(max_examples=6)
@given(seed=seeds)
def test_alternatives_are_never_worse_than_any_of_them_alone(seed: int) -> None:
    features = torch.nn.functional.silu(normal(seed, 6, 12))
    formats = tuple(parse_format(name) for name in ("uint4", "log_uniform_4", "power_4"))
    best = fit(QuantSpec(formats[0], range=ByCriterion(), alternatives=formats[1:]), features)
    for fmt in formats:
        alone = fit(QuantSpec(fmt, range=ByCriterion()), features)
        assert CRITERIA["tdscore"](features, best(features)) >= CRITERIA["tdscore"](features, alone(features))


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("bits", range(2, 9))
@given(rows=st.integers(0, 4), count=st.integers(0, 33), seed=seeds)
def test_unpacking_undoes_packing(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_width(count, bits))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_of_another_width_are_refused(bits: int) -> None:
    with pytest.raises(CheckpointError, match=rf"16 codes of {bits} bits take {2 * bits} bytes a row, got {2 * bits + 1}"):
        unpack(torch.zeros(2, 2 * bits + 1, dtype=torch.uint8), bits, 16)


# ---------------------------------------------------------------- the quantizer

GROUPS = [Granularity("group", 2, axis=-1), Granularity("group", 2, axis=1)]  # of channels of an input
GRAINS = [*WEIGHT_GRAINS, *GROUPS, Granularity("channel", axis=-1), *OF_INPUTS]


@every_format
@pytest.mark.parametrize("granularity", GRAINS, ids=lambda g: f"{g}@{g.axis}")
def test_codes_dequantize_to_what_calling_gives(fmt: NumberFormat, granularity: Granularity) -> None:
    x = normal(3, 4, 3, 5)
    quantizer = bind(fmt, granularity, *bounds(x, granularity))
    codes = quantizer.codes(x)
    assert codes.shape == x.shape
    assert torch.equal(quantizer.dequantize(codes), quantizer(x))


@pytest.mark.parametrize("grain", [Granularity("tensor"), Granularity("channel"), Granularity("group", 8)], ids=str)
@pytest.mark.parametrize("name", ["int8", "uint4", "e4m3"])
def test_codes_chosen_a_few_units_at_a_time_are_those_of_the_whole(name: str, grain: Granularity, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(37, 20) * torch.logspace(-2, 2, 37)[:, None]
    spec = QuantSpec(parse_format(name), grain, Mse(candidates=5))
    whole = fit(spec, x)
    codes, values = whole.codes(x), whole(x)
    for size in (1, 50):
        monkeypatch.setattr("reelquant.formats.quantizer.VALUES_AT_ONCE", size)
        parts = fit(spec, x)
        assert torch.equal(parts.scale, whole.scale) and torch.equal(parts.codes(x), codes)
        assert torch.equal(parts.dequantize(codes), values)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantizer_computes_in_float32_and_keeps_the_dtype(fmt: NumberFormat, dtype: torch.dtype) -> None:
    x = normal(5, 4, 6).to(dtype)
    quantizer = bind(fmt, Granularity("channel"), *bounds(x, Granularity("channel")))
    assert quantizer(x).dtype == dtype
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))


@pytest.mark.parametrize("name", ["int4", "uint4", "int8", "e2m1", "e4m3", "log2_4", "power_4"])
@pytest.mark.parametrize("granularity", [*WEIGHT_GRAINS, Granularity("group", 5)], ids=str)
@given(seed=seeds, cuts=st.lists(st.integers(1, 11), max_size=4, unique=True))
def test_columns_are_rounded_as_in_the_whole_matrix(name: str, granularity: Granularity, seed: int, cuts: list[int]) -> None:
    weight = normal(seed, 5, 12)
    quantizer = fit(QuantSpec(parse_format(name), granularity), weight)
    edges = [0, *sorted(cuts), 12]
    pieces = [quantizer.round_columns(weight[:, a:b], a) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(pieces, 1), quantizer(weight))


@pytest.mark.parametrize("granularity", [Granularity("token", axis=-1), Granularity("sample", axis=-1), Granularity("frame", 2)], ids=str)
def test_columns_cannot_have_the_granularity_of_an_input(granularity: Granularity) -> None:
    weight = normal(0, 4, 6)
    quantizer = fit(QuantSpec(parse_format("int8"), granularity), weight)
    with pytest.raises(UnsupportedError, match=f"weights cannot have granularity '{granularity}'"):
        quantizer.round_columns(weight, 0)


@pytest.mark.parametrize("granularity", GRAINS, ids=lambda g: f"{g}@{g.axis}")
@pytest.mark.parametrize("name", FORMATS)
def test_a_tensor_of_zeros_stays_zero(name: str, granularity: Granularity) -> None:
    x = torch.zeros(4, 6)
    assert torch.equal(fit(QuantSpec(parse_format(name), granularity), x)(x), x)


@pytest.mark.parametrize("name", EXACT_ZERO)
@pytest.mark.parametrize("offset", [-3.0, 0.0, 3.0])
def test_zero_is_exact_among_other_values(name: str, offset: float) -> None:
    x = normal(1, 4, 6) + offset
    x[:, 2] = 0
    quantizer = fit(QuantSpec(parse_format(name), Granularity("channel")), x)
    assert not quantizer(x)[:, 2].any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("exponent", [-110, -33, 33, 124])
def test_values_of_any_size_are_rounded_alike(name: str, exponent: int) -> None:
    """Times a power of two is exact in every step, so nothing may differ at all."""
    x = torch.tensor([[-0.93, 0.11, 0.0, 1.0, 0.57], [0.99, -1.0, 0.4, -0.04, -0.3]])
    fmt, size = parse_format(name), 2.0**exponent
    one, other = (bind(fmt, Granularity(), *bounds(v, Granularity()))(v) for v in (x, x * size))
    assert torch.equal(other, (one.double() * size).float())


def test_the_width_of_an_affine_range_does_not_overflow() -> None:
    x = torch.tensor([-3e38, 0.0, 3e38])  # 6e38 does not fit in float32
    assert fit(QuantSpec(parse_format("uint8")), x).scale.item() == pytest.approx(6e38 / 255)
    assert fit(QuantSpec(parse_format("uint8")), x)(x).tolist() == pytest.approx([-3e38, 0, 3e38], abs=0.51 * 6e38 / 255)


@pytest.mark.parametrize("granularity", WEIGHT_GRAINS, ids=str)
def test_subnormal_values_become_zero_not_nan(granularity: Granularity) -> None:
    x = torch.full((2, 4), 1e-42)
    assert x.any()
    assert not fit(QuantSpec(parse_format("int8"), granularity), x)(x).any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_value_breaks_its_unit_visibly(name: str, broken: float) -> None:
    x = torch.tensor([[1.0, 2.0, broken], [1.0, 2.0, 3.0]])
    fmt = parse_format(name)
    result = bind(fmt, Granularity("channel"), *bounds(x, Granularity("channel")))(x)
    assert not result[0].isfinite().any()
    assert result[1].isfinite().all()


@given(seed=seeds)
def test_the_same_rule_at_run_time_gives_the_same_quantizer(seed: int) -> None:
    x = normal(seed, 2, 3, 8)
    spec = QuantSpec(parse_format("uint6"), Granularity("token", axis=-1), dynamic=True)
    assert torch.equal(dynamic(spec, x)(x), fit(spec, x)(x))


@given(seed=seeds)
def test_a_range_search_is_not_disturbed_by_half_precision(seed: int) -> None:
    """In bfloat16 the error of an 8-bit grid is as small as the rounding of the values themselves: the search must not see that."""
    low = torch.randn(4000, generator=torch.Generator().manual_seed(seed)).bfloat16()
    for rule in (Mse(), ByCriterion("nmse")):
        half, full = (dynamic(QuantSpec(parse_format("int8"), range=rule), v) for v in (low, low.float()))
        assert torch.equal(half.scale, full.scale)


def test_a_quantizer_is_built_of_plain_tensors() -> None:
    quantizer = fit(QuantSpec(parse_format("uint8"), Granularity("channel")), normal(0, 3, 4))
    assert type(quantizer) is Quantizer
    assert quantizer.scale.dtype == torch.float32
    assert quantizer.zero_point is not None
    assert torch.equal(quantizer.zero_point, quantizer.zero_point.round())


# ---------------------------------------------------------------- scales of eight bits

SYMMETRIC = [name for name, make in FORMATS.items() if not make().needs_zero_point]
every_scale = pytest.mark.parametrize("scale", SCALES)
every_symmetric = pytest.mark.parametrize("name", SYMMETRIC)


@every_scale
@every_symmetric
@settings(max_examples=6)
@given(seed=seeds, axis=st.sampled_from([0, 1, -1]))
def test_stored_scales_are_those_that_rounded(name: str, scale: str, seed: int, axis: int) -> None:
    x = normal(seed, 3, 5, 4)
    quantizer = fit(QuantSpec(parse_format(name), Granularity("group", 3, axis, scale)), x)
    stored, beside = scale_tensors(scale, quantizer.scale, quantizer.whole, quantizer.granularity.scale_dtype)
    assert stored.dtype == torch.uint8 and stored.shape == quantizer.scale.shape
    assert torch.equal(read_scales(scale, stored, beside.get("_2")), quantizer.scale)
    assert torch.equal(quantizer.dequantize(quantizer.codes(x)), quantizer(x))


@every_scale
@every_symmetric
def test_zeros_stay_zeros_beside_other_groups_and_alone(name: str, scale: str) -> None:
    grain = Granularity("group", 2, -1, scale)
    spec = QuantSpec(parse_format(name), grain)
    x = torch.tensor([[0.0, 0.0, 1.0, -2.0], [0.0, 0.0, 1e-42, 0.0]])
    zeros = torch.zeros(2, 4)
    for values in (x[:, :2], zeros):
        assert torch.equal(fit(spec, values)(values), values)
    assert not fit(spec, x)(x)[:, :2].any() or name.startswith("power")
    assert bool(fit(spec, x)(x).isfinite().all())


@every_scale
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_tensors_have_scales_of_eight_bits(scale: str, shape: tuple[int, ...]) -> None:
    for axis in (0, -1):
        quantizer = fit(QuantSpec(parse_format("e2m1"), Granularity("group", 2, axis, scale)), torch.zeros(shape))
        assert quantizer(torch.zeros(shape)).shape == shape and not len(quantizer.scale)


@every_scale
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_value_shows_with_scales_of_eight_bits(scale: str, broken: float) -> None:
    x = torch.tensor([[1.0, 2.0, broken, 1.0]])
    assert not fit(QuantSpec(parse_format("e2m1"), Granularity("group", 2, -1, scale)), x)(x)[0, 2:].isfinite().any()


@every_scale
def test_formats_with_zero_points_have_no_scales_of_eight_bits(scale: str) -> None:
    with pytest.raises(RecipeError, match=f"uint4 has zero points, and scale: {scale} has none"):
        fit(QuantSpec(parse_format("uint4"), Granularity("group", 2, 0, scale)), torch.ones(2, 4))
    with pytest.raises(RecipeError, match=f"scale: {scale} belongs to groups"):
        Granularity("channel", scale=scale)
