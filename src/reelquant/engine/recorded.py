"""Recorded calls of a denoiser, made again: by the whole of it, or up to one of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from reelquant.clock import NAME
from reelquant.nn import get_module
from reelquant.observe import RecordedCall, Recording
from reelquant.reuse import all_computed


def again(denoiser: nn.Module, call: RecordedCall) -> Any:
    """What a denoiser as it is now gives for a recorded call.

    Nothing is reused from earlier calls: the recorded calls are not all of a trajectory. For the same reason the half of guidance is the
    recorded one.
    """
    clock = getattr(denoiser, NAME, None)
    with ExitStack() as inside:
        inside.enter_context(all_computed(denoiser))
        if clock is not None:
            inside.enter_context(clock.computing(call.half))
        return denoiser(*call.args, **call.kwargs)


class _StopCall(Exception):  # noqa: N818  (it is not an error)
    """Ends a denoiser call early: everything that was wanted of it is recorded."""


@torch.no_grad()
def replay(denoiser: nn.Module, name: str, calls: Sequence[RecordedCall], *, outputs: bool) -> Recording:
    """Make recorded calls of a denoiser :func:`again`, and record the first call of one of its parts each time.

    Recorded calls of a denoiser are small (latents and embeddings), those of its blocks are not: a block's calls are made again
    when they are needed, one block at a time.

    Args:
        outputs: record what the part gives, too; without, the denoiser stops before the part runs.
    """
    recording, part = Recording(), get_module(denoiser, name)
    for call in calls:

        def before(module: nn.Module, args: Any, kwargs: Any, call: RecordedCall = call) -> None:
            if not outputs:
                recording.append(replace(call, args=args, kwargs=kwargs, output=None))
                raise _StopCall

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any, call: RecordedCall = call) -> None:
            recording.append(replace(call, args=args, kwargs=kwargs, output=output))
            raise _StopCall

        handles = [
            part.register_forward_pre_hook(before, with_kwargs=True),
            part.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            again(denoiser, call)
        except _StopCall:
            pass
        finally:
            for handle in handles:
                handle.remove()
    return recording
