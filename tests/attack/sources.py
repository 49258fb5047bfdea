"""The tiny pipelines that are attacked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import reelquant
from tests.tiny.stock import stored_pipeline


def float_pipeline(folder: Path) -> Path:
    """As stock diffusers writes it, with notes of ours."""
    return stored_pipeline(folder)


def quantized_pipeline(folder: Path, components: Sequence[str] = ("transformer", "text_encoder")) -> Path:
    """With quantized components, sums, a report and the notes of its source, which lies beside it."""
    pipe = reelquant.open_pipeline(float_pipeline(folder.with_name(f"{folder.name}-float")))
    report = reelquant.quantize(pipe, "w8a16", components=components)
    return reelquant.save(pipe, folder, report)
