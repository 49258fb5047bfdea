"""Exact numbers of every format, by hand or against torch's own casts."""

from __future__ import annotations

import pytest
import torch

from reelquant._errors import RecipeError
from reelquant.formats import FORMATS, Int, Levels, MiniFloat, parse_format, register_format
from reelquant.formats import number as number_module
from reelquant.formats import skewed as skewed_module


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("int2", -2, 1),
        ("int4", -8, 7),
        ("int8", -128, 127),
        ("uint2", 0, 3),
        ("uint8", 0, 255),
        ("e4m3", -448, 448),
        ("e5m2", -57344, 57344),
        ("e3m4", -15.5, 15.5),
        ("e3m2", -28, 28),
        ("e2m3", -7.5, 7.5),
        ("e2m1", -6, 6),
        ("e3m0", -16, 16),
        ("e1m2", -3.5, 3.5),
        ("log2_4", -1, 1),
        ("log_uniform_4", -0.25, 1),
        ("power_4", -1, 1),
    ],
)
def test_ends(name: str, low: float, high: float) -> None:
    fmt = parse_format(name)
    assert (fmt.low, fmt.high) == (low, high)


def test_integer_codes_count_from_the_lowest_number() -> None:
    assert Int(4).encode(torch.tensor([-8.0, -1.0, 0.0, 7.0])).tolist() == [0, 7, 8, 15]
    assert Int(4, signed=False).encode(torch.tensor([0.0, 1.0, 15.0])).tolist() == [0, 1, 15]


def test_integers_round_ties_to_even() -> None:
    assert Int(8).round(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("bits", [1, 9])
def test_integers_have_two_to_eight_bits(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"2 to 8 bits, got {bits}"):
        Int(bits)


QUARTERS, EIGHTHS = [1, 1.25, 1.5, 1.75], [1 + k / 8 for k in range(8)]


@pytest.mark.parametrize(
    ("name", "magnitudes"),
    [
        ("e3m0", [0, 0.25, 0.5, 1, 2, 4, 8, 16]),
        ("e1m2", [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
        ("e3m2", [0, 1 / 16, 2 / 16, 3 / 16] + [size * one for size in (0.25, 0.5, 1, 2, 4, 8, 16) for one in QUARTERS]),
        ("e2m3", [k / 8 for k in range(8)] + [size * one for size in (1, 2, 4) for one in EIGHTHS]),
        ("e3m4", [k / 64 for k in range(16)] + [size * (1 + k / 16) for size in (0.25, 0.5, 1, 2, 4, 8) for k in range(16)]),
    ],
)
def test_small_floats_have_these_numbers(name: str, magnitudes: list[float]) -> None:
    """The tables of the OCP Microscaling specification, and of ml_dtypes for e3m4, written out."""
    fmt, count = parse_format(name), len(magnitudes)
    codes = torch.arange(count, dtype=torch.uint8)
    assert fmt.decode(codes).tolist() == magnitudes
    assert fmt.decode(codes + 2 ** (fmt.bits - 1)).tolist() == [-value for value in magnitudes]
    assert torch.equal(fmt.encode(torch.tensor(magnitudes)), codes)
    assert count == 2 ** (fmt.bits - 1) - (16 if name == "e3m4" else 0)


@pytest.mark.parametrize("name", ["e3m4", "e3m2", "e2m3", "e2m1"])
def test_small_floats_are_those_of_ml_dtypes(name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    fmt, kind = parse_format(name), getattr(ml_dtypes, f"float8_{name}" if name == "e3m4" else f"float{parse_format(name).bits}_{name}fn")
    levels = fmt.levels()
    points = torch.cat([levels, (levels[1:] + levels[:-1]) / 2])
    assert fmt.round(points).tolist() == points.numpy().astype(kind).astype("float32").tolist()


def test_between_powers_of_two_ties_go_away_from_zero() -> None:
    assert parse_format("e3m0").round(torch.tensor([0.125, 0.375, 0.75, 1.5, 3, -3, 12])).tolist() == [0, 0.5, 1, 2, 4, -4, 16]


def test_e2m1_has_these_eight_magnitudes() -> None:
    fmt = MiniFloat(2, 1)
    assert fmt.decode(torch.arange(8, dtype=torch.uint8)).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert fmt.decode(torch.arange(8, 16, dtype=torch.uint8)).tolist() == [-0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert len(fmt.levels()) == 15  # the two zeros are one level


def test_e2m1_rounds_ties_to_the_even_mantissa() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert MiniFloat(2, 1).round(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_eight_bit_floats_are_torchs(name: str, dtype: torch.dtype) -> None:
    """Every bit pattern that is a number, every midpoint between two, and a hair on either side of it."""
    fmt = parse_format(name)
    patterns = torch.arange(256, dtype=torch.uint8)
    numbers = patterns.view(dtype).float()
    finite = numbers.isfinite()
    assert torch.equal(fmt.decode(patterns)[finite], numbers[finite])
    assert torch.equal(fmt.encode(numbers[finite]), patterns[finite])  # codes are the bit patterns of the hardware

    levels = numbers[finite].unique()
    middle = (levels[1:] + levels[:-1]) / 2
    points = torch.cat([levels, middle, middle.nextafter(levels[1:]), middle.nextafter(levels[:-1])])
    assert torch.equal(fmt.round(points), points.to(dtype).float())
    assert torch.equal(fmt.decode(fmt.encode(points)), points.to(dtype).float())


def test_small_floats_saturate_where_torch_gives_nan_or_inf() -> None:
    assert parse_format("e4m3").round(torch.tensor([465.0, -1e9])).tolist() == [448, -448]
    assert parse_format("e5m2").round(torch.tensor([61441.0, -1e9])).tolist() == [57344, -57344]


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e3m4", "e3m2", "e2m3", "e2m1", "e3m0", "e1m2"])
def test_small_floats_keep_nan_and_signs_of_zeros_and_round_float32_subnormals_to_zero(name: str) -> None:
    fmt = parse_format(name)
    rounded = fmt.round(torch.tensor([0.0, -0.0, 1e-42, -1e-42, float("nan"), float("inf")]))
    assert rounded[:4].tolist() == [0, 0, 0, 0]
    assert rounded[:4].signbit().tolist() == [False, True, False, True]
    assert rounded[4].isnan() and float(rounded[5]) == fmt.high


def test_reserved_codes_decode_to_the_largest_number_and_are_never_given() -> None:
    fmt = parse_format("e4m3")
    assert fmt.decode(torch.tensor([0x7F, 0xFF], dtype=torch.uint8)).tolist() == [448, -448]
    assert fmt.encode(torch.tensor([1e9, -1e9])).tolist() == [0x7E, 0xFE]


def test_log2_3_by_hand() -> None:
    """Eight codes: zero and three magnitudes of either sign use seven."""
    fmt = parse_format("log2_3")
    assert fmt.levels().tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    assert fmt.round(torch.tensor([0.74, 0.76, 0.13, 0.12, -0.3, -9.0])).tolist() == [0.5, 1, 0.25, 0, -0.25, -1]


def test_log_uniform_3_by_hand() -> None:
    """Edge 1/4, two levels an octave. Three small magnitudes would need sign and zero: one fits; four uniform steps from 1/4 to 1."""
    assert parse_format("log_uniform_3").levels().tolist() == [-0.25, 0, 0.25, 0.4375, 0.625, 0.8125, 1]


def test_power_2_by_hand() -> None:
    """-1 + 2 (i / 3)^2."""
    assert parse_format("power_2").levels().tolist() == pytest.approx([-1, -7 / 9, -1 / 9, 1], abs=1e-7)


def test_a_level_table_rounds_at_the_linear_midpoint() -> None:
    fmt = Levels(torch.tensor([-1.0, 0.0, 4.0]), bits=2)
    assert fmt.round(torch.tensor([-0.51, -0.49, 1.99, 2.01])).tolist() == [-1, 0, 0, 4]
    assert fmt.encode(torch.tensor([-9.0, 0.0, 9.0])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("values", [[1.0], [0.0, 1.0, 1.0], [1.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0], [[0.0, 1.0]]])
def test_a_level_table_is_a_sorted_vector_that_fits_the_bits(values: list[float]) -> None:
    with pytest.raises(RecipeError, match="a level table is a sorted vector of 2 to 4 distinct values, got shape"):
        Levels(torch.tensor(values), bits=2)


def test_an_unknown_format_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"unknown number format 'log_unifrm_6'; did you mean 'log_uniform_6'\?"):
        parse_format("log_unifrm_6")


def test_a_format_can_be_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reelquant.formats.FORMATS", dict(FORMATS))
    register_format("ternary", lambda: Levels(torch.tensor([-1.0, 0.0, 1.0]), 2, "ternary"))
    assert parse_format("ternary").levels().tolist() == [-1, 0, 1]
    with pytest.raises(RecipeError, match="'ternary' exists already"):
        register_format("ternary", lambda: Int(2))
    with pytest.raises(RecipeError, match="'int8' exists already"):
        register_format("int8", lambda: Int(2))


@pytest.mark.parametrize("name", ["e4m3", "log2_5", "log_uniform_5", "power_5"])
def test_tables_do_not_remember_the_defaults_of_the_first_caller(name: str) -> None:
    """diffusers builds models under a bfloat16 default and, to save memory, on the meta device."""
    expected = parse_format(name).levels()
    for cached in (number_module._magnitudes, skewed_module._log2_table, skewed_module._log_uniform_table, skewed_module._power_table):
        cached.cache_clear()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            parse_format(name).high  # noqa: B018  (fills the cache)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(parse_format(name).levels(), expected)
    assert torch.equal(parse_format(name).decode(parse_format(name).encode(expected)), expected)
