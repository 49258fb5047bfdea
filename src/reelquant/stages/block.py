"""What stages see of a block: recorded calls, and the layers inside while they are solved together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from reelquant.clock import Clock
from reelquant.observe import RecordedCall
from reelquant.stages.layer import LayerWork


def _ignore(sentence: str) -> None:
    """Warnings of a block that does not belong to a run."""


@dataclass(frozen=True, eq=False)
class BlockWork:
    """A part of a denoiser whose layers have codes, and may get better ones.

    Attributes:
        name: module path of the part.
        module: a copy of it with the quantized layers in place and rewrites folded into its norms.
        layers: the layers that may change, by path inside of ``module``; an empty path means that ``module`` is the layer.
        calls: recorded calls. With ``True`` their arguments are what the quantized parts before this one give, with ``False``
            those of the float model. Outputs are those of the float model in both cases. The denoiser calls behind them are of the float
            pipeline's trajectories, or of the quantized one's if the stage resamples.
        clock: of the layers in ``module``; None without calibrated timesteps.
        seed: for random choices.
        warn: adds a sentence to the warnings of the report. Blocks that say the same become one warning that counts and names them, so
            the sentence names no block.
    """

    name: str
    module: nn.Module
    layers: Mapping[str, LayerWork]
    calls: Callable[[bool], Sequence[RecordedCall]]
    clock: Clock | None = None
    seed: int = 0
    warn: Callable[[str], None] = _ignore

    def output(self, call: RecordedCall) -> Any:
        """What :attr:`module` gives for the arguments of a call, at its denoising step and as its half of a guidance pair."""
        if self.clock is not None:
            with self.clock.computing(call.half):
                self.clock.tick(self.clock.timesteps[call.step])
        return self.module(*call.args, **call.kwargs)
