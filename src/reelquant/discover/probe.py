"""Running a denoiser a few times without leaving a trace on it, and remembering what each layer read as a number."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError

QUANTIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHUNK = 1 << 20
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # the 64-bit golden ratio, odd, as a signed number
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Fingerprint = tuple[tuple[int, ...], int]


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear and convolution by its dotted path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested tuples, lists and dicts (model outputs are dicts too), in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def first_tensor(args: tuple, kwargs: dict) -> Tensor | None:
    """The tensor a layer was called with, be it ``layer(x)`` or ``layer(input=x)``."""
    return next(tensors_in((args, kwargs)), None)


def fingerprint(x: Tensor) -> Fingerprint:
    """Shape and a 64-bit hash of the values: equal tensors agree, tensors that differ in one bit do not (but for -0.0 and 0.0).

    Kept instead of the tensor itself, so that probing a model of any size costs no memory.
    """
    x = torch.view_as_real(x) if x.is_complex() else x
    flat = x.detach().reshape(-1)
    return tuple(x.shape), sum(_hash(part, i) for i, part in enumerate(flat.split(_CHUNK))) & ((1 << 64) - 1)


def _hash(part: Tensor, chunk: int) -> int:
    if part.is_floating_point():
        part = (part + 0 if part.element_size() > 1 else part).view(_BITS[part.element_size()])  # + 0 turns -0.0 into 0.0
    index = torch.arange(1, part.numel() + 1, device=part.device) + chunk * _CHUNK
    weight = index * _MIX
    weight ^= weight >> 29
    return int((part.long() * weight).sum()) if part.numel() else 0


@contextlib.contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode, deterministic, without gradients, and no all-zero parameter hides a dependency.

    Zero-initialised gates and output projections (adaLN-zero, motion modules, ControlNet) multiply whole branches by zero: what
    feeds them would seem not to matter. Such parameters are exchanged for small random ones. Afterwards parameters (the very same
    storage), buffers, training flags and random number generators are as they were, also after an error.
    """
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    training = {module: module.training for module in model.modules()}
    buffers = [(module, dict(module._buffers), {k: b.clone() for k, b in module._buffers.items() if b is not None}) for module in training]
    asleep = [(p, p.data) for p in model.parameters() if _all_zero(p)]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=cuda), _eager(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # made-up inputs may well be unusual: none of the user's business
            model.eval()
            for seed, (parameter, zeros) in enumerate(asleep):
                parameter.data = _noise(zeros, seed) * 0.02
            yield
    finally:
        for parameter, zeros in asleep:
            parameter.data = zeros
        for module, flag in training.items():
            module.training = flag
        for module, originals, copies in buffers:
            _restore_buffers(module, originals, copies)


def _eager(model: nn.Module) -> contextlib.AbstractContextManager:
    """Compiled blocks would run past our hooks; asked for only where needed, since it imports the compiler."""
    compiled = any(getattr(module, "_compiled_call_impl", None) for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def _restore_buffers(module: nn.Module, originals: dict[str, Tensor | None], copies: dict[str, Tensor]) -> None:
    """Some models cache tables in buffers while they run: put the original tensors and their values back."""
    for name in [name for name in module._buffers if name not in originals]:
        del module._buffers[name]
    module._buffers.update(originals)
    for name, copy in copies.items():
        original = originals[name]
        if original is not None and not original.is_meta and not torch.equal(original, copy):
            original.copy_(copy)


def _all_zero(parameter: nn.Parameter) -> bool:
    if not parameter.is_floating_point() or parameter.is_meta or parameter.element_size() == 1 or not parameter.numel():
        return False
    return not bool(parameter[(0,) * parameter.ndim]) and not bool(parameter.any())  # the first number nearly always tells


def _noise(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like)


def run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """One forward, always with the same seed. Call inside :func:`steady`.

    Raises:
        UnsupportedError: if the output is not finite: NaN compares unequal to everything, no dependency could be trusted.
    """
    torch.manual_seed(0)
    output = model(**inputs)
    for x in tensors_in(output):
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise UnsupportedError(
                f"{type(model).__name__} gave NaN or inf on the probing inputs ({_shapes(inputs)}), roles cannot be read from it; "
                "pass inputs= with the arguments of one real call"
            )
    return output


def _shapes(inputs: dict[str, Any]) -> str:
    return ", ".join(f"{name} {tuple(x.shape)}" for name, value in inputs.items() for x in tensors_in(value))


def read_by_layers(model: nn.Module, inputs: dict[str, Any]) -> dict[str, list[Fingerprint]]:
    """Fingerprints of what each layer read, call by call, in execution order. Layers that never ran are absent."""
    seen: dict[str, list[Fingerprint]] = {}

    def remember(name: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = first_tensor(args, kwargs)
            if x is not None:
                seen.setdefault(name, []).append(fingerprint(x))

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in quantizable(model).items():
            stack.callback(module.register_forward_pre_hook(remember(name), with_kwargs=True).remove)
        run(model, inputs)
    return seen
