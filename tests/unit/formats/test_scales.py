"""Scales of eight bits, by hand and against torch's own types."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reelquant._errors import RecipeError
from reelquant.formats import Granularity, Mse, QuantSpec, fit, parse_format, scale_tensors


def grain(scale: str, size: int = 2) -> Granularity:
    return Granularity("group", size, -1, scale)


@pytest.mark.parametrize(
    ("name", "largest", "scale"),
    [
        ("e2m1", 6.0, 1.0),
        ("e2m1", 7.9, 1.0),  # the specification's: 7.9 saturates
        ("e2m1", 8.0, 2.0),
        ("e2m1", 3.99, 0.5),
        ("e4m3", 448.0, 1.0),
        ("e4m3", 1.0, 2.0**-8),
        ("e3m2", 16.0, 1.0),
        ("e2m3", 4.0, 1.0),
    ],
)
def test_powers_of_two_are_those_of_the_mx_specification(name: str, largest: float, scale: float) -> None:
    quantizer = fit(QuantSpec(parse_format(name), grain("e8m0")), torch.tensor([[0.1 * largest, -largest]]))
    assert quantizer.scale.tolist() == [scale]
    stored, beside = scale_tensors("e8m0", quantizer.scale, quantizer.whole, torch.uint8)
    assert torch.equal(stored.view(torch.float8_e8m0fnu).float(), quantizer.scale) and not beside


def test_beyond_the_largest_number_values_saturate() -> None:
    x = torch.tensor([[7.9, -6.5, 0.5, 0.3]])
    assert fit(QuantSpec(parse_format("e2m1"), grain("e8m0", 4)), x)(x).tolist() == [[6, -6, 0.5, 0.5]]


def test_nvfp4_by_hand() -> None:
    """The largest group scale becomes 448 times the tensor's number; a group a tenth as large gets the nearest e4m3 number, 44 of 44.8."""
    x = torch.tensor([[6 * 448.0, 1.0, 268.8, 100.0]])
    quantizer = fit(QuantSpec(parse_format("e2m1"), grain("e4m3")), x)
    assert quantizer.whole is not None and quantizer.whole.tolist() == [1.0]
    assert quantizer.scale.tolist() == [448.0, 44.0]
    assert quantizer(x).tolist() == [[2688.0, 0.0, 264.0, 88.0]]


def test_e4m3_scales_are_torchs() -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    quantizer = fit(QuantSpec(parse_format("e2m1"), grain("e4m3", 16)), x)
    largest = x.unflatten(1, (2, 16)).abs().amax(2).flatten()
    whole = x.abs().amax() / (6 * 448)
    expected = (largest / 6 / whole).to(torch.float8_e4m3fn)
    stored, beside = scale_tensors("e4m3", quantizer.scale, quantizer.whole, torch.uint8)
    assert torch.equal(stored.view(torch.float8_e4m3fn).float(), expected.float())
    torch.testing.assert_close(beside["_2"], whole.reshape(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", ["e4m3", "e8m0"])
def test_rows_that_are_fitted_apart_share_the_number_of_the_tensor(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(37, 20) * torch.logspace(-2, 2, 37)[:, None]
    spec = QuantSpec(parse_format("e2m1"), Granularity("group", 8, 0, scale), Mse(candidates=5))
    whole = fit(spec, x)
    monkeypatch.setattr("reelquant.formats.quantizer.VALUES_AT_ONCE", 50)
    assert torch.equal(fit(spec, x).scale, whole.scale)


def test_a_position_in_groups_of_channels_has_scales_of_its_own() -> None:
    """Wherever the channels are, what is rounded is each group of them by itself."""
    x = torch.randn(2, 6, 3, 4) * torch.logspace(-2, 2, 6)[:, None, None]

    def alone(x: Tensor) -> Tensor:
        scale = torch.maximum(x.amax(-1, keepdim=True).clamp(min=0) / 7, x.amin(-1, keepdim=True).clamp(max=0) / -8).bfloat16().float()
        return (x / scale).round().clamp(-8, 7) * scale

    last = x.movedim(1, -1)
    expected = torch.cat([alone(last[..., :4]), alone(last[..., 4:])], -1)
    for given, axis in ((last, -1), (x, 1)):
        found = fit(QuantSpec(parse_format("int4"), Granularity("group", 4, axis)), given)(given)
        assert torch.equal(found if axis == -1 else found.movedim(1, -1), expected)


def test_unknown_scales_are_refused() -> None:
    with pytest.raises(RecipeError, match="unknown scale 'e5m2'; known: float, e4m3, e8m0"):
        Granularity("group", 16, scale="e5m2")
