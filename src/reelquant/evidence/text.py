"""Does a clip show what its text says: cosines between CLIP's embeddings of frames and of the text.

Any CLIP that transformers loads will do; its weights do not come with the library (``reelquant weights clip`` fetches
them). Scores of different CLIP models cannot be compared, so say which one it was.
"""

from __future__ import annotations

import itertools
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reelquant._errors import CheckpointError, MeasurementError, UnsupportedError
from reelquant.evidence.networks.weights import cache

CLIP = "openai/clip-vit-base-patch32"
GET = "get it once with `reelquant weights clip`"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pictures that OpenAI trained CLIP on; later CLIPs kept them
STD = (0.26862954, 0.26130258, 0.27577711)
BATCH = 32  # frames embedded together; no influence on the scores


@dataclass(frozen=True)
class Clip:
    """A CLIP and what turns text into its tokens.

    Attributes:
        model: a ``CLIPModel``.
        tokenizer: its tokenizer.
    """

    model: Any
    tokenizer: Any


def load_clip(source: str | Path = CLIP, device: str = "cpu", download: bool = True) -> Clip:
    """A CLIP in float32, in evaluation mode; safetensors only, and no torchvision needed.

    Args:
        source: a folder written by ``save_pretrained``, or a hub id: what :func:`fetch_clip` kept, else the hub and its
            cache.
        device: where the model shall run.
        download: ask the hub for what is not on this machine.

    Raises:
        CheckpointError: if it is not there, is broken, or holds pickled weights only.
        UnsupportedError: if it is not a CLIP model.
    """
    from transformers.models.auto.configuration_auto import AutoConfig  # a type checker reads all models for `from transformers`
    from transformers.models.auto.tokenization_auto import AutoTokenizer
    from transformers.models.clip.modeling_clip import CLIPModel

    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise CheckpointError(f"folder '{source}' is not a CLIP model: it has no config.json; {GET}")
    source = kept(source) if kept(source).is_dir() else source
    where = {} if download else {"local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(source, **where)
        if config.model_type != "clip":
            raise UnsupportedError(f"'{source}' is of type {config.model_type} and not a CLIP; {GET}")
        model = CLIPModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **where)
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except UnsupportedError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise CheckpointError(f"cannot load a CLIP model from '{source}' ({type(error).__name__}: {reason}); {GET}") from error
    return Clip(model.to(device).eval().requires_grad_(False), tokenizer)


def fetch_clip(name: str = CLIP) -> Path:
    """Download a CLIP and keep it, as safetensors, where :func:`load_clip` looks first.

    Some repositories hold pickled weights only, with safetensors in a pull request of the hub's own converter;
    transformers finds those, and pickles are refused as everywhere.

    Returns:
        Its folder in reelquant's cache.

    Raises:
        CheckpointError: if the hub cannot be reached, or has no such model.
    """
    folder = kept(name)
    if not folder.is_dir():
        clip = load_clip(name)
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            clip.model.save_pretrained(partial)
            clip.tokenizer.save_pretrained(partial)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def kept(name: str | Path) -> Path:
    """Where :func:`fetch_clip` keeps a model, whether it is there or not."""
    return cache() / "clip" / str(name).strip("/").replace("/", "--")


def clip_scores(frames: Tensor, text: str, clip: Clip) -> dict[str, float]:
    """CLIPSIM and temporal CLIP consistency of one clip, both plain cosines in [-1, 1] (not times 100).

    Args:
        frames: ``[frames, 3, height, width]`` in [0, 1], at least one.
        text: the prompt; cut off at the model's longest text (77 tokens).
        clip: as from :func:`load_clip`.

    Returns:
        ``clipsim``: mean over the frames of the cosine between a frame's embedding and the text's;
            ``clip_consistency``: mean cosine
        between the embeddings of neighbouring frames, 1 for a clip of one frame.

    Raises:
        MeasurementError: if there are no frames.

    Paper:
        Wu et al. 2021, "GODIVA: Generating Open-DomaIn Videos from nAtural Descriptions", CLIPSIM, with ViT-B/32; Esser
        et al. 2023, "Structure and Content-Guided Video Synthesis with Diffusion Models", frame consistency. Published
        CLIPSIM values such as 0.1797 are plain cosines, as ours are; some tables print 100 times as much.
    """
    if not len(frames):
        raise MeasurementError("scores of a clip without frames: give at least one")
    pictures = frame_embeddings(frames, clip)
    neighbours = [(a * b).sum() for a, b in itertools.pairwise(pictures)]
    return {
        "clipsim": float((pictures @ text_embedding(text, clip)).mean()),
        "clip_consistency": float(torch.stack(neighbours).mean()) if neighbours else 1.0,
    }


@torch.no_grad()
def frame_embeddings(frames: Tensor, clip: Clip) -> Tensor:
    """Float64 embeddings ``[frames, dim]`` of length 1."""
    side, parameter = clip.model.config.vision_config.image_size, next(clip.model.parameters())
    parts = [clip.model.get_image_features(pixel_values=prepared(part, side).to(parameter)) for part in frames.split(BATCH)]
    return F.normalize(torch.cat([_embedding(part) for part in parts]).double().cpu(), dim=-1)


@torch.no_grad()
def text_embedding(text: str, clip: Clip) -> Tensor:
    """Float64 embedding ``[dim]`` of length 1."""
    longest = clip.model.config.text_config.max_position_embeddings
    tokens = clip.tokenizer([text], truncation=True, max_length=longest, return_tensors="pt").to(clip.model.device)
    found = clip.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return F.normalize(_embedding(found).double().cpu(), dim=-1)[0]


def _embedding(output: Any) -> Tensor:
    """transformers 5 wraps the projected embedding, transformers 4 gives it as it is."""
    return output if isinstance(output, Tensor) else output.pooler_output


def prepared(frames: Tensor, side: int) -> Tensor:
    """What CLIP sees: the shorter side resized to ``side`` (bicubic, antialiased), the middle square of it, normalized.

    transformers' own image processor does the same in 8 bits with pillow, and differs by rounding.

    Args:
        frames: ``[frames, 3, height, width]`` in [0, 1].
        side: pixels of the model's input.
    """
    height, width = frames.shape[-2:]
    shorter = min(height, width)
    size = (side * height // shorter, side * width // shorter)
    frames = F.interpolate(frames.float().clamp(0, 1), size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    middle = frames[..., top : top + side, left : left + side]
    return (middle - middle.new_tensor(MEAN)[:, None, None]) / middle.new_tensor(STD)[:, None, None]
