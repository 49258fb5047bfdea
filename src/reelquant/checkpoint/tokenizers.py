"""Tokenizers are written as they were stored: every call leaves its padding and truncation in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reelquant._errors import CheckpointError
from reelquant.models.blank import read_json

FILE = "tokenizer.json"


@contextmanager
def as_stored(pipe: Any) -> Iterator[None]:
    """Inside, tokenizers neither pad nor truncate where the files that they were read from say that they do not.

    Clips are sampled or remembered while a pipeline is quantized. Without this the files would tell which, and two runs with the same
    result would not have the same bytes.
    """
    found = {name: backend for name, part in pipe.components.items() if (backend := getattr(part, "backend_tokenizer", None)) is not None}
    changed = [backend for name, backend in found.items() if _stored_plain(pipe, name) and (backend.padding or backend.truncation)]
    before = [(backend, backend.padding, backend.truncation) for backend in changed]
    for backend in changed:
        backend.no_padding()
        backend.no_truncation()
    try:
        yield
    finally:
        for backend, padding, truncation in before:
            if padding:
                backend.enable_padding(**padding)
            if truncation:
                backend.enable_truncation(**truncation)


def _stored_plain(pipe: Any, name: str) -> bool:
    """Whether the tokenizer's file on this machine says that nothing is padded or cut."""
    file = Path(str(pipe.config.get("_name_or_path") or "")) / name / FILE
    try:
        content = read_json(file)
    except CheckpointError:  # it is not there, or not there any more
        return False
    return content.get("padding") is None and content.get("truncation") is None
