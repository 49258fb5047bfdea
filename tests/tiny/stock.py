"""A stock Wan pipeline of tiny random parts, a sampler for any tiny denoiser, and a recipe that uses everything that can be stored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

import reelquant
from reelquant.discover import dummy_inputs
from reelquant.engine.report import Report
from reelquant.models.sampling import sample, write_notes
from tests.tiny.configs import TINY

PROMPTS = ["a red ball", "a blue box"]
CALL = {"num_inference_steps": 3, "num_frames": 5, "height": 16, "width": 16, "max_sequence_length": 8}

MIXED: dict[str, Any] = {
    "name": "mixed",
    "defaults": {"weight": {"format": "int4", "granularity": "group-16"}, "input": {"format": "uint8"}},
    "rules": [
        {"on": "role:entry | role:exit", "keep": True},
        {"on": "role:prompt", "weight": {"format": "uint3", "granularity": "channel"}, "input": None},
        {"on": "role:temporal", "weight": {"format": "int8", "granularity": "tensor"}, "input": {"format": "log_uniform_8"}},
        {
            "on": "*.net.2",
            "weight": {"format": "log_uniform_5", "granularity": "channel"},
            "input": {"format": "int8", "slots": "per_step"},
        },
    ],
    "calibrate": {"prompts": 2, "steps": 3},
    "steps": [
        {"transform": "shift", "center": "mid", "on": "role:main"},
        {"transform": "range_integrate", "power": 0.5, "on": "role:main"},
    ],
}
"""Needs every kind of stored tensor: groups, zero points, levels, steps, shifts and channel scales."""


def room(more: int = 10**9) -> str:
    """A ``--max-memory`` with this many bytes beside what this process holds already, which is what the tests before left."""
    return str(psutil.Process().memory_info().rss + more)


def wan_pipeline() -> WanPipeline:
    """The same pipeline every time: 5 frames of 16 x 16 pixels in a few milliseconds a step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4, scale_factor_temporal=2, scale_factor_spatial=2,
        )  # fmt: skip
        words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "blue", "ball", "box"])}
        text = UMT5EncoderModel(UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    pipe = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), text_encoder=text, vae=vae.eval(),
        transformer=TINY["WanTransformer3DModel"](), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stored_pipeline(folder: Path, pipe: Any = None, **options: Any) -> Path:
    """A pipeline on disk, :func:`wan_pipeline` by default, that says how it likes to be called."""
    (pipe or wan_pipeline()).save_pretrained(folder, **options)
    write_notes(folder, CALL, PROMPTS)
    return folder


def quantized_in_memory(
    folder: Path, recipe: Any, target: Path, dtype: torch.dtype = torch.float32, lora: Any = (), **overrides: Any
) -> Report:
    """Open a stored pipeline, quantize it and save it: what a run from disk to disk is compared with."""
    pipe = reelquant.open_pipeline(folder, dtype=dtype)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            realigned(part)
    report = reelquant.quantize(pipe, recipe, overrides=overrides, lora=lora)
    reelquant.save(pipe, target, report)
    return report


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which holds timings."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "report.json"
    }


def realigned(module: nn.Module) -> nn.Module:
    """The module with its weights moved to fresh memory.

    Loaded weights lie in the file, at odd addresses, for which matrix products may sum in another order (2e-7 were seen). Tests that
    ask for equal bits ask about values.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


def frames(pipe: Any, **call: Any) -> Tensor:
    """Two clips of a :func:`wan_pipeline`."""
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        realigned(part)
    return sample(pipe, PROMPTS, **{**CALL, **call})


class Bare:
    """The least that quantization asks of a pipeline: samples any denoiser on made-up arguments."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.unet = denoiser
        self.components, self.config, self.arguments = {"unet": denoiser}, {}, dummy_inputs(denoiser)

    def set_progress_bar_config(self, **options: Any) -> None: ...

    def __call__(self, prompt: list[str], generator: list[torch.Generator], output_type: str, num_inference_steps: int = 3) -> Any:
        return SimpleNamespace(frames=torch.cat([self._clip(noise, num_inference_steps) for noise in generator]))

    def _clip(self, generator: torch.Generator, steps: int) -> Tensor:
        name = next(key for key in ("hidden_states", "sample") if key in self.arguments)
        latent = torch.randn(self.arguments[name].shape, generator=generator)
        for step in range(steps):
            time = torch.full_like(torch.as_tensor(self.arguments["timestep"]), 900 - 300 * step)
            latent = latent - 0.3 * run(self.unet, self.arguments | {name: latent, "timestep": time})
        return latent


def run(denoiser: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """The output of one denoiser call."""
    with torch.no_grad():
        return denoiser(**arguments | {"return_dict": False})[0]
