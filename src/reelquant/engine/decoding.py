"""What a VAE makes of the latents of held-out clips, before and after it is quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from reelquant.engine.components import Measure
from reelquant.models.parts import decibels
from reelquant.observe import exchanged


class Decoded(NamedTuple):
    """One call of ``decode``: its arguments, and its output in half precision."""

    args: Any
    kwargs: Any
    output: Tensor


@torch.no_grad()
def start_decoding(vae: Any, sample: Callable[[], object]) -> Measure:
    """Have a pipeline decode its clips with the float VAE, and return what compares the quantized one on the same latents.

    Figures: ``decoded_psnr`` and ``decoded_psnr_worst`` in dB, over clips; over frames where the VAE decodes pictures. There are none if
    the pipeline does not call ``decode``.

    Args:
        vae: the float VAE; the same module is compared later.
        sample: makes clips with the pipeline.
    """
    calls: list[Decoded] = []
    inner = vae.decode

    def decode(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(_own, (args, kwargs))
        result = inner(*args, **kwargs)
        calls.append(Decoded(args, kwargs, _clips(result).half()))
        return result

    with exchanged(vae, "decode", decode):
        sample()

    @torch.no_grad()
    def measure() -> dict[str, float]:
        pairs = [(call.output.float(), _clips(vae.decode(*call.args, **call.kwargs)).float()) for call in calls]
        found = [decibels(*rows) for one, other in pairs for rows in zip(one, other, strict=True)]
        return {"decoded_psnr": sum(found) / len(found), "decoded_psnr_worst": min(found)} if found else {}

    return measure


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _clips(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result.sample
