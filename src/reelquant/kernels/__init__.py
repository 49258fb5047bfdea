"""Which code computes a quantized layer: a table of kernels by device, best first. Modules, and when they prepare a kernel, do not belong
here.

The reference in plain torch takes every layer. It comes last, and all other kernels are tested against it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from reelquant._errors import RecipeError, UnsupportedError, nearest
from reelquant.kernels.features import not_taken
from reelquant.kernels.frame_bands import FRAMES, Arrangement, FrameBands, haar
from reelquant.kernels.hadamard import block_size, hadamard
from reelquant.kernels.kernel import Kernel
from reelquant.kernels.mixed_input import mixing
from reelquant.kernels.mixing import Mix, Permutation, Rotation, Scaling, mix_dtype, read_mix, unmixed
from reelquant.kernels.operands import InputQuant, Operands, PackedWeight, Runner, Window, of_slot
from reelquant.kernels.reference import Reference

REFERENCE = Kernel("reference", Reference.takes, Reference.refuses, Reference, low_bit=False)


@functools.cache
def _cpu() -> tuple[Kernel, ...]:
    from reelquant.kernels import cpu

    return tuple(map(mixing, cpu.KERNELS))


@functools.cache
def _cuda() -> tuple[Kernel, ...]:
    from reelquant.kernels.cuda import layers

    return tuple(map(mixing, layers.KERNELS))


KERNELS: dict[str, Callable[[], tuple[Kernel, ...]]] = {"cpu": _cpu, "cuda": _cuda}
"""Device type -> its kernels, best first, without the reference; a function, so that a machine imports only what it can run."""

BACKENDS = ("auto", "reference")
_backend: ContextVar[str | None] = ContextVar("reelquant_kernels", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose kernels for layers that run for the first time inside: ``reference`` for the oracle, ``auto`` for the fastest.

    Raises:
        RecipeError: if there is no backend of that name.
    """
    check_backend(name)
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def check_backend(name: str) -> str:
    """The name, if there is such a backend.

    Raises:
        RecipeError: with the nearest one.
    """
    if name not in BACKENDS:
        raise RecipeError(f"unknown kernels '{name}'; {nearest(name, BACKENDS)}")
    return name


def current_backend() -> str:
    """``auto``, unless :func:`backend` or the environment variable ``REELQUANT_KERNELS`` says otherwise."""
    return _backend.get() or check_backend(os.environ.get("REELQUANT_KERNELS", "auto"))


def native_float(device: str = "cpu") -> torch.dtype:
    """The float dtype to run a denoiser in on this type of device: bfloat16, or float32 on processors that only emulate it."""
    emulated = device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if emulated else torch.bfloat16


def select(operands: Operands, device: str, wanted: str = "auto") -> tuple[Kernel, dict[str, str]]:
    """The best kernel that computes this layer on this type of device, and why each better one does not.

    The reference comes last, and alone if the layer (``wanted``) or :func:`current_backend` asks for it.

    Raises:
        UnsupportedError: if not even the reference computes the layer.
    """
    refused: dict[str, str] = {}
    fast = KERNELS[device]() if wanted == "auto" and current_backend() == "auto" and device in KERNELS else ()
    for kernel in (*fast, REFERENCE):
        if (reason := kernel.declines(operands)) is None:
            return kernel, refused
        refused[kernel.name] = reason
    raise UnsupportedError(
        f"no kernel computes a layer of shape {operands.weight.shape} on '{device}', not even the reference: {refused[REFERENCE.name]}"
    )


__all__ = [
    "BACKENDS",
    "FRAMES",
    "KERNELS",
    "REFERENCE",
    "Arrangement",
    "FrameBands",
    "InputQuant",
    "Kernel",
    "Mix",
    "Operands",
    "PackedWeight",
    "Permutation",
    "Reference",
    "Rotation",
    "Runner",
    "Scaling",
    "Window",
    "backend",
    "block_size",
    "check_backend",
    "current_backend",
    "haar",
    "hadamard",
    "mix_dtype",
    "native_float",
    "not_taken",
    "of_slot",
    "read_mix",
    "select",
    "unmixed",
]
