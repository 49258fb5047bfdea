"""Our own recipes, and what each of their parts brings: the recipe, the recipe without one part, and today's QVD recipe of the same bits.

Run it from the repository root::

    python -m benchmarks.reel --pipeline tiny-dit --clips 64 --output benchmarks/results --only reel-w6a6
    python -m benchmarks.reel --pipeline tiny-dit --clips 32 --output benchmarks/results

Rows of one process share a calibration where they calibrate alike. Rows that are already in the output, whoever measured them, are not
measured again. Rows are kept in ``rows.jsonl``; the table is ``reel-PIPELINE.md``, with a section for every number of clips.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import SAMPLING_SEED, Clips, Records, markdown, measure, parser
from reelquant.evidence import bootstrap
from reelquant.evidence.variants import Comparison
from reelquant.recipes.recipe import Recipe, load_recipe

SOLVED = "role:main | role:temporal | role:prompt"
GPTQ = {"solve": "gptq", "correct_bias": True, "on": SOLVED}
SKIP = {"on": "role:entry | role:exit", "skip": True, "because": "first and last layer stay float"}


def without(parent: str, part: str, **changes: Any) -> dict[str, Any]:
    """A recipe with other keys."""
    return {"extends": parent, "name": f"{parent} without {part}"} | changes


def steps_of(parent: str) -> list[dict[str, Any]]:
    """The steps of a recipe, as they are written."""
    return [step.model_dump(exclude_none=True) for step in load_recipe(parent).steps]


def lacking(parent: str, mechanism: str) -> dict[str, Any]:
    """A recipe without the steps that name a mechanism."""
    steps = [step for step in steps_of(parent) if mechanism not in step.values()]
    return without(parent, mechanism, steps=steps)


def nearest(parent: str) -> dict[str, Any]:
    """A recipe whose codes are rounded to nearest."""
    steps = [step | {"solve": "nearest"} if step.get("solve") == "gptq" else step for step in steps_of(parent)]
    return without(parent, "gptq", steps=steps)


def rows_of(parent: str, rival: str, inputs: dict[str, Any], parts: list[str]) -> dict[str, tuple[Any, str]]:
    """The recipe beside its rival, and what its parts bring; ``inputs`` are the plainer numbers that its inputs are held against."""
    return {
        parent: (parent, rival),
        **{f"{parent}, no {part}": (lacking(parent, part), parent) for part in parts},
        f"{parent}, no gptq": (nearest(parent), parent),
        f"{parent}, plainer inputs": (without(parent, "its inputs", defaults={"input": inputs}), parent),
        f"{parent}, no exceptions": (without(parent, "exceptions", rules=[SKIP]), parent),
    }


ROWS: dict[str, tuple[Any, str]] = {  # label -> recipe, the row that it is held against
    "qvd-w6a6": ("qvd-w6a6", ""),
    **rows_of("reel-w6a6", "qvd-w6a6", {"granularity": "tensor"}, ["rotate"]),
    "qvd-w4a8": ("qvd-w4a8", ""),
    **rows_of("reel-w4a8", "qvd-w4a8", {"granularity": "tensor"}, ["rotate", "milp"]),
    "svdquant-w4a4": ("svdquant-w4a4", ""),
    **rows_of("reel-w4a4", "svdquant-w4a4", {"format": "int4"}, ["rotate", "lowrank"]),
}
MOST = 64
HEADINGS = ("recipe", "MB", "PSNR to float, dB (95 %)", "worst clip, dB", "held against", "clip by clip, dB (95 %)", "kernels")


def digest(clips: Clips, recipe: Recipe) -> str:
    """As benchmarks.peers and benchmarks.groups have it."""
    return f"{clips.digest}-{recipe.digest()}"


def measured(records: Records, clips: Clips, source: Any) -> dict[str, Any] | None:
    """The row of a recipe on these clips, whatever benchmark measured it."""
    wanted = digest(clips, load_recipe(source))
    return next((row for row in records.load() if row["digest"] == wanted and "psnr" in row), None)


def run(clips: Clips, records: Records, reference: Tensor, labels: list[str]) -> None:
    """Measure the rows that are missing."""
    missing = [label for label in labels if measured(records, clips, ROWS[label][0]) is None]
    if not missing:
        return
    comparison = Comparison(clips.open(), clips.prompts, SAMPLING_SEED, clips.call, batch=clips.batch)
    for label in missing:
        recipe = load_recipe(ROWS[label][0])
        report = comparison.quantize(recipe)
        facts = {"name": f"reel {recipe.name}", "digest": digest(clips, recipe), "pipeline": clips.name, "clips": clips.count}
        facts |= {"status": "measured", "bytes": report.bytes_quantized, "bytes_model": report.bytes_model, "kernel": report.kernel}
        facts |= {"seconds": {name: round(value) for name, value in report.seconds.items()}, "warnings": report.warnings}
        records.add(facts | measure(comparison.sample()[0], reference, clips.prompts))
        comparison.restore()
        print(f"{clips.name}: {label}", flush=True)


def first_of_more(records: Records, clips: Clips, source: Any) -> dict[str, Any] | None:
    """The first clips of a row of 64 clips: clip ``i`` has one caption and one noise, however many follow."""
    more = Clips(clips.pipeline, MOST, clips.call, clips.batch)
    if clips.count >= MOST or (row := measured(records, more, source)) is None:
        return None
    mean = bootstrap(values := row["psnr"][: clips.count])
    return row | {"psnr": values, "psnr_mean": mean.mean, "psnr_low": mean.low, "psnr_high": mean.high}


def table(records: Records, clips: Clips) -> str:
    """Rows of these clips, as far as they are measured; of rivals, if need be, the first clips of longer rows."""
    found = {label: row for label, (source, _) in ROWS.items() if (row := measured(records, clips, source))}
    rivals = {ROWS[label][1] for label in found} - {"", *found}
    found |= {label: row for label in rivals if (row := first_of_more(records, clips, ROWS[label][0]))}
    return markdown(HEADINGS, [_line(label, found[label], found) for label in ROWS if label in found]) if found else ""


def _line(label: str, row: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    mean = f"{row['psnr_mean']:.1f} ({row['psnr_low']:.1f} to {row['psnr_high']:.1f})"
    other, gain = ROWS[label][1], "-"
    if other in found:
        apart = bootstrap([a - b for a, b in zip(row["psnr"], found[other]["psnr"], strict=True)])
        gain = f"{apart.mean:+.1f} ({apart.low:+.1f} to {apart.high:+.1f})"
    kernels = row.get("kernel", "-")
    named = ", ".join(f"{name} {count}" for name, count in kernels.items()) if isinstance(kernels, Mapping) else str(kernels)
    return [label, f"{row['bytes'] / 1e6:.2f}", mean, f"{min(row['psnr']):.1f}", other or "-", gain, named]


def main() -> None:
    """Parse the command line, measure what is missing, write the table."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="*", default=["*"], help="labels of rows, or patterns")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    records, call = Records(args.output / "rows.jsonl"), dict(args.set)
    clips = Clips(args.pipeline, args.clips, call, args.batch)
    labels = [label for label in ROWS if any(fnmatch(label, pattern) for pattern in args.only)]
    if not args.table:
        run(clips, records, clips.float_frames(args.output), labels)
    counts = {count: Clips(args.pipeline, count, call, args.batch) for count in sorted({16, 32, MOST, args.clips})}
    parts = {count: text for count, one in counts.items() if (text := table(records, one))}
    text = "\n".join(f"{clips.name}, {count} clips\n\n{part}" for count, part in parts.items())
    (args.output / f"reel-{clips.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
