"""How far 4-bit inputs in groups are from float, format by format: recorded inputs of all main layers, nothing else rounded.

Run it from the repository root::

    python -m benchmarks.input_formats --pipeline tiny-dit --clips 2 --set num_inference_steps=4 --output benchmarks/results

Float clips of calibration's captions are sampled, and what their layers read is rounded by each way. The table,
``input-formats-PIPELINE.md``, has the ratio of signal to error and how much lower the error is than that of int4 in groups of 32, both in
dB and as means over the layers. *4 or 6* lets the largest number of a group become 6 or 4, whichever gives the group the smaller error
(four over six, arXiv 2512.02010; ``range: four_over_six``). *rotated* mixes the channels of a group of 16 by a Hadamard matrix before.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import SAMPLING_SEED, Clips, markdown, parser
from reelquant import plan
from reelquant.discover import denoiser_of
from reelquant.formats import Granularity, parse_format
from reelquant.formats.quantizer import bind
from reelquant.kernels.hadamard import hadamard
from reelquant.models.pipelines import calibration_prompts
from reelquant.models.sampling import sample

GROUP = 16
BASE = "int4, groups of 32"
HEADINGS = ("inputs", "signal over error, dB", f"lower than {BASE}, dB", "layers where it is lower")


def error(fmt: str, size: int, scale: str, reach: float, x: Tensor) -> Tensor:
    """Squared error of every group of ``[positions, channels]``, whose largest number is at the end of the format divided by ``reach``."""
    grain = Granularity("group", size, scale=scale)
    blocks = grain.blocks(x)
    largest = blocks.abs().amax(1) * reach
    return (grain.blocks(bind(parse_format(fmt), grain, -largest, largest)(x)) - blocks).square().sum(1)


def plain(fmt: str, size: int, scale: str = "e4m3") -> Callable[[Tensor], float]:
    """Every group's largest number is at the end of the format."""
    return lambda x: float(error(fmt, size, scale, 1.0, x).sum())


def four_or_six(x: Tensor) -> float:
    """e2m1, whose last numbers are 4 and 6: the better of both for every group."""
    return float(torch.minimum(error("e2m1", GROUP, "e4m3", 1.0, x), error("e2m1", GROUP, "e4m3", 1.5, x)).sum())


def rotated(way: Callable[[Tensor], float]) -> Callable[[Tensor], float]:
    """The same behind a rotation inside of groups, which keeps lengths."""
    return lambda x: way(hadamard(x.unflatten(1, (-1, GROUP))).flatten(1))


NVFP4, INT4 = plain("e2m1", GROUP), plain("int4", GROUP)
WAYS: dict[str, Callable[[Tensor], float]] = {
    BASE: plain("int4", 32, "float"),
    f"{BASE}, rotated": rotated(plain("int4", 32, "float")),
    "int4, groups of 16, e4m3 scales": INT4,
    "int4, groups of 16, e4m3 scales, rotated": rotated(INT4),
    "e2m1, groups of 16, e4m3 scales (NVFP4)": NVFP4,
    "NVFP4, rotated": rotated(NVFP4),
    "NVFP4, 4 or 6": four_or_six,
    "NVFP4, 4 or 6, rotated": rotated(four_or_six),
}


def observed(clips: Clips) -> dict[str, dict[str, float]]:
    """Squared errors by layer and way, and the squared inputs under an empty name."""
    pipe, found = clips.open(), defaultdict[str, dict[str, float]](lambda: defaultdict(float))
    denoiser = denoiser_of(pipe)[1]

    def see(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = (args[0] if args else kwargs["input"]).float()
        x = (x if isinstance(module, nn.Linear) else x.movedim(1, -1)).flatten(0, -2)
        if x.shape[1] % 32:
            return
        for way, rounding in WAYS.items():
            found[name][way] += rounding(x)
        found[name][""] += float(x.square().sum())

    for name, layer in plan(pipe, "minmax-w8a8").map.layers.items():
        if layer.role == "main":
            module = denoiser.get_submodule(name)
            module.register_forward_pre_hook(lambda module, args, kwargs, name=name: see(name, module, args, kwargs), with_kwargs=True)
    sample(pipe, calibration_prompts(pipe, clips.count), seed=SAMPLING_SEED, batch=clips.batch, output="latent", **clips.call)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """A line for every way."""
    lines = []
    for way in WAYS:
        over = [10 * math.log10(layer[""] / layer[way]) for layer in found.values()]
        lower = [10 * math.log10(layer[BASE] / layer[way]) for layer in found.values()]
        better = sum(gain > 0 for gain in lower)
        lines.append([way, f"{sum(over) / len(over):.1f}", f"{sum(lower) / len(lower):+.1f}", f"{better} of {len(found)}"])
    return markdown(HEADINGS, lines)


def main() -> None:
    """Parse the command line, round, write the table."""
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    clips = Clips(args.pipeline, args.clips, dict(args.set), args.batch)
    text = f"{clips.name}, {clips.count} clips, inputs of all main layers\n\n{table(observed(clips))}"
    (args.output / f"input-formats-{clips.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
