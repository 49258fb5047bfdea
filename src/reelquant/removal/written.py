"""Write a pipeline whose blocks were dropped as a stock folder, in the numbers that it was stored in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reelquant._version import __version__
from reelquant.checkpoint import save
from reelquant.checkpoint.as_stored import Numbers, sources
from reelquant.discover import denoisers_of, plain
from reelquant.models.weight_files import loaded_files
from reelquant.removal.run import Dropped

NARROW = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Report:
    """``report.json`` of a folder whose blocks were dropped.

    Attributes:
        made: what was dropped.
        bytes_source, bytes_folder: of weights, of the folder that was read and of the one that was written.
    """

    made: Dropped
    bytes_source: int | None = None
    bytes_folder: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"removal": asdict(self.made), "bytes_source": self.bytes_source, "bytes_folder": self.bytes_folder, "version": __version__}

    def save(self, path: str | Path) -> None:
        """Write it."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")


def write(pipe: Any, made: Dropped, folder: str | Path, *, force: bool = False) -> Report:
    """Write the pipeline. What was opened wider than it is stored becomes as narrow again, so the denoiser's file is smaller."""
    report = Report(made)
    home = sources(pipe, [made.component]).get(made.component)
    if home is not None:
        _narrow(plain(denoisers_of(pipe)[made.component]), Numbers(loaded_files(home)).kinds)
    save(pipe, folder, report, force=force)
    return report


def _narrow(model: nn.Module, kinds: dict[str, str]) -> None:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if (dtype := NARROW.get(kinds.get(name, ""))) is not None and value.is_floating_point():
            value.data = value.data.to(dtype)
