"""Gated activations by device: one pass over memory where there is a loop for it, plain torch elsewhere."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from reelquant.kernels import current_backend
from reelquant.kernels.activations import ACTIVATIONS


@functools.cache
def _cpu() -> Any:
    from reelquant.kernels.cpu import gates

    return gates


GATES = {"cpu": _cpu}
"""Device type -> a module with ``refuses`` and ``gate``; a function, so that a machine imports only what it can run."""


def gate(x: Tensor, activation: str, first: bool) -> Tensor:
    """``activation(a) * b``, or ``a * activation(b)`` if not ``first``, of the halves a, b of the last axis ``[..., 2 * channels]``.

    A loop rounds to the dtype of x once, torch twice.
    """
    wanted = current_backend() == "auto" and not (torch.is_grad_enabled() and x.requires_grad)
    if wanted and x.device.type in GATES and (way := GATES[x.device.type]()).refuses(x) is None:
        return way.gate(x, activation, first)
    a, b = x.chunk(2, -1)
    return ACTIVATIONS[activation](a) * b if first else a * ACTIVATIONS[activation](b)
