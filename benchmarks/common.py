"""What the benchmarks share: the same clips, distances to float with intervals, resumable records, and tables."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reelquant.discover import denoiser_of
from reelquant.engine.report import Report
from reelquant.evidence import bootstrap, psnr
from reelquant.models.judge import accuracy
from reelquant.models.pipelines import BUNDLED, locate, open_pipeline
from reelquant.models.sampling import NOTES_FILE, sample
from reelquant.models.shapes import evaluation_prompts

SAMPLING_SEED = 50_000  # noise of the first clip
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


# --- clips ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clips:
    """Which clips are made: the pipeline, how many, and the arguments of the pipeline call on top of the folder's own.

    Clip ``i`` shows the i-th evaluation prompt and starts from the noise of seed ``SAMPLING_SEED + i``.
    """

    pipeline: str
    count: int
    call: dict[str, Any] = field(default_factory=dict)
    batch: int = 4

    @property
    def name(self) -> str:
        """The bundled name, or that of the folder; of the folder around it where it is called ``pipeline``, as those of training/ are."""
        path = Path(self.pipeline)
        return path.resolve().parent.name if path.name == "pipeline" else path.name

    @cached_property
    def prompts(self) -> list[str]:
        """One caption per clip."""
        return evaluation_prompts(self.count)

    @cached_property
    def digest(self) -> str:
        """Changes with the weights, the prompts and the call: rows with equal digests can be compared."""
        digest = hashlib.sha256(json.dumps([self.prompts, self.call, SAMPLING_SEED, self.batch], sort_keys=True).encode())
        folder = Path(locate(self.pipeline))
        for file in sorted([*folder.rglob("*.safetensors"), *folder.glob(NOTES_FILE), *folder.rglob("scheduler_config.json")]):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:12]

    def open(self, dtype: torch.dtype = torch.float32) -> Any:
        """The pipeline, fresh from its folder."""
        return open_pipeline(self.pipeline, dtype)

    def frames(self, pipe: Any, batch: int | None = None) -> Tensor:
        """Sample all clips: ``[clips, frames, 3, height, width]`` in [0, 1]."""
        return sample(pipe, self.prompts, seed=SAMPLING_SEED, batch=batch or self.batch, **self.call).float()

    def float_frames(self, folder: Path) -> Tensor:
        """The float32 clips, sampled once and kept in ``folder``."""
        file = folder / f"float-{self.name}-{self.digest}.safetensors"
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"frames": self.frames(self.open()).contiguous()}, file)
        return load_file(file)["frames"]


# --- figures --------------------------------------------------------------------------------------------------------------------------


def judged(frames: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """How often the judge sees in the clips what their prompts say, per kind."""
    return accuracy(frames.nan_to_num(0.0).clamp(0, 1), prompts)


def _stored(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor subclass is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _stored(getattr(tensor, name))
    else:
        yield tensor


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and of the buffers that a checkpoint would hold, shared ones once, tensor subclasses opened."""
    found: dict[int, int] = {}
    for module in model.modules():
        buffers = [tensor for name, tensor in module._buffers.items() if name not in module._non_persistent_buffers_set]
        for tensor in [*module._parameters.values(), *buffers]:
            for plain in [] if tensor is None else _stored(tensor):
                found[plain.data_ptr() or id(plain)] = plain.numel() * plain.element_size()
    return sum(found.values())


def layer_sizes(model: nn.Module) -> dict[str, int]:
    """Weights of every linear and convolution layer of a float model."""
    return {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, LAYERS)}


def _is_float(module: nn.Module, weights: int) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and not hasattr(weight, "__tensor_flatten__") and weight.is_floating_point() and weight.numel() == weights


def quantized_layers(model: nn.Module, sizes: dict[str, int]) -> list[str]:
    """Names of the layers of a float model (see :func:`layer_sizes`) whose float weight is gone from this model."""
    return [name for name, weights in sizes.items() if not _is_float(model.get_submodule(name), weights)]


def measure(frames: Tensor, reference: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
    """PSNR per clip, its mean and interval, and the judge's figures."""
    values = psnr(reference, frames.nan_to_num(0.0)).tolist()
    mean = bootstrap(values)
    return {"psnr": values, "psnr_mean": mean.mean, "psnr_low": mean.low, "psnr_high": mean.high, "judge": judged(frames, prompts)}


def report_facts(report: Report) -> dict[str, Any]:
    """What a row keeps of a quantization report."""
    return {
        "tdscore": report.mean("tdscore", "temporal"),
        "coverage": report.mean("coverage", "main"),
        "error": report.mean("error"),
        "ratio": report.ratio,
        "bytes_tables": report.bytes_tables,
        "search": [[trial.family, trial.options, trial.psnr] for trial in report.trials],
        "warnings": report.warnings,
        "phases": {name: round(seconds, 1) for name, seconds in report.seconds.items()},
    }


def denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """Name and module of the pipeline's denoiser."""
    return denoiser_of(pipe)


# --- records --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Records:
    """Rows in a JSONL file, one per configuration and digest; a later row replaces an earlier one of the same key."""

    file: Path

    def load(self) -> list[dict[str, Any]]:
        """All rows, the latest of each key, in order of first appearance."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for line in self.file.read_text().splitlines() if self.file.is_file() else []:
            row = json.loads(line)
            rows[row["name"], row["digest"]] = row
        return list(rows.values())

    def done(self, name: str, digest: str) -> bool:
        """Whether a measured row exists."""
        return any(row["name"] == name and row["digest"] == digest and row["status"] == "measured" for row in self.load())

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def write_csv(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Flat rows as CSV; columns are the union of their keys."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# --- command line ---------------------------------------------------------------------------------------------------------------------


def number(text: str) -> tuple[str, float | int]:
    """``key=value`` of a pipeline argument."""
    key, _, value = text.partition("=")
    return key, int(value) if value.isdigit() else float(value)


def parser(about: str) -> argparse.ArgumentParser:
    """The options that all benchmarks of quality share; ``about`` is the module's docstring."""
    made = argparse.ArgumentParser(description=about.splitlines()[0])
    made.add_argument("--pipeline", required=True, help=f"{', '.join(BUNDLED)}, or a pipeline folder, NAME or NAME/pipeline")
    made.add_argument("--clips", type=int, default=64)
    made.add_argument("--output", type=Path, default=Path("runs/peers"))
    made.add_argument("--batch", type=int, default=4, help="clips per pipeline call")
    made.add_argument("--set", type=number, nargs="*", default=[], metavar="KEY=NUMBER", help="arguments of the pipeline call")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--table", action="store_true", help="only write the tables from what is there")
    return made
