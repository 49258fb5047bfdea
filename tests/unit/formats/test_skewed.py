"""What the searches of the skewed formats find."""

from __future__ import annotations

import pytest
import torch

from reelquant.formats import CRITERIA, Granularity, LogUniform, Power, QuantSpec, bind, fit, parse_format
from reelquant.formats.ranges import bounds
from reelquant.formats.skewed import TAUS, Log2

nmse = CRITERIA["nmse"]


def test_power_finds_the_power_that_made_the_values() -> None:
    values = 5 * torch.linspace(0, 1, 16) ** 2.5
    fitted = Power(4).fit(values, nmse)
    assert isinstance(fitted, Power)
    assert (fitted.gamma, fitted.bottom) == (2.5, 0.0)
    assert nmse(values, bind(fitted, Granularity(), *bounds(values, Granularity()))(values)) > -1e-12


def test_log2_finds_the_octaves_that_made_the_values() -> None:
    magnitudes = 3 * torch.exp2(-torch.arange(7) / 4)
    fitted = Log2(4).fit(torch.cat([-magnitudes, magnitudes]), nmse)
    assert isinstance(fitted, Log2)
    assert fitted.tau == 4


@pytest.mark.parametrize("few", [3, 30])
def test_log_uniform_is_searched_with_the_scale_it_gets(few: int) -> None:
    """Negative levels end at the edge, so an edge below the lowest value needs a larger scale: the search has to count that."""
    values = torch.cat([torch.rand(400) ** 6, -0.3 * torch.rand(few), torch.tensor([1.0, -0.3])])
    fitted = LogUniform(4).fit(values, nmse)
    edges = torch.linspace(0.02, 0.95, 40).tolist()
    grid = [LogUniform(4, edge, tau) for edge in edges for tau in TAUS]
    best = max(float(nmse(values, bind(f, Granularity(), *bounds(values, Granularity()))(values))) for f in grid)
    found = float(nmse(values, bind(fitted, Granularity(), *bounds(values, Granularity()))(values)))
    assert found >= 1.1 * best  # both negative; the two grids of edges differ a little


def test_a_skewed_tail_is_kept_better_by_skewed_formats_than_by_uniform_ones() -> None:
    """The case of the temporal features: most values close to zero, few large ones."""
    values = torch.nn.functional.silu(2 * torch.randn(25, 256) - 4)
    loss = {n: -float(nmse(values, fit(QuantSpec(parse_format(n)), values)(values))) for n in ("uint4", "log_uniform_4", "power_4")}
    assert loss["power_4"] < loss["uint4"] / 2
    assert loss["log_uniform_4"] < loss["uint4"] / 2


def test_all_zero_and_constant_values_can_be_fitted() -> None:
    for values in (torch.zeros(4, 4), torch.full((4, 4), 2.0), torch.full((4, 4), -2.0)):
        for name in ("log2_4", "log_uniform_4", "power_4"):
            result = fit(QuantSpec(parse_format(name)), values)(values)
            assert (result - values).abs().max() <= 2 * 2.0**-11  # levels are stored as float16
