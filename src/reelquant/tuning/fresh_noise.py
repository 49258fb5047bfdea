"""Whether a sampler adds fresh noise at its steps, as ancestral ones do; found out by the random numbers that it draws."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def noisy_steps(scheduler: Any) -> Iterator[list[bool]]:
    """A list that gets, for every step that the scheduler makes inside, whether random numbers were drawn."""
    drawn: list[bool] = []
    made = scheduler.step

    @functools.wraps(made)
    def step(*args: Any, **kwargs: Any) -> Any:
        before = _states(kwargs.get("generator"))
        found = made(*args, **kwargs)
        drawn.append(any(not torch.equal(a, b) for a, b in zip(before, _states(kwargs.get("generator")), strict=True)))
        return found

    scheduler.step = step
    try:
        yield drawn
    finally:
        del scheduler.step


def _states(given: Any) -> list[Tensor]:
    """States of the generators that a step may draw from: those it is given, and PyTorch's own."""
    generators = given if isinstance(given, list) else [given]
    return [torch.get_rng_state(), *(one.get_state() for one in generators if one is not None)]
