"""Folders: open, save, load, verify, export; and how an opened model runs. Each verb is a few calls into the layers below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reelquant._errors import UnsupportedError
from reelquant.api.asked import in_memory, model_in_memory, on_disk, verb

if TYPE_CHECKING:
    import torch

    from reelquant._progress import Progress
    from reelquant.checkpoint.audit import Verified
    from reelquant.checkpoint.export import Exported
    from reelquant.engine.report import Report


@verb(on_disk)
def open_pipeline(
    model: str | Path, dtype: torch.dtype | None = None, device: str = "cpu", variant: str | None = None, *, verify: bool = True
) -> Any:
    """Open a float or quantized pipeline by bundled name, folder or hub id, or with a denoiser from one file.

    Args:
        model: bundled name, folder, hub id, or ``FILE@PIPELINE``: everything of a pipeline but its denoiser, which is read from a
            ``.safetensors`` or ``.gguf`` file; see :mod:`reelquant.models.single_file`.
        dtype: of the float parts, float32 by default.
        device: where to.
        variant: of the weight files, ``fp16``.
        verify: compare every byte of a folder that reelquant wrote with its sum.

    Raises:
        ReelQuantError: one sentence on what is missing, damaged or does not fit.
    """
    import torch

    from reelquant.models.pipelines import open_pipeline as opened

    return opened(model, dtype or torch.float32, device, variant, verify=verify)


@verb(in_memory)
def save(
    pipe: Any,
    folder: str | Path,
    report: Report | None = None,
    *,
    force: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a pipeline as a stock diffusers folder, complete or not at all; see :func:`reelquant.checkpoint.save`.

    Args:
        pipe: the pipeline. A :class:`reelquant.Denoiser` becomes a folder for :func:`reelquant.load_denoiser`.
        folder: where to.
        report: of :func:`quantize`, written as ``report.json``.
        force: replace an existing folder.
        dtype: store float parts in this dtype; by default in the one they have.
        max_shard_size: as in diffusers, ``"5GB"``.
    """
    from reelquant.checkpoint import save as saved
    from reelquant.checkpoint import save_module
    from reelquant.models.denoiser import Denoiser

    if not isinstance(pipe, Denoiser):
        return saved(pipe, folder, report, force=force, dtype=dtype, max_shard_size=max_shard_size)
    if dtype is not None or max_shard_size is not None:
        raise UnsupportedError("a Denoiser is saved as it is, in one file; leave out dtype and max_shard_size")
    return save_module(pipe, folder, report, force=force)


@verb(on_disk)
def load(
    folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu", variant: str | None = None, *, verify: bool = True
) -> Any:
    """Open what :func:`save` wrote, every layer checked against its checksum: another name of :func:`open_pipeline`."""
    return open_pipeline(folder, dtype, device, variant, verify=verify)


@verb(on_disk)
def verify(folder: str | Path, *, renew: bool = False) -> Verified:
    """Compare every byte of a saved folder with what was written, without loading it; see :mod:`reelquant.checkpoint.audit`.

    Args:
        folder: of a pipeline.
        renew: take the files as they are, after they were changed on purpose.

    Raises:
        CheckpointError: naming the first file or layer that is not what was written.
    """
    from reelquant.checkpoint.audit import verify_folder

    return verify_folder(folder, renew=renew)


@verb(on_disk)
def push_to_hub(folder: str | Path, repository: str, *, private: bool | None = None, token: str | None = None, message: str = "") -> str:
    """Upload what :func:`save` wrote, card and all; see :func:`reelquant.checkpoint.hub.push_to_hub`.

    Args:
        folder: of a pipeline; every byte is compared with its sum first.
        repository: ``owner/name``; it is made if it is not there.
        private: whether a new one is private.
        token: of the hub; by default that of ``hf auth login``.
        message: of the commit.

    Returns:
        The address of the repository.

    Example:
        >>> reelquant.push_to_hub(reelquant.save(pipe, "out", report), "me/wan-w8a8")
    """
    from reelquant.checkpoint.hub import push_to_hub as pushed

    return pushed(folder, repository, private=private, token=token, message=message)


@verb(on_disk)
def export(
    folder: str | Path,
    format: str,
    output: str | Path,
    *,
    component: str | None = None,
    type: str | None = None,
    force: bool = False,
    progress: Progress | Literal[False] | None = None,
) -> Exported:
    """Write a saved folder for another project; see :func:`reelquant.checkpoint.export.export`.

    Args:
        folder: what :func:`save` wrote.
        format: ``comfyui``, ``gguf`` or ``torchao``.
        output: a file, or a folder (torchao).
        component: which denoiser, if there are several.
        type: of all layers; by default, for each layer the type that holds its codes.
        force: replace what is there, once the new is complete.
        progress: hears how far the export is; by default bars in a terminal or a notebook, False for none.

    Example:
        >>> made = reelquant.export("out", "gguf", "model.gguf")
        >>> made.of("requantized"), made.left_behind
    """
    from reelquant.checkpoint.export import export as written

    return written(folder, format, output, component=component, type=type, force=force, progress=progress or None)


@verb(model_in_memory)
def configure(
    model: Any,
    *,
    kernels: str | None = None,
    temporal_table: bool | None = None,
    attention: str | Mapping[str, str] | Sequence[Mapping[str, Any]] | None = None,
    runtime: str | None = None,
    resolution: bool | None = None,
) -> None:
    """Change how a quantized model is computed, after it was loaded or quantized. Checkpoints do not store these settings.

    Args:
        model: a quantized model, or a pipeline, which means all its quantized parts.
        kernels: ``reference`` for plain torch, the oracle of all kernels, or ``auto`` for the fastest.
        temporal_table: whether stored outputs of temporal layers are used where they fit, or every layer is computed.
        attention: formats of the operands of attention, ``{"scores": "int8", "values": "float"}`` (or ``"e4m3"``), as in a recipe. They
            are rounded where a kernel takes the call, except at protected steps; ``"float"`` rounds none. A list of rules with ``on``
            (and ``steps``) gives places numbers of their own; denoisers are run on tiny inputs to find them.
        resolution: whether the pipeline's own calls follow the schedule of sizes that was stored with its denoiser; see
            ``docs/resolution.md``. The verbs of this library follow it in any case. It is set on the scheduler, so set it again after
            the pipeline was given another one.
        runtime: ``openvino`` runs quantized denoisers as one graph each, on CPUs; ``torch`` goes back. Other parts stay in torch.

    Raises:
        RecipeError: for an unknown name of kernels, of a runtime, or of a format of attention.
        UnsupportedError: if nothing is quantized, no table is stored, or the runtime is not installed or cannot run the model.

    Example:
        >>> pipe = reelquant.load("out")
        >>> reelquant.configure(pipe, kernels="reference")
        >>> reelquant.configure(pipe, kernels="auto", runtime="openvino")
    """
    from reelquant.graphs.configure import configure_model
    from reelquant.models.resolution import set_resolution

    configure_model(model, dict(kernels=kernels, temporal_table=temporal_table, attention=attention, runtime=runtime))
    if resolution is not None:
        set_resolution(model, resolution)
