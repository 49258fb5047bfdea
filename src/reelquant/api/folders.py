"""Folders: open, save, load, verify, export; and how an opened model runs. Each verb is a few calls into the layers below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reelquant._torch_state import stock_torch

if TYPE_CHECKING:
    from reelquant.checkpoint.audit import Verified
    from reelquant.checkpoint.export import Exported
    from reelquant.engine.report import Report


@stock_torch()
def open_pipeline(model: str | Path, **options: Any) -> Any:
    """Open a float or quantized pipeline by bundled name, folder or hub id; see :func:`reelquant.models.pipelines.open_pipeline`."""
    from reelquant.models.pipelines import open_pipeline as opened

    return opened(model, **options)


@stock_torch()
def save(pipe: Any, folder: str | Path, report: Report | None = None, *, force: bool = False, **options: Any) -> Path:
    """Write a pipeline as a stock diffusers folder, complete or not at all; see :func:`reelquant.checkpoint.save`.

    A :class:`reelquant.Denoiser` becomes a folder for :func:`reelquant.load_denoiser`.
    """
    from reelquant.checkpoint import save as saved
    from reelquant.checkpoint import save_module
    from reelquant.models.denoiser import Denoiser

    written = save_module if isinstance(pipe, Denoiser) else saved
    return written(pipe, folder, report, force=force, **options)


def load(folder: str | Path, **options: Any) -> Any:
    """Open what :func:`save` wrote: :func:`open_pipeline` with ``dtype`` and ``device``, every layer checked against its checksum."""
    return open_pipeline(folder, **options)


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


@stock_torch()
def export(folder: str | Path, format: str, output: str | Path, **options: Any) -> Exported:
    """Write a saved folder for another project: ``comfyui``, ``gguf`` or ``torchao``; see :func:`reelquant.checkpoint.export.export`.

    Example:
        >>> made = reelquant.export("out", "gguf", "model.gguf")
        >>> made.of("requantized"), made.left_behind
    """
    from reelquant.checkpoint.export import export as written

    return written(folder, format, output, **options)


@stock_torch()
def configure(
    model: Any,
    *,
    kernels: str | None = None,
    temporal_table: bool | None = None,
    attention: str | Mapping[str, str] | Sequence[Mapping[str, Any]] | None = None,
    runtime: str | None = None,
) -> None:
    """Change how a quantized model is computed, after it was loaded or quantized. Checkpoints do not store these settings.

    Args:
        model: a quantized model, or a pipeline, which means all its quantized parts.
        kernels: ``reference`` for plain torch, the oracle of all kernels, or ``auto`` for the fastest.
        temporal_table: whether stored outputs of temporal layers are used where they fit, or every layer is computed.
        attention: formats of the operands of attention, ``{"scores": "int8", "values": "float"}`` (or ``"e4m3"``), as in a recipe. They
            are rounded where a kernel takes the call, except at protected steps; ``"float"`` rounds none. A list of rules with ``on``
            (and ``steps``) gives places numbers of their own; denoisers are run on tiny inputs to find them.
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

    configure_model(model, dict(kernels=kernels, temporal_table=temporal_table, attention=attention, runtime=runtime))
