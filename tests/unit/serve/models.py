"""Folders that look like pipelines and evaluations: the page reads only their JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def pipeline(folder: Path, *, recipe: str | None = None, source: str = "") -> Path:
    """A folder with a ``model_index.json``; quantized by a recipe, if one is given."""
    part = folder / "transformer"
    part.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (part / "config.json").write_text(json.dumps({} if recipe is None else {"quantization_config": {}}))
    if recipe is not None:
        (folder / "report.json").write_text(json.dumps({"recipe": recipe, "source": source}))
    return folder


def evaluation(folder: Path, **data: Any) -> Path:
    """A folder with a report."""
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("<!doctype html><title>report</title><p id='mark'>the report</p>")
    (folder / "report.json").write_text(json.dumps(data))
    return folder
