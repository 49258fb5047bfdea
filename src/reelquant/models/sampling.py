"""Run any diffusers pipeline the same way: prompts in, clips or latents out, one seed per clip."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reelquant._errors import CalibrationError

NOTES_FILE = "reelquant.json"  # beside model_index.json: {"call": {recommended arguments}, "prompts": [calibration texts]}


def notes(pipe: Any) -> dict[str, Any]:
    """What the pipeline's folder says about itself in ``reelquant.json``; empty if it says nothing."""
    file = Path(str(pipe.config.get("_name_or_path", ""))) / NOTES_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def write_notes(folder: str | Path, call: dict[str, Any], prompts: Sequence[str]) -> None:
    """Leave ``reelquant.json`` in a pipeline folder: the arguments it samples best with, and texts to calibrate it on."""
    Path(folder, NOTES_FILE).write_text(json.dumps({"call": call, "prompts": list(prompts)}, indent=2) + "\n")


def call_arguments(pipe: Any, **overrides: Any) -> dict[str, Any]:
    """Arguments for one call: the folder's recommendations, then overrides that are not None; unknown ones are left out."""
    accepted = inspect.signature(pipe.__call__).parameters
    chosen = notes(pipe).get("call", {}) | {key: value for key, value in overrides.items() if value is not None}
    return {key: value for key, value in chosen.items() if key in accepted}


@torch.no_grad()
def sample(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    batch: int = 4,
    output: Literal["frames", "latent"] = "frames",
    on_step: Callable[[], None] | None = None,
    **overrides: Any,
) -> Tensor:
    """Sample one clip per prompt; clip ``i`` starts from the noise of seed ``seed + i`` whatever the batch size.

    Args:
        pipe: a diffusers pipeline.
        prompts: one text per clip.
        seed: seed of the first clip.
        batch: clips per pipeline call.
        output: ``frames`` gives ``[clips, frames, 3, height, width]`` in [0, 1], ``latent`` the final latents.
        on_step: told after every denoising step (progress).
        overrides: arguments of the pipeline call, for example ``num_inference_steps``, ``guidance_scale``, ``num_frames``.

    Raises:
        CalibrationError: if there is no prompt.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not prompts:
        raise CalibrationError("no prompts: give at least one text")
    arguments = call_arguments(pipe, **overrides)
    if on_step is not None and "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        arguments["callback_on_step_end"] = lambda pipe, step, timestep, kwargs: (on_step(), kwargs)[1]
    parts = []
    with quiet(pipe):
        for start in range(0, len(prompts), batch):
            chunk = list(prompts[start : start + batch])
            noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
            result = pipe(prompt=chunk, generator=noise, output_type="latent" if output == "latent" else "pt", **arguments)
            parts.append(_tensor(result))
    return torch.cat(parts)


def _tensor(result: Any) -> Tensor:
    frames = result.frames if hasattr(result, "frames") else result.images
    return frames if isinstance(frames, Tensor) else torch.stack(list(frames))


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Silence the pipeline's own progress bar."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe._progress_bar_config = before or {}
