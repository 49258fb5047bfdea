"""A denoiser in the style of research code: its own argument names, a forward that no pipeline calls, and a loop around it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, TEXT, SHAPE = 32, 16, (1, 4, 2, 8, 8)
WORDS = ("red", "blue", "ball", "box", "moves", "left", "right", "a")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(TEXT, 2 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, tokens: Tensor, time: Tensor, text: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(functional.silu(time))[:, None].chunk(3, -1)
        q, k, v = self.qkv(self.norm(tokens) * (1 + scale) + shift).chunk(3, -1)
        tokens = tokens + gate * self.proj(functional.scaled_dot_product_attention(q, k, v))
        k, v = self.kv(text).chunk(2, -1)
        tokens = tokens + functional.scaled_dot_product_attention(self.q(self.norm(tokens)), k, v)
        return tokens + self.mlp(self.norm(tokens))


class Core(nn.Module):
    """Noise prediction for latents ``[b, 4, t, h, w]``."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 16)
        self.register_buffer("places", torch.randn(1, 32, WIDTH) * 0.1)

    def predict(self, latent: Tensor, time: Tensor, text: Tensor) -> Tensor:
        tokens = self.embed(latent)
        b, _, t, h, w = tokens.shape
        tokens = tokens.flatten(2).mT + self.places
        angles = time.float()[:, None] * torch.exp(torch.arange(WIDTH // 2) * (-math.log(1000) / WIDTH))[None]
        now = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        for block in self.blocks:
            tokens = block(tokens, now, text)
        return self.head(tokens).reshape(b, t, h, w, 4, 2, 2).permute(0, 4, 1, 2, 5, 3, 6).reshape(b, 4, t, 2 * h, 2 * w)


class OwnDiT(Core):
    """Argument names of research code."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.predict(x, t, y)


class Nameless(Core):
    """No name tells anything; ``t`` is the number of frames."""

    def forward(self, z: Tensor, idx: Tensor, c: Tensor, t: int = 2) -> Tensor:
        return self.predict(z, idx, c)


def embedded(text: str) -> Tensor:
    """Random but fixed vectors for the words of a text."""
    rows = [torch.randn(TEXT, generator=torch.Generator().manual_seed(sum(map(ord, word)))) for word in (text.split() or ["-"])[:8]]
    return torch.stack(rows + [torch.zeros(TEXT)] * (8 - len(rows)))[None]


def sampler(module: Any, prompt: str, generator: torch.Generator, steps: int = 4, scale: float = 2.0) -> Tensor:
    """Flow matching with guidance in one call."""
    latent = torch.randn(SHAPE, generator=generator)
    text = torch.cat([embedded(prompt), embedded("")])
    for i in range(steps):
        t = torch.full((2,), 1000.0 * (1 - i / steps))
        with_text, without = module(torch.cat([latent, latent]), t, text).chunk(2)
        latent -= (without + scale * (with_text - without)) / steps
    return latent


def decode(latents: Tensor) -> Tensor:
    """Three of the channels as colours: frames ``[t, 3, h, w]``."""
    return latents[0, :3].movedim(1, 0).sigmoid()
