"""Runs of floats to codes, and their ends, against numpy: in vectors and what is left of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reelquant.kernels.cpu import loops

LENGTHS = (1, 15, 16, 17, 64, 75)


def given(length: int, short: bool) -> tuple[Any, Any]:
    """Three rows as loops read them, and as float32."""
    x = torch.randn(3, length, generator=torch.Generator().manual_seed(length)) * 3
    x = x.bfloat16() if short else x
    return loops.view(x), x.float().numpy()


@pytest.mark.parametrize("kind", [np.uint8, np.int16])
@pytest.mark.parametrize("rewrites", [False, True])
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_codes_are_rounded_and_clamped(length: int, short: bool, rewrites: bool, kind: type[np.generic]) -> None:
    x, floats = given(length, short)
    multiply, add = (np.full(length, one, np.float32) for one in (0.5, 0.25)) if rewrites else (loops.NONE, loops.NONE)
    codes = np.empty((3, length), kind)
    numbers = np.float32(16), np.float32(100), np.float32(90), np.float32(120)
    assert not loops.quantize_rows(0, 3, x, 1, multiply, add, *numbers, codes)
    value = (floats * np.float32(0.5) + np.float32(0.25) if rewrites else floats) * np.float32(16) + np.float32(100)
    assert np.array_equal(codes, np.clip(np.rint(value), 90, 120).astype(kind))
    assert codes.min() == 90 or codes.max() == 120 or length < 15


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("length", LENGTHS)
def test_what_is_no_finite_number_is_seen_wherever_it_is(length: int, value: float, place: int) -> None:
    x, codes = np.ones((1, length), np.float32), np.empty((1, length), np.uint8)
    numbers = np.float32(1), np.float32(0), np.float32(0), np.float32(255)
    assert not loops.quantize_rows(0, 1, x, 1, loops.NONE, loops.NONE, *numbers, codes)
    x[0, place] = value
    assert loops.quantize_rows(0, 1, x, 1, loops.NONE, loops.NONE, *numbers, codes)
    scales, levels = np.empty(1, np.float32), np.array([128, 127], np.float32)
    assert loops.quantize_tokens(0, 1, x, 1, loops.NONE, loops.NONE, np.float32(128), levels, codes, scales)


@pytest.mark.parametrize("rewrites", [False, True])
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_scale_covers_its_row_and_no_more(length: int, short: bool, rewrites: bool) -> None:
    x, floats = given(length, short)
    multiply, add = (np.full(length, one, np.float32) for one in (0.5, 9.0)) if rewrites else (loops.NONE, loops.NONE)
    codes, scales, levels = np.empty((3, length), np.uint8), np.empty(3, np.float32), np.array([128, 127], np.float32)
    assert not loops.quantize_tokens(0, 3, x, 1, multiply, add, np.float32(128), levels, codes, scales)
    value = floats * np.float32(0.5) + np.float32(9) if rewrites else floats  # all are positive where rewritten: zero is not among them
    expected = np.maximum(np.maximum(-value.min(1) / 128, value.max(1) / 127), loops.LEAST)
    assert np.allclose(scales, expected, rtol=1e-6)
    assert np.abs((codes - 128.0) * scales[:, None] - value).max() <= scales.max() * 0.5001


def test_a_border_has_the_codes_of_zero_and_the_inside_is_left_alone() -> None:
    memory = np.full((2, 1, 4, 5, 3), 7, np.uint8)
    loops.write_border(np.array([[1, 2, 3], [4, 5, 6]], np.uint8), np.array([0, 1, 1, 4, 2, 4]), memory)
    assert (memory[:, :, 1:4, 2:4] == 7).all()
    for n, line in enumerate(([1, 2, 3], [4, 5, 6])):
        around = np.ones((1, 4, 5), bool)
        around[:, 1:4, 2:4] = False
        assert (memory[n][around] == line).all()
