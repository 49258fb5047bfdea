"""Arguments of a pipeline call as JSON: in words that change with what they hold, or whole, for another process."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MARK = "reelquant:"  # of the keys that stand for a picture or tensor


def described(value: Any) -> Any:
    """The same as JSON: pictures, tensors and arrays as their size and the start of their SHA-256.

    Equal content gives equal words, in every process. Objects may describe themselves by a method ``__described__``. What is neither
    data nor one of these is described by its ``repr``: it may hold an address, and then a run with it is not resumed.
    """
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return _clip(value) if len(value) > 1 and all(isinstance(item, Image.Image) for item in value) else [described(x) for x in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "__described__"):
        return described(value.__described__())
    if isinstance(value, Image.Image):
        return f"picture {value.width}x{value.height} {value.mode}, sha256 {_sum(value.tobytes())}"
    if isinstance(value, Tensor | np.ndarray):
        sizes, dtype = list(value.shape), str(value.dtype).removeprefix("torch.")
        return f"{dtype} {sizes}, sha256 {_sum(_bytes(value))}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return repr(value)


def _clip(frames: Sequence[Image.Image]) -> str:
    """Many pictures in one sentence."""
    sizes = dict.fromkeys(f"{frame.width}x{frame.height} {frame.mode}" for frame in frames)
    return f"{len(frames)} pictures {', '.join(sizes)}, sha256 {_sum(b''.join(map(_digest, frames)))}"


def _digest(frame: Image.Image) -> bytes:
    return hashlib.sha256(f"{frame.size} {frame.mode}".encode() + frame.tobytes()).digest()


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _bytes(value: Tensor | np.ndarray) -> bytes:
    tensor = torch.as_tensor(value).detach().cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def packed(value: Any) -> Any:
    """The same as JSON, with pictures and tensors whole; :func:`unpacked` gives them back.

    Raises:
        TypeError: for what is neither data, nor a picture, nor a tensor.
    """
    if isinstance(value, Mapping):
        return {str(key): packed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [packed(item) for item in value]
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        value.save(file, "PNG")
        return {f"{MARK}picture": base64.b64encode(file.getvalue()).decode()}
    if isinstance(value, Tensor | np.ndarray):
        from safetensors.torch import save

        return {f"{MARK}tensor": base64.b64encode(save({"value": torch.as_tensor(value).detach().cpu().contiguous()})).decode()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"an argument of type {type(value).__name__} cannot be handed to another process")


def unpacked(value: Any) -> Any:
    """What :func:`packed` was given, with arrays as tensors."""
    if isinstance(value, list):
        return [unpacked(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if f"{MARK}picture" in value:
        return Image.open(io.BytesIO(base64.b64decode(value[f"{MARK}picture"])))
    if f"{MARK}tensor" in value:
        from safetensors.torch import load

        return load(base64.b64decode(value[f"{MARK}tensor"]))["value"]
    return {key: unpacked(item) for key, item in value.items()}
