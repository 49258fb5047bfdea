"""A sampler around a tiny denoiser that behaves like a diffusers pipeline: prompts, one generator per clip, CFG, five lines of Euler."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

FRAMES = 2


class FakePipeline:
    """Enough of a pipeline for :func:`reelquant.engine.run.quantize_pipeline`."""

    def __init__(self, denoiser: nn.Module, *, guided: bool = False) -> None:
        self.name = "unet" if "UNet" in type(denoiser).__name__ else "transformer"
        self.components = {self.name: denoiser}
        self.config: dict[str, Any] = {}
        self.guided = guided
        self.calls: list[list[str]] = []
        self.bars: list[bool] = []

    @property
    def denoiser(self) -> nn.Module:
        return self.components[self.name]

    def set_progress_bar_config(self, **config: Any) -> None:
        self.bars.append(config["disable"])

    def __call__(
        self, prompt: list[str], generator: list[torch.Generator], output_type: str = "latent", num_inference_steps: int = 3,
        callback_on_step_end: Any = None,
    ) -> Any:  # fmt: skip
        self.calls.append(prompt)
        x = torch.stack([torch.randn(4, FRAMES, 8, 8, generator=one) for one in generator])
        for step in range(num_inference_steps):
            timestep = torch.tensor(1000 * (1 - step / num_inference_steps))
            change = self.denoise(x, timestep, prompt)
            if self.guided:
                change = 1.5 * change - 0.5 * self.denoise(x, timestep, ["" for _ in prompt])
            x = x - change / num_inference_steps
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, timestep, {})
        return SimpleNamespace(frames=x)

    def denoise(self, x: Tensor, timestep: Tensor, prompt: Sequence[str]) -> Tensor:
        text = torch.stack([torch.randn(5, 16, generator=torch.Generator().manual_seed(sum(one.encode()))) for one in prompt])
        if self.name == "unet":  # AnimateDiff repeats the prompt for every frame
            return self.denoiser(x, timestep, encoder_hidden_states=text.repeat_interleave(FRAMES, 0), return_dict=False)[0]
        times = timestep.expand(len(x))
        return self.denoiser(hidden_states=x, timestep=times, encoder_hidden_states=text, return_dict=False)[0]


def call(denoiser: Any, timestep: float) -> Tensor:
    """The denoiser at some timestep, always on the same latents."""
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 2, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return denoiser(hidden_states=x, timestep=torch.full((2,), timestep), encoder_hidden_states=text, return_dict=False)[0]
