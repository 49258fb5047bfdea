"""Saved folders rewritten in the file formats of other projects: one file per format, one layer in memory at a time. The project's own
format does not belong here (:mod:`reelquant.checkpoint`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from reelquant._errors import UnsupportedError, nearest
from reelquant._progress import Progress, Silent
from reelquant.checkpoint.export import comfyui, gguf, torchao
from reelquant.checkpoint.export.result import FATES, Exported, Outcome

__all__ = ["FATES", "FORMATS", "TYPES", "Exported", "Outcome", "export"]

FORMATS: dict[str, Callable[..., Exported]] = {"comfyui": comfyui.export, "gguf": gguf.export, "torchao": torchao.export}
TYPES: dict[str, tuple[str, ...]] = {
    "comfyui": tuple(comfyui.ComfyUI.types),
    "gguf": tuple(gguf.Gguf.types),
    "torchao": tuple(torchao.TorchAo.types),
}


def export(
    folder: str | Path,
    format: str,
    output: str | Path,
    *,
    component: str | None = None,
    type: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a quantized folder in the format of another project, so that it opens there without reelquant.

    Codes are carried as they are where the format can hold them; other layers are rounded a second time, or written as floats, and the
    result says which, why, and how far each weight moved. Shifts, scales and rotations of inputs are folded into weights and biases.

    Args:
        folder: what :func:`reelquant.save` wrote.
        format: a name of :data:`FORMATS`.
        output: a ``.safetensors`` file (comfyui), a ``.gguf`` file, or a folder (torchao).
        component: which denoiser, if there are several; torchao exports are whole pipelines.
        type: a name of :data:`TYPES` for all layers; by default, for each layer the type that holds its codes.
        force: replace what is there, once the new is complete.
        progress: receives the progress of the export.

    Raises:
        CheckpointError: if the folder holds nothing quantized, is damaged, or the target cannot be written.
        UnsupportedError: for an unknown format or type, or without the package that a format needs.
    """
    if format not in FORMATS:
        raise UnsupportedError(f"unknown format '{format}'; {nearest(format, FORMATS)}")
    return FORMATS[format](Path(folder), Path(output), component=component, numbers=type, force=force, progress=progress or Silent())
