"""Powers of two and activations of the loops, against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reelquant.kernels.activations import ACTIVATIONS
from reelquant.kernels.cpu import powers

EPS = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("name", [name for name in powers.ACTIVATION_CODES if name])
def test_activations_are_as_exact_as_float32(name: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 40_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 3e4, -3e4])])
    found = x.numpy().copy()
    powers.activate(found, powers.ACTIVATION_CODES[name])
    expected = ACTIVATIONS[name](x.double())
    error = (torch.from_numpy(found).double() - expected).abs()
    assert bool((error <= 3 * EPS * (x.double().abs() + expected.abs())).all())  # of factors that are off by an eps or two


def test_no_activation_changes_nothing() -> None:
    x = np.linspace(-3, 3, 100, dtype=np.float32)
    found = x.copy()
    powers.activate(found, powers.ACTIVATION_CODES[""])
    assert np.array_equal(found, x)


def test_every_activation_of_the_table_is_there() -> None:
    assert set(powers.ACTIVATION_CODES) == {"", *ACTIVATIONS}


@pytest.mark.parametrize(
    ("exponent", "expected"), [(0.0, 1.0), (1.0, 2.0), (-1.0, 0.5), (10.0, 1024.0), (-126.0, 2.0**-126), (-500.0, 2.0**-126)]
)
def test_whole_powers_are_exact_and_small_ones_stay_normal(exponent: float, expected: float) -> None:
    assert float(powers.power(np.float32(exponent))) == expected
