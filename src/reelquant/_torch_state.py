"""Settings of torch that hold for a whole process or thread. Code of others changes them, at import or around a call, and what this library
computes must be the same bytes whatever they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DEVICES = ("cpu", "cuda")


@contextmanager
def stock_torch() -> Iterator[None]:
    """Inside, torch is as it starts: default dtype float32, default device CPU, no autocast, no inference mode, gradients allowed.

    A decorator, too. What is set already is not set again, so nothing is written where nothing differs: the default dtype belongs to all
    threads.

    Example:
        >>> with stock_torch():
        ...     assert torch.zeros(1).dtype == torch.float32
    """
    import torch

    with ExitStack() as stack:
        if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
            stack.enter_context(torch.inference_mode(False))  # allows gradients, too
        for device in filter(torch.is_autocast_enabled, DEVICES):
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (before := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, before)
        yield


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for those made in inference mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version
