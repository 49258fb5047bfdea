"""How long a denoising step takes: the times of everything that it computes, added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from torch import nn

from reelquant._progress import Progress
from reelquant.planning.timing import (
    Timings,
    Work,
    attention_key,
    attention_work,
    layer_key,
    layer_work,
    operator_key,
    operator_work,
)
from reelquant.planning.trace import AttentionCall, Call, LayerCall, Trace
from reelquant.stages import Specs

Make = Callable[[], tuple[Work, float]]


def seconds(model: nn.Module, trace: Trace, specs: Mapping[str, Specs], timings: Timings, progress: Progress | None = None) -> float:
    """Seconds of a call of a model.

    Args:
        model: its layers say what is timed.
        trace: what the call computes.
        specs: numbers of its quantized layers; empty for a float model.
        timings: of this machine; what it lacks is measured.
        progress: hears of the measurements.
    """
    works, counts = dict[str, Make](), Counter[str]()
    for call, count in trace.calls.items():
        key, make = _piece(model, call, specs, timings.device)
        works[key] = make
        counts[key] += count
    timings.measure(works, progress)
    return sum(count * timings.seconds[key] for key, count in counts.items())


def _piece(model: nn.Module, call: Call, specs: Mapping[str, Specs], device: str) -> tuple[str, Make]:
    """What to time for a piece of work, and its key. Activations count apart: a layer that computes them saves a pass, and not the work."""
    if isinstance(call, LayerCall):
        stock, own = model.get_submodule(call.layer), specs.get(call.layer)
        return layer_key(stock, own, call.input), lambda: layer_work(stock, own, call, device)
    if isinstance(call, AttentionCall):
        return attention_key(call, bool(specs)), lambda: attention_work(call, bool(specs), device)
    return operator_key(call), lambda: operator_work(call, device)
