"""What learned rounding brings at W4A8: rounding to nearest and GPTQ, each with and without ``reconstruct: adaround`` on top.

Run it from the repository root::

    python -m benchmarks.rounding --pipeline tiny-dit --clips 16 --output benchmarks/results
    python -m benchmarks.rounding --pipeline tiny-unet --clips 16 --output benchmarks/results

Rows are calibrated on the pipeline's own captions and judged on evaluation captions with other noise. *PSNR* is that of the clips to
float. *error of blocks* is the squared error of a block's output over its variance, with quantized blocks before it, in calls of the
evaluation captions. *CPU* is the processor time of the whole quantization, sampling for calibration included.

Float clips are sampled once and kept; rows that are already in the output are not measured again. Rows are kept in ``rows.jsonl``; the
table is ``rounding-PIPELINE.md``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import SAMPLING_SEED, Clips, Records, markdown, measure, parser
from reelquant.discover import denoiser_of
from reelquant.engine.blocks import replay
from reelquant.evidence.variants import Comparison
from reelquant.models.sampling import sample
from reelquant.observe import RecordedCall, Recording
from reelquant.recipes.recipe import load_recipe
from reelquant.reconstruct.error import output_error

BASE = "minmax-w4a8"
TEXTS, EVERY = 4, 3
"""Errors of blocks are measured in one of every ``EVERY`` calls of the denoiser for so many captions."""
LAYERS = "role:main | role:temporal | role:prompt"
SOLVERS: dict[str, dict[str, Any]] = {
    "nearest": {"solve": "nearest", "correct_bias": True, "on": LAYERS},
    "gptq": {"solve": "gptq", "correct_bias": True, "on": LAYERS},
}
LEARNED = {"reconstruct": "adaround", "on": LAYERS}
HEADINGS = ("weights", "PSNR to float, dB (95 %)", "worst clip, dB", "error of blocks, 1e-3", "CPU, s")


def recipes() -> dict[str, dict[str, Any]]:
    """The rows by their labels; nearest with adaround is what ``brecq-w4a8`` does."""
    rows: dict[str, dict[str, Any]] = {}
    for name, solver in SOLVERS.items():
        for label, steps in ((name, [solver]), (f"{name} + adaround", [solver, LEARNED])):
            rows[label] = {"extends": BASE, "name": f"rounding {label}", "steps": steps}
    return rows


# --- errors of blocks -----------------------------------------------------------------------------------------------------------------


class Blocks:
    """The blocks of a float denoiser in calls that no recipe has seen."""

    def __init__(self, pipe: Any, denoiser: nn.Module, prompts: Sequence[str], call: Mapping[str, Any]) -> None:
        from reelquant import plan

        self.names, self.calls, numbers = plan(pipe, BASE).map.blocks, Recording(), itertools.count()

        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if next(numbers) % EVERY == 1:
                self.calls.append(RecordedCall(args, kwargs))

        handle = denoiser.register_forward_hook(see, with_kwargs=True)
        sample(pipe, prompts, seed=SAMPLING_SEED, batch=len(prompts), output="latent", **call)
        handle.remove()
        self.outputs = {name: self._outputs(denoiser, name) for name in self.names}

    def _outputs(self, denoiser: nn.Module, name: str) -> list[Any]:
        return [call.output for call in replay(denoiser, name, self.calls, outputs=True)]

    def error(self, denoiser: nn.Module) -> float:
        """Mean over blocks and calls of the error of a block's output, with the denoiser's own blocks before it."""
        pairs = [pair for name in self.names for pair in zip(self._outputs(denoiser, name), self.outputs[name], strict=True)]
        return float(torch.stack([output_error(found, wanted) for found, wanted in pairs]).mean())


# --- rows and table -------------------------------------------------------------------------------------------------------------------


def digest(clips: Clips, recipe: Mapping[str, Any]) -> str:
    """Changes with the clips and with the recipe."""
    return f"{clips.digest}-{load_recipe(dict(recipe)).digest()}"


Rows = Mapping[str, Mapping[str, Any]]  # label -> recipe


def run(clips: Clips, records: Records, reference: Tensor, rows: Rows) -> None:
    """Measure the rows that are missing."""
    missing = [recipe for recipe in rows.values() if not records.done(recipe["name"], digest(clips, recipe))]
    if not missing:
        return
    pipe = clips.open()
    blocks = Blocks(pipe, denoiser_of(pipe)[1], clips.prompts[:TEXTS], clips.call)
    for recipe in missing:
        key = {"name": recipe["name"], "digest": digest(clips, recipe), "pipeline": clips.name, "clips": clips.count}
        comparison = Comparison(pipe, clips.prompts, SAMPLING_SEED, clips.call, batch=clips.batch)
        records.add(key | {"status": "measured"} | row(comparison, blocks, reference, recipe))
        print(f"{clips.name}: {recipe['name']}", flush=True)


def row(comparison: Comparison, blocks: Blocks, reference: Tensor, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Quantize, and hold blocks and clips against float."""
    start = time.process_time()
    report = comparison.quantize(load_recipe(dict(recipe)))
    facts = {"cpu_quantize": round(time.process_time() - start, 1), "warnings": report.warnings}
    error = blocks.error(getattr(comparison.pipe, comparison.component))
    frames = comparison.sample()[0]
    comparison.restore()
    return facts | {"block_error": error} | measure(frames, reference, comparison.captions)


def table(clips: Clips, records: Records, rows: Rows, about: str) -> str:
    """The rows of these clips and of today's recipes, as far as they are measured."""
    known = {(row["name"], row["digest"]): row for row in records.load()}
    keys = {label: (recipe["name"], digest(clips, recipe)) for label, recipe in rows.items()}
    found = {label: known[key] for label, key in keys.items() if key in known}
    title = f"{clips.name}, {clips.count} clips, {about}\n\n"
    return title + markdown(HEADINGS, [_line(label, row) for label, row in found.items()])


def _line(label: str, row: Mapping[str, Any]) -> list[str]:
    mean = f"{row['psnr_mean']:.1f} ({row['psnr_low']:.1f} to {row['psnr_high']:.1f})"
    return [label, mean, f"{min(row['psnr']):.1f}", f"{1000 * row['block_error']:.2f}", f"{row['cpu_quantize']:.0f}"]


def main() -> None:
    """Parse the command line, measure what is missing, write the table."""
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    clips, records = Clips(args.pipeline, args.clips, dict(args.set), args.batch), Records(args.output / "rows.jsonl")
    if not args.table:
        run(clips, records, clips.float_frames(args.output), recipes())
    about = "4-bit weights in groups of 64, static 8-bit inputs"
    (args.output / f"rounding-{clips.name}.md").write_text(text := table(clips, records, recipes(), about))
    print(text)


if __name__ == "__main__":
    main()
