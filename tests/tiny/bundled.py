"""The bundled pipelines, quantized once per process with everything that keeps state beside the parameters: kernels, tables, a clock."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import reelquant
from reelquant.discover import denoiser_of
from reelquant.models.sampling import sample
from reelquant.nn.around.fuse import part_activations
from tests.tiny.stock import realigned

NAMES = ("tiny-dit", "tiny-unet")
PIPELINES = [name if name == "tiny-dit" else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
"""Parameters of tests that take both pipelines in ``make test-all``, and the smaller one in ``make test``."""
PROMPT = ["a red ball"]
RECIPE: dict[str, Any] = {
    "name": "everyday",
    "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": {"format": "int8"}},
    "rules": [
        {"on": "role:entry | role:exit", "keep": True},
        {"on": "*.to_v", "weight": {"format": "int4", "granularity": "group-16"}},
        {"on": "*.to_k", "input": None},
        {"on": "maybe:*.net.2", "input": {"format": "int8", "slots": "per_step"}},
    ],
    "temporal": "table",
    "calibrate": {"prompts": 1, "steps": 2},
    "steps": [{"transform": "shift", "center": "mid", "on": "role:main"}],
}
CALL = {"num_inference_steps": 2, "num_frames": 5}


@functools.cache
def quantized(name: str) -> Any:
    """The pipeline as it was quantized in memory; tests must not change it."""
    pipe = reelquant.open_pipeline(name)
    reelquant.quantize(pipe, RECIPE, PROMPT, **CALL)
    return quiet(pipe)


@functools.cache
def folder(name: str) -> Path:
    """The same, saved."""
    return reelquant.save(quantized(name), Path(tempfile.mkdtemp(prefix="reelquant-")) / name)


def opened(name: str) -> Any:
    """The same, opened again by stock diffusers."""
    return quiet(DiffusionPipeline.from_pretrained(folder(name)))


def quiet(pipe: Any) -> Any:
    """Without progress bars."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe: Any) -> Any:
    """Its transformer or UNet."""
    return denoiser_of(pipe)[1]


def latents(pipe: Any, *, seed: int = 1, **call: Any) -> Tensor:
    """Final latents of a clip."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and not hasattr(part, "_hf_hook"):
            realigned(part)
    with torch.no_grad():
        return sample(pipe, PROMPT, seed=seed, output="latent", **CALL | call)


@functools.cache
def expected(name: str) -> Tensor:
    """What the pipeline in memory gives."""
    return latents(quantized(name))


@functools.cache
def apart(name: str) -> Tensor:
    """The same, activations computed by torch, as they are where adapters, hooks or offloading want every layer to be called.

    An activation in a kernel and one of torch are an ulp apart, which may turn a code.
    """
    pipe = opened(name)
    part_activations(denoiser(pipe))
    return latents(pipe)


def is_expected(found: Tensor, name: str) -> bool:
    """Whether latents are those of the pipeline in memory, bit by bit, with activations in kernels or apart."""
    return torch.equal(found, expected(name)) or torch.equal(found, apart(name))


CPU = torch.device("cpu")
Mode = Callable[[Any, Any], Any]


def group_offloaded(level: str) -> Mode:
    groups = {"num_blocks_per_group": 1} if level == "block_level" else {}
    return lambda pipe, model: model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=level, **groups)


def model_offloaded(pipe: Any, model: Any) -> None:
    """``enable_model_cpu_offload`` wants an accelerator; this is the hook that it puts on every component."""
    for part in (pipe.text_encoder, model):
        cpu_offload_with_hook(part, CPU)


OFFLOAD: dict[str, Mode] = {
    "model offload": model_offloaded,
    "sequential offload": lambda pipe, model: cpu_offload(model, CPU, offload_buffers=True),
    "sequential offload, buffers stay": lambda pipe, model: cpu_offload(model, CPU),
    "group offload by block": group_offloaded("block_level"),
    "group offload by leaf": group_offloaded("leaf_level"),
}
"""What offloads to the CPU, computing there too: the hooks that diffusers' own methods put on models where there is an accelerator."""

OF_THE_UNET = ("model offload", "group offload by leaf", "reset attention")


def cases(modes: Iterable[str]) -> list[Any]:
    """(pipeline, mode): every mode with the transformer, few with the UNet in ``make test``: its 300 layers take long to move."""
    return [
        pytest.param(name, mode, marks=pytest.mark.full if name == "tiny-unet" and mode not in OF_THE_UNET else ())
        for name in NAMES
        for mode in modes
    ]
