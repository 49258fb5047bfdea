"""Which layers make the values of attention and which one reads what comes of them: told by mixing the channels of heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant.discover import discover
from tests.tiny.configs import TINY

HEADS, WIDTH = 2, 4
CHANNELS = HEADS * WIDTH
Between = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    """Attention with something between the values and the output projection.

    Args:
        values, mixed: what happens to the values ``[b, tokens, channels]`` before attention, and to what attention makes of them.
        rows: output channels of the value projection.
    """

    def __init__(self, values: Between, mixed: Between, rows: int = CHANNELS) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, CHANNELS), nn.Linear(8, CHANNELS), nn.Linear(8, rows)
        self.to_out, self.values, self.mixed = nn.Linear(CHANNELS, 8), values, mixed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for one in (self.to_q(x), self.to_k(x), self.values(self.to_v(x))))
        return self.to_out(self.mixed(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class Denoiser(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(8, 8), attention, nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.first(sample * timestep)
        return self.last(x + self.attention(x).sin())


def heads(attention: nn.Module) -> dict[str, tuple[int, int]]:
    """Heads of the layers that have any, on both sides."""
    torch.manual_seed(0)
    found = discover(Denoiser(attention), {"sample": torch.randn(1, 4, 8), "timestep": torch.tensor(0.5)})
    return {name: (one.heads_out, one.heads_in) for name, one in found.layers.items() if one.heads_out or one.heads_in}


def same(x: Tensor) -> Tensor:
    return x


def by_head(x: Tensor) -> Tensor:
    return (x.unflatten(-1, (HEADS, WIDTH)) * torch.tensor([0.5, 2.0])[:, None]).flatten(-2)


def by_channel(x: Tensor) -> Tensor:
    return x * torch.linspace(0.5, 2, CHANNELS)


@pytest.mark.parametrize("mixed", [same, by_head])
def test_values_that_attention_alone_mixes_have_heads(mixed: Between) -> None:
    assert heads(Attention(same, mixed)) == {"attention.to_v": (HEADS, 0), "attention.to_out": (0, HEADS)}


@pytest.mark.parametrize(
    ("values", "mixed"),
    [(torch.relu, same), (same, torch.relu), (same, by_channel), (lambda v: F.layer_norm(v, (CHANNELS,)), same), (same, torch.sigmoid)],
    ids=["an activation of values", "an activation behind", "a gate of channels", "a norm of values", "a sigmoid"],
)
def test_what_treats_channels_apart_is_seen(values: Between, mixed: Between) -> None:
    assert heads(Attention(values, mixed)) == {}


def test_shared_values_and_fused_projections_have_none() -> None:
    def shared(v: Tensor) -> Tensor:
        return torch.cat([v] * HEADS, -1)

    assert heads(Attention(shared, same, WIDTH)) == {}
    assert heads(Attention(lambda v: v[..., :CHANNELS], same, 2 * CHANNELS)) == {}


class Gated(nn.Module):
    """A feed-forward whose first layer has as many rows as the second has columns, beside attention of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, CHANNELS), nn.Linear(8, CHANNELS), nn.Linear(CHANNELS, 8)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        x = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        return self.down(self.up(x) * F.silu(self.gate(x)))


def test_a_gated_feed_forward_is_no_attention() -> None:
    assert heads(Gated()) == {}


@pytest.mark.parametrize(
    ("cls", "pairs"), [("WanTransformer3DModel", 4), ("UNetMotionModel", 22), ("MochiTransformer3DModel", 0), ("FluxTransformer2DModel", 0)]
)
def test_stock_denoisers(cls: str, pairs: int) -> None:
    """Joint attention over text and latent has two layers that make values, so Mochi and Flux have none."""
    found = discover(TINY[cls]())
    values = [name for name, layer in found.layers.items() if layer.heads_out]
    readers = [group for group in found.groups if found.layers[group.name].heads_in]
    assert len(values) == pairs and sorted(values) == sorted(str(group.source) for group in readers)
    assert all(found.layers[group.name].heads_in == found.layers[str(group.source)].heads_out for group in readers)
