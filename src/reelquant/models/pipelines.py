"""Open a pipeline by bundled name, folder or hub id, and know which texts to calibrate it with."""

from __future__ import annotations

import inspect
import os
import random
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reelquant._errors import CheckpointError, ReelQuantError, UnsupportedError, nearest
from reelquant.models.blank import CLASS, read_json
from reelquant.models.compat import bridged
from reelquant.models.complete import complete
from reelquant.models.conditions import no_texts, takes_prompt
from reelquant.models.manifest import check_manifest
from reelquant.models.sampling import notes
from reelquant.models.single_file import check_file, index_of, open_file, single_file
from reelquant.models.sizes import check_hole, check_sizes
from reelquant.models.weight_files import INDEX, PICKLES, component_folders, loaded_files, sole_variant
from reelquant.nn import check_finite, count_weights

NAME = 200  # letters of a hub id, at most
BUNDLED = ("tiny-dit", "tiny-unet")


def bundled_path(name: str) -> Path:
    """Folder of a bundled pipeline.

    Raises:
        CheckpointError: if the installation lacks it.
    """
    folder = Path(str(resources.files("reelquant.models").joinpath("weights", name)))
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"the bundled pipeline '{name}' is not in this installation; reinstall reelquant")
    return folder


def locate(model: str | Path) -> str:
    """The folder of a bundled name, an existing folder, or a hub id as it is. Of ``FILE@PIPELINE`` it is that of the pipeline.

    Raises:
        CheckpointError: if it looks like a path and nothing is there.
    """
    text = str(model)
    check_file(text)
    if (single := single_file(text)) is not None:
        return locate(single.rest)
    if text in BUNDLED:
        return str(bundled_path(text))
    path = Path(text)
    if os.path.isdir(path):  # false also for names that a disk refuses, where Path.is_dir() raises
        if not os.path.isfile(path / "model_index.json"):
            raise CheckpointError(f"folder '{text}' is not a diffusers pipeline: it has no model_index.json")
        return text
    if os.path.exists(path) or len(text) > NAME or not text.isprintable() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise CheckpointError(
            f"no pipeline at '{text}'; give a folder with model_index.json, a hub id (owner/name), FILE@PIPELINE, or a "
            f"bundled name: {nearest(text, BUNDLED)}"
        )
    return text


def local_folder(model: str | Path) -> Path:
    """The folder of a pipeline on this machine; a hub id is downloaded, its weights as safetensors.

    Raises:
        CheckpointError: if nothing is there, or it cannot be downloaded.
        UnsupportedError: if the place names a file: then no folder holds the pipeline.
    """
    from diffusers import DiffusionPipeline

    if single_file(model) is not None:
        raise UnsupportedError(
            f"'{model}' is opened in memory only (no --max-memory, no --resume); to go on from disk, write it as a folder first: "
            f"reelquant.save(reelquant.open_pipeline({str(model)!r}), FOLDER)"
        )
    folder = locate(model)
    if Path(folder).is_dir():
        return Path(folder)
    try:
        return Path(DiffusionPipeline.download(folder, use_safetensors=True))
    except Exception as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise CheckpointError(f"cannot download pipeline '{model}': {type(error).__name__}: {reason}{_variant_hint(error)}") from error


def open_pipeline(
    model: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu", variant: str | None = None, *, verify: bool = True
) -> Any:
    """Load a pipeline with stock ``DiffusionPipeline.from_pretrained``; safetensors only.

    Args:
        model: bundled name, folder, hub id, or ``FILE@PIPELINE`` (:mod:`reelquant.models.single_file`).
        dtype: of the float parts.
        device: where to.
        variant: of the weight files, ``fp16``; found without being told where a folder holds one variant and nothing else.
        verify: compare every byte of a folder that reelquant wrote with its sum. It reads the files once more, at the speed of SHA-256.

    Raises:
        CheckpointError: if it does not exist, is truncated or corrupt, was changed after it was written, holds pickled weights, or lacks
            tensors of its models or has some too many.
        CalibrationError: if a weight is NaN or infinite.
    """
    from diffusers import DiffusionPipeline

    folder = locate(model)
    if Path(folder).is_dir():
        variant = variant or sole_variant(Path(folder))
        check_folder(Path(folder), variant, verify=verify)
    try:
        with complete(model):
            own = _from_files(model, dtype)
            kind = pipeline_class(model) if own else DiffusionPipeline  # the base class takes no parts that a pipeline may go without
            pipe = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, variant=variant, **dropped(folder), **own)
    except ReelQuantError:
        raise
    except Exception as error:
        raise cannot_open(model, error, maybe_variant=variant is None and not Path(folder).is_dir()) from error
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            check_finite(name, part)
    return bridged(pipe).to(device)


def _from_files(model: str | Path, dtype: torch.dtype) -> dict[str, Any]:
    """The denoisers of ``FILE@PIPELINE``, by component; a file that is named first wins."""
    found, single = dict[str, Any](), single_file(model)
    while single is not None:
        folder = locate(single.rest)
        name, part = open_file(single, index_of(stored_file(folder, INDEX), single), folder, dtype)
        found.setdefault(name, part)
        single = single_file(single.rest)
    return found


def pipeline_class(model: Any) -> Any:
    """The class of a pipeline; ``DiffusionPipeline``, which says nothing of its call, if that is not known before the pipeline is opened.

    Args:
        model: bundled name, folder, hub id, or a pipeline in memory.
    """
    import diffusers

    if not isinstance(model, str | Path):
        return type(model)
    file = stored_file(locate(model), INDEX)
    name = read_json(file).get(CLASS) if file is not None else None
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    known = isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)
    return found if known else diffusers.DiffusionPipeline


def stored_file(model: str, name: str) -> Path | None:
    """A file beside ``model_index.json`` of a folder, or of a hub id: from its cache, or downloaded. None if there is none; opening the
    pipeline will say why."""
    from huggingface_hub import hf_hub_download

    file = Path(model) / name
    if Path(model).is_dir():
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(model, name))
    except Exception:
        return None


def dropped(folder: str | Path) -> dict[str, None]:
    """Text encoders and tokenizers that a folder was saved without: diffusers opens it only if it is told so."""
    file, kind = Path(folder) / INDEX, pipeline_class(folder)
    index = read_json(file) if file.is_file() else None
    wanted = [name for name in inspect.signature(kind.__init__).parameters if name.startswith(("text_encoder", "tokenizer"))]
    return {} if index is None else dict.fromkeys(name for name in wanted if (index.get(name) or [None])[0] is None)


def cannot_open(model: str | Path, error: Exception, *, maybe_variant: bool = False) -> CheckpointError:
    """The error to raise if a library cannot open a pipeline: the model and the reason, in one line."""
    reason = (str(error).splitlines() or ["no reason given"])[0]
    hint = _variant_hint(error) if maybe_variant else ""
    return CheckpointError(f"cannot open pipeline '{model}': {type(error).__name__}: {reason}{hint}")


def _variant_hint(error: Exception) -> str:
    """What helps if a hub id has no weights under their plain names: which variants it has is not known here."""
    lacks = any(words in str(error) for words in ("no file named", "no modeling files", "does not appear to have"))
    return " If it holds its weights as a variant only, name it: variant='fp16' (--variant fp16)" if lacks else ""


def mark_quantized(model: Any, description: dict[str, Any]) -> None:
    """Give a model that was quantized in memory what its library gives one that it loads: a config entry, a quantizer, no casting.

    Args:
        model: a model of diffusers or transformers.
        description: its ``quantization_config``.
    """
    if hasattr(model, "register_to_config"):
        from diffusers.quantizers.auto import DiffusersAutoQuantizer

        quantizer = DiffusersAutoQuantizer.from_config(description, pre_quantized=True)
        model.register_to_config(quantization_config=quantizer.quantization_config)
        quantizer.belongs_to(model)
    else:
        from transformers.quantizers.auto import AutoHfQuantizer

        quantizer = AutoHfQuantizer.from_config(description, pre_quantized=True)
        model.config.quantization_config = quantizer.quantization_config
    count_weights(model)
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = quantizer.quantization_config.quant_method


def files_in(folder: Path) -> list[Path]:
    """Every file of a folder, sorted, also where folders in it are links, but for links to a folder that they lie in."""
    found = list[Path]()
    for name, folders, files in os.walk(folder, followlinks=True):
        here = Path(name)
        folders[:] = [part for part in folders if not here.resolve().is_relative_to((here / part).resolve())]
        found += [here / file for file in files]
    return sorted(found)


def check_folder(folder: Path, variant: str | None = None, *, verify: bool = True) -> None:
    """Refuse pickled, truncated, corrupt and changed files before anything is loaded. What would not be loaded is not looked at.

    Args:
        folder: of a pipeline.
        variant: of the weight files.
        verify: read all files that reelquant wrote, and compare them with their sums.

    Raises:
        CheckpointError: naming the file.
    """
    from safetensors import SafetensorError, safe_open

    for file in files_in(folder):
        _check_link(folder, file)
        if file.exists() and not file.is_file():  # reading a named pipe would wait until something writes to it
            raise CheckpointError(f"'{file}' is a named pipe, a socket or a device and no file; remove it")
        if file.suffix == ".safetensors":
            check_hole(file)
    for component in component_folders(folder):
        files = loaded_files(component, variant)
        for file in sorted(component.iterdir()) if not files else ():
            if file.suffix in PICKLES:
                raise CheckpointError(f"'{file}' is a pickle file and is refused: it can run code. Convert it to safetensors first")
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    opened.keys()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"'{file}' is truncated or corrupt ({error}); download or save it again") from None
    if verify:
        check_manifest(folder)
    for component in component_folders(folder):
        check_sizes(component, loaded_files(component, variant))


def _check_link(folder: Path, file: Path) -> None:
    """Refuse a link that leads elsewhere, unless to weights or into the cache of the hub: what is copied with a folder belongs to it.

    So is a file in a folder that is such a link.
    """
    link = next((path for path in (file, *file.parents) if path.is_symlink() and folder in path.parents), None)
    if link is None or file.suffix == ".safetensors" or not file.exists():
        return
    target, root = file.resolve(), folder.resolve()
    blobs = root.parent.parent / "blobs"  # models--owner--name/snapshots/REVISION
    if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
        raise CheckpointError(f"'{link}' is a link to '{link.resolve()}', outside of the pipeline's folder; put a copy in its place")


def calibration_prompts(pipe: Any, count: int) -> list[str]:
    """Texts that suit the pipeline: those its folder names, else the general video prompts that come with the library.

    They are empty for a pipeline that takes none.
    """
    if not takes_prompt(type(pipe)):
        return no_texts(count)
    texts = notes(pipe).get("prompts") or general_prompts()
    return [texts[i % len(texts)] for i in range(count)]


def general_prompts() -> list[str]:
    """The video prompts that come with the library, for pipelines whose folder names none."""
    return resources.files("reelquant.models").joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()


def shuffled(texts: list[str], seed: int) -> list[str]:
    """The same texts in an order that depends only on the seed."""
    return random.Random(seed).sample(texts, len(texts))
