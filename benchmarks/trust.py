"""How far a quantized pipeline falls when it was calibrated on something else than what it is used for.

Run it from the repository root::

    python -m benchmarks.trust --pipeline tiny-dit --output benchmarks/results
    python -m benchmarks.trust --pipeline tiny-unet --output benchmarks/results
    python -m benchmarks.trust --pipeline runs/tiny-ltx/pipeline --only "as usual" --output runs/trust

A row is a recipe and a calibration: other texts, fewer texts, another size, number of frames, number of steps or scheduler. All rows
sample the same clips, evaluation captions with the pipeline's own settings, and are held against the float pipeline. *excess* is the
noise of clipping over the noise of rounding (:class:`reelquant.nn.saturation.Saturation`) in the first four of them; *check* is what the
product's own check after quantizing said of latents, mean and worst.

Float clips are sampled once and kept; rows that are already in the output are not measured again. Rows are kept in ``rows.jsonl``; the
table is ``trust-PIPELINE.md``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import reelquant
from benchmarks.common import Clips, Records, markdown, measure, parser
from reelquant.models.pipelines import general_prompts
from reelquant.models.shapes import COLORS, MOTIONS, SHAPES, Scene
from reelquant.recipes.recipe import load_recipe

RECIPES = ("qvd-w8a8", "minmax-w8a8")
COUNTED = 4  # clips in which clipping is counted
HEADINGS = ("calibrated", "recipe", "PSNR to float, dB (95 %)", "worst clip, dB", "to usual, dB: mean, worst", "excess", "check, dB")


@dataclass(frozen=True)
class Calibration:
    """What a recipe is calibrated on.

    Attributes:
        texts: prompts; None for the pipeline's own.
        prompts: how many of them calibrate; None for as many as the recipe says.
        seed: of the noise that calibration starts from; None for the recipe's.
        call: arguments of the pipeline call by pipeline, on top of the pipeline's own.
        scheduler: put into the pipeline while it is calibrated, by pipeline: class of diffusers and settings.
    """

    texts: Callable[[], list[str]] | None = None
    prompts: int | None = None
    seed: int | None = None
    call: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scheduler: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)


def half_of_the_words() -> list[str]:
    """No digits, two colours, everything else of the vocabulary."""
    colours, motions = list(COLORS)[:2], list(MOTIONS)
    rest = [("small", "black"), ("large", "white"), ("small", "gray"), ("large", "striped"), ("small", "checkered")]
    return [
        Scene(SHAPES[i % len(SHAPES)], colours[i % 2], motions[(3 * i + 1) % len(motions)], *rest[(i // 2) % len(rest)]).caption()
        for i in range(24)
    ]


def few_words() -> list[str]:
    """Two colours, two shapes, three directions; neither sizes nor backgrounds."""
    return [
        Scene(shape, colour, motion, "small", "black").caption(size=False, background=False)
        for shape in SHAPES[:2]
        for colour in list(COLORS)[:2]
        for motion in list(MOTIONS)[:3]
    ] * 2


FLOW = ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0})
SIZES = {
    "tiny-dit": {"height": 96, "width": 48},
    "tiny-unet": {"height": 96, "width": 48},
    "tiny-ltx": {"height": 96, "width": 32},  # its pipeline takes multiples of 32
}
FEWER = {"tiny-dit": {"num_frames": 9}, "tiny-unet": {"num_frames": 6}, "tiny-ltx": {"num_frames": 9}}
FEW = {"tiny-dit": {"num_frames": 5}, "tiny-unet": {"num_frames": 4}, "tiny-ltx": {"num_frames": 5}}
SCHEDULERS = {
    "tiny-dit": FLOW,
    "tiny-unet": ("DPMSolverMultistepScheduler", {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
    "tiny-ltx": FLOW,
}
CALIBRATIONS: dict[str, Calibration] = {
    "as usual": Calibration(),
    **{f"as usual, seed {seed}": Calibration(seed=seed) for seed in (2000, 3000, 4000, 5000)},  # what chance alone does to the worst clip
    "general prompts": Calibration(texts=general_prompts),
    "half of the words": Calibration(texts=half_of_the_words),
    "few words": Calibration(texts=few_words),
    "4 prompts": Calibration(prompts=4),
    "another size": Calibration(call=SIZES),
    "fewer frames": Calibration(call=FEWER),
    "far fewer frames": Calibration(call=FEW),
    "8 steps": Calibration(call={name: {"num_inference_steps": 8} for name in SIZES}),
    "50 steps": Calibration(call={name: {"num_inference_steps": 50} for name in SIZES}),
    "another scheduler": Calibration(scheduler=SCHEDULERS),
}


# --- rows -----------------------------------------------------------------------------------------------------------------------------


def digest(clips: Clips, recipe: str, label: str) -> str:
    """Changes with the clips, the recipe and what it is calibrated on."""
    how = CALIBRATIONS[label]
    on = [how.texts and how.texts(), how.prompts, how.call.get(clips.name), how.scheduler.get(clips.name), *filter(None, [how.seed])]
    return f"{clips.digest}-{load_recipe(recipe).digest()}-{hashlib.sha256(json.dumps(on).encode()).hexdigest()[:8]}"


def check_known(pipeline: str, labels: Iterable[str]) -> None:
    """Refuse calibrations that say nothing about this pipeline: they would be measured as the usual one, under another name.

    Raises:
        SystemExit: naming what is missing.
    """
    for label in labels:
        for settings in filter(None, (CALIBRATIONS[label].call, CALIBRATIONS[label].scheduler)):
            if pipeline not in settings:
                known = ", ".join(settings)
                raise SystemExit(
                    f"'{label}' is not defined for '{pipeline}', only for {known}: leave it out with --only, or add it to trust.py"
                )


@contextmanager
def other_scheduler(pipe: Any, wanted: tuple[str, Mapping[str, Any]] | None) -> Iterator[None]:
    """Inside, the pipeline samples with another scheduler."""
    import diffusers

    usual = pipe.scheduler
    if wanted is not None:
        pipe.scheduler = getattr(diffusers, wanted[0]).from_config(usual.config, **wanted[1])
    try:
        yield
    finally:
        pipe.scheduler = usual


def row(clips: Clips, reference: Tensor, recipe: str, how: Calibration) -> dict[str, Any]:
    """Calibrate on something else, sample as usual, and hold the clips against float."""
    pipe = clips.open()
    wanted = {"calibrate.prompts": how.prompts, "calibrate.seed": how.seed}
    overrides = {key: value for key, value in wanted.items() if value is not None}
    texts = None if how.texts is None else how.texts()
    with other_scheduler(pipe, how.scheduler.get(clips.name)):
        report = reelquant.quantize(pipe, recipe, texts, overrides=overrides, **clips.call | dict(how.call.get(clips.name, {})))
    frames = clips.frames(pipe)
    with reelquant.saturation(pipe) as seen:  # slow, so in some of the clips
        Clips(clips.pipeline, COUNTED, clips.call, clips.batch).frames(pipe)
    facts = {"excess": seen.excess, "check": report.latent_psnr, "check_worst": report.latent_psnr_worst, "warnings": report.warnings}
    return (
        facts | {"clipping": [[name, one.noise] for name, one in [*seen.by_layer.items()][:8]]} | measure(frames, reference, clips.prompts)
    )


def run(clips: Clips, records: Records, reference: Tensor, rows: list[tuple[str, str]]) -> None:
    """Measure the rows that are missing."""
    for label, recipe in rows:
        name, key = f"trust {label}: {recipe}", digest(clips, recipe, label)
        if not records.done(name, key):
            found = row(clips, reference, recipe, CALIBRATIONS[label])
            records.add({"name": name, "digest": key, "pipeline": clips.name, "clips": clips.count, "status": "measured"} | found)
            print(f"{clips.name}: {name}: {found['psnr_mean']:.1f} dB, worst {min(found['psnr']):.1f}", flush=True)


# --- table ----------------------------------------------------------------------------------------------------------------------------


def table(clips: Clips, records: Records, rows: list[tuple[str, str]]) -> str:
    """The rows of these clips and of today's recipes, as far as they are measured."""
    known = {(one["name"], one["digest"]): one for one in records.load()}
    found = {(label, recipe): known.get((f"trust {label}: {recipe}", digest(clips, recipe, label))) for label, recipe in rows}
    usual = {recipe: one for (label, recipe), one in found.items() if label == "as usual" and one}
    lines = [_line(label, recipe, one, usual.get(recipe)) for (label, recipe), one in found.items() if one]
    return (
        f"{clips.name}, {clips.count} clips of evaluation captions, sampled with the pipeline's own settings\n\n{markdown(HEADINGS, lines)}"
    )


def _line(label: str, recipe: str, one: Mapping[str, Any], usual: Mapping[str, Any] | None) -> list[str]:
    mean = f"{one['psnr_mean']:.1f} ({one['psnr_low']:.1f} to {one['psnr_high']:.1f})"
    against = f"{one['psnr_mean'] - usual['psnr_mean']:+.1f}, {min(one['psnr']) - min(usual['psnr']):+.1f}" if usual else "-"
    check = f"{one['check']:.1f} ({one['check_worst']:.1f})"
    return [label, recipe, mean, f"{min(one['psnr']):.1f}", against, f"{one['excess']:.2f}", check]


def main() -> None:
    """Parse the command line, measure what is missing, write the table."""
    made = parser(__doc__)
    made.add_argument("--only", nargs="*", choices=list(CALIBRATIONS), default=list(CALIBRATIONS), help="calibrations to measure")
    made.add_argument("--recipes", nargs="*", default=list(RECIPES), help="names or files of recipes")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    clips, records = Clips(args.pipeline, args.clips, dict(args.set), args.batch), Records(args.output / "rows.jsonl")
    check_known(clips.name, args.only)
    rows = [(label, recipe) for label in args.only for recipe in args.recipes]
    if not args.table:
        run(clips, records, clips.float_frames(args.output), rows)
    text = table(clips, records, rows)
    (args.output / f"trust-{clips.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
