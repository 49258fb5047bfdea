"""One float pipeline against quantized copies: the same captions and noise, one calibration for recipes that agree.

The demo and ``benchmarks/`` use this.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._progress import Progress, Silent
from reelquant.checkpoint import adopt
from reelquant.discover import denoiser_of
from reelquant.engine.calibration import Calibration
from reelquant.engine.report import Report
from reelquant.engine.run import quantize_pipeline
from reelquant.evidence import Interval, bootstrap, psnr
from reelquant.models.judge import accuracy
from reelquant.models.pipelines import calibration_prompts
from reelquant.models.sampling import call_arguments, sample
from reelquant.recipes.recipe import Recipe, load_recipe


@dataclass(eq=False)
class Outcome:
    """How one variant did.

    Attributes:
        name: of the variant.
        frames: ``[clips, frames, 3, height, width]`` in [0, 1].
        judge: fraction of clips that show what their caption says, by kind.
        psnr: of the decoded frames to float, dB, mean over clips and its 95 % interval; None for float itself.
        report: of the quantization; None for float.
        seconds_quantize, seconds_sample: wall time.
    """

    name: str
    frames: Tensor
    judge: dict[str, float]
    psnr: Interval | None = None
    report: Report | None = None
    seconds_quantize: float = 0.0
    seconds_sample: float = 0.0

    def figures(self) -> dict[str, Any]:
        """Everything but the pictures, as plain data."""
        report = self.report
        return {
            "variant": self.name,
            "bytes": None if report is None else report.bytes_quantized,
            "bytes_float": None if report is None else report.bytes_float,
            "bytes_tables": None if report is None else report.bytes_tables,
            "bytes_denoiser": None if report is None else report.bytes_model,
            "ratio": 1.0 if report is None else report.ratio,
            "psnr": None if self.psnr is None else self.psnr.mean,
            "psnr_low": None if self.psnr is None else self.psnr.low,
            "psnr_high": None if self.psnr is None else self.psnr.high,
            "tdscore": None if report is None else report.mean("tdscore", "temporal"),
            "coverage": None if report is None else report.mean("coverage", "main"),
            "error": None if report is None else report.mean("error"),
            **{f"judge_{kind}": value for kind, value in self.judge.items()},
            "seconds_quantize": round(self.seconds_quantize, 3),
            "seconds_sample": round(self.seconds_sample, 3),
        }


@dataclass(eq=False)
class Comparison:
    """A float pipeline, the clips to compare on, and what is shared between the variants.

    Attributes:
        pipe: a float pipeline; its denoiser is swapped for quantized copies and comes back by :meth:`restore`.
        captions: one clip each.
        seed: clip ``i`` starts from the noise of ``seed + i``.
        call: arguments of the pipeline call, on top of what the pipeline recommends.
        progress: receives the progress.
        reference: float clips, sampled by :meth:`measure_float` or given.
    """

    pipe: Any
    captions: Sequence[str]
    seed: int = 0
    call: dict[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=Silent)
    reference: Tensor | None = None
    batch: int = 4
    _calibration: tuple[Any, Calibration] | None = None

    def __post_init__(self) -> None:
        self.component, self.denoiser = denoiser_of(self.pipe)

    def restore(self) -> None:
        """Put the float denoiser back."""
        setattr(self.pipe, self.component, self.denoiser)

    def sample(self) -> tuple[Tensor, float]:
        """Clips of the pipeline as it is, and the seconds they took."""
        runs = -(-len(self.captions) // self.batch)
        self.progress.phase("sample", runs * (call_arguments(self.pipe, **self.call).get("num_inference_steps") or 50))
        start = time.perf_counter()
        how = {"seed": self.seed, "batch": self.batch, "on_step": self.progress.advance}
        frames = sample(self.pipe, self.captions, **how, **self.call)
        return frames.float().clamp(0, 1), time.perf_counter() - start

    def measure_float(self) -> Outcome:
        """The float pipeline itself; its clips become the reference."""
        self.restore()
        self.reference, seconds = self.sample()
        return Outcome("float", self.reference, accuracy(self.reference, self.captions), seconds_sample=seconds)

    def measure(
        self,
        recipe: str | dict[str, Any] | Recipe,
        name: str | None = None,
        overrides: dict[str, Any] | None = None,
    ) -> Outcome:
        """Quantize a copy by a recipe and hold its clips against the float ones.

        The copy stays in the pipeline until the next variant or :meth:`restore`.
        """
        chosen = load_recipe(recipe, overrides)
        start = time.perf_counter()
        report = self.quantize(chosen)
        quantizing = time.perf_counter() - start
        frames, seconds = self.sample()
        fidelity = None if self.reference is None else bootstrap(psnr(self.reference, frames))
        return Outcome(
            name or chosen.name,
            frames,
            accuracy(frames, self.captions),
            fidelity,
            report,
            quantizing,
            seconds,
        )

    def quantize(self, recipe: Recipe) -> Report:
        """Swap in a quantized copy. Statistics are reused between recipes that calibrate alike."""
        setattr(self.pipe, self.component, copy.deepcopy(self.denoiser))
        pass_ = None if recipe.calibrate is None else repr(recipe.calibrate)
        before = self._calibration[1] if self._calibration and self._calibration[0] == pass_ else None
        count = recipe.calibrate.prompts + recipe.search.prompts if recipe.calibrate else 0
        report, calibration = quantize_pipeline(
            self.pipe,
            recipe,
            calibration_prompts(self.pipe, count),
            progress=self.progress,
            calibration=before,
            **self.call,
        )
        if calibration is not None:
            self._calibration = (pass_, calibration)
        adopt(getattr(self.pipe, self.component), recipe)
        return report


def reopened_equals(pipe: Any, folder: Path, captions: Sequence[str], seed: int, call: dict[str, Any]) -> bool:
    """Whether a saved folder, opened by stock diffusers in float32, samples the same clips as ``pipe``.

    Components that were not quantized may be stored in half precision, as they came.
    """
    from diffusers import DiffusionPipeline

    again = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    clips = [sample(_realigned(one), captions, seed=seed, **call) for one in (pipe, again)]
    return torch.equal(*clips)


def _realigned(pipe: Any) -> Any:
    """The pipeline with its parameters copied to aligned memory.

    Parameters of a file lie at any address, and products of unaligned memory may sum in another order.
    """
    for part in pipe.components.values():
        for parameter in part.parameters() if isinstance(part, nn.Module) else ():
            parameter.data = parameter.data.clone()
    return pipe
