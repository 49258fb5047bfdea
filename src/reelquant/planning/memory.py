"""What lies in memory while a clip is made: weights of all components, what the one that runs holds, the process itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from torch import nn

from reelquant.engine.plan import Plan
from reelquant.engine.quality import model_bytes
from reelquant.engine.sizes import quantized_bytes, table_bytes
from reelquant.planning.heap import apart, held
from reelquant.planning.parts import Part
from reelquant.planning.trace import Trace

FRAMES = 3  # copies of a clip in float32 between the VAE and the user: decoded, scaled, as an array
MODES = ("none", "model", "group")
"""Ways of diffusers to keep components elsewhere until they run: none (everything on the device), ``enable_model_cpu_offload`` (one
component at a time), ``enable_group_offload`` at the level of blocks (of a component, a block that runs and one on its way)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one component.

    Attributes:
        stored: in the folder.
        weights: in memory.
        outside, block: of its weights those outside of blocks, and the largest block; all and 0 if it has no blocks.
        running: what its calls hold beside the weights, at most.
        kept: results that it keeps from step to step, as long as the clip is made and after it.
    """

    stored: int
    weights: int
    outside: int
    block: int
    running: int
    kept: int = 0


def between(low: Footprint, high: Footprint, share: float) -> Footprint:
    """Bytes of a component with numbers between those of two footprints, at a share of the way from the first to the second."""
    return Footprint(*(round(one + share * (other - one)) for one, other in zip(astuple(low), astuple(high), strict=True)))


def footprint(part: Part, plan: Plan | None, traces: Sequence[Trace], device: str, kept: int = 0, steps: int = 0) -> Footprint:
    """Of a component, float (``plan`` is None) or quantized.

    Args:
        traces: of its calls.
        kept: bytes that it keeps from step to step.
        steps: of the sampler, for tables that have a row for each.
    """
    model = part.model
    tables = 0 if plan is None else table_bytes(plan, steps)
    weights = part.bytes if plan is None else quantized_bytes(plan, model) + tables
    stored = part.stored if plan is None else quantized_bytes(plan, model, stored=True) + tables  # what stays float is written as it was
    blocks = [model_bytes(block) for block in _blocks(model)]
    share = weights / max(part.bytes, 1)
    return Footprint(
        stored,
        weights,
        round((part.bytes - sum(blocks)) * share),
        round(max(blocks, default=0) * share),
        max((running(trace, device, once=not part.denoises) for trace in traces), default=0),
        kept,
    )


def running(trace: Trace, device: str, *, once: bool = False) -> int:
    """Bytes that a call holds: on a CPU in the heap of the process, on other devices those of its tensors.

    Args:
        once: of a component that runs once for a clip. Decoders have tensors of many sizes, whose holes do not suit each other: the middle
            between the least and the most that a heap holds is taken.
    """
    if device != "cpu":
        return trace.peak
    least = held(trace.events)
    return (least + max(apart(trace.events), least)) // 2 if once else least


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Members of the outermost lists of modules."""
    found: list[nn.Module] = []
    outer: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{other}.") for other in outer):
            outer.append(name)
            found += [member for member in module if isinstance(member, nn.Module)]  # some lists have empty places
    return found


def clip_bytes(clip: Sequence[int]) -> int:
    """Of the frames, height and width of a clip on its way to the user."""
    count = 3 * 4 * FRAMES
    for length in clip:
        count *= length
    return count if clip else 0


def peak(parts: Mapping[str, Footprint], base: int, clip: Sequence[int], mode: str) -> int:
    """Most bytes at a time while a clip is made.

    Args:
        parts: every component.
        base: bytes of the process without them; 0 on a device of its own.
        clip: frames, height and width.
        mode: of :data:`MODES`.
    """
    every = list(parts.values())
    frames = clip_bytes(clip) if base else clip_bytes(clip) // FRAMES
    base += sum(one.kept for one in every)  # nothing moves it, and nothing forgets it before the next clip
    if mode == "none":
        return base + sum(one.weights for one in every) + max([frames, *(one.running for one in every)])
    if mode == "model":
        return base + max([frames, *(one.weights + one.running for one in every)])
    return base + max([frames, *(min(one.outside + 2 * one.block, one.weights) + one.running for one in every)])
