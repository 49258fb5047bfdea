"""What stages with the scope of a whole model may see and do. The engine's session implements it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from reelquant.clock import Clock, Pairs
from reelquant.observe import InputStatistics, RecordedCall
from reelquant.sites import DenoiserMap
from reelquant.stages.layer import Specs


class ModelWork(Protocol):
    """One denoiser on its way from float to quantized.

    Attributes:
        denoiser: the module.
        component: its name in the pipeline.
        warnings: sentences for the report.
        report: the report, once it exists (hooks after installing).
    """

    denoiser: nn.Module
    component: str
    warnings: list[str]
    report: Any

    @property
    def map(self) -> DenoiserMap:
        """What discovery knows."""
        ...

    @property
    def steps(self) -> int:
        """Denoising steps of a full run."""
        ...

    @property
    def timesteps(self) -> list[float]:
        """Timesteps at which this denoiser was calibrated, in sampling order; empty without calibration."""
        ...

    @property
    def sampled(self) -> list[float]:
        """Timesteps of the whole sampler, of which one of two experts sees a part."""
        ...

    @property
    def guidance(self) -> Pairs | None:
        """How calls for classifier-free guidance came during calibration; None without guidance, or if it was not observed."""
        ...

    @property
    def clock(self) -> Clock | None:
        """The clock of the denoiser; attached after the hooks ``before_choosing``. None for components without timesteps."""
        ...

    @property
    def device(self) -> str | None:
        """Type of device where the sampler runs; None: the one that the denoiser lies on."""
        ...

    @property
    def calls(self) -> Sequence[RecordedCall]:
        """Recorded calls of the float denoiser, as many as the stage with the largest ``records`` wants."""
        ...

    @property
    def specs(self) -> dict[str, Specs]:
        """The numbers of every layer that is going to be quantized, by name."""
        ...

    def sampled_calls(self, clips: int, calls: int) -> Sequence[RecordedCall]:
        """Calls of the denoiser as it is now, recorded evenly over a run of the first texts of calibration: for hooks before it.

        Args:
            clips: how many texts.
            calls: how many calls, at least; as many as are made if those are fewer.
        """
        ...

    def touched(self, stage: object) -> list[str]:
        """The layers that are going to be quantized and that the ``on`` of this stage matches, in execution order."""
        ...

    @property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the first denoiser call that calibration saw."""
        ...

    def output(self, call: RecordedCall) -> Any:
        """What the denoiser as it is now gives for a recorded call, every part of it computed."""
        ...

    def name_of(self, stage: object) -> str:
        """What the recipe calls this stage."""
        ...

    def statistics(self, name: str) -> InputStatistics:
        """What was observed of the input of a layer."""
        ...

    def float_layer(self, name: str) -> nn.Module:
        """A float layer with its tensors in memory."""
        ...

    def quantized(self) -> dict[str, Any]:
        """The quantized layers that are in the model, by name."""
        ...

    def drafted(self, specs: Mapping[str, Specs]) -> AbstractContextManager[None]:
        """Inside, these layers are quantized with these numbers, rounded to nearest, and all other layers are float."""
        ...

    def layer_bytes(self, name: str, specs: Specs) -> int:
        """An estimate of the storage of a layer with these numbers."""
        ...

    def held_out_latents(self, **overrides: Any) -> Tensor:
        """Final latents ``[clips, ...]`` of the held-out texts by the pipeline as it is now."""
        ...

    def timed(self, phase: str, total: int) -> AbstractContextManager[None]:
        """Announce a phase of so many units of progress, and take its time for the report."""
        ...

    def advance(self) -> None:
        """One unit of progress."""
        ...

    def undo(self, action: Callable[[], object]) -> None:
        """Call this if the run fails, so that the pipeline is left as it was."""
        ...
