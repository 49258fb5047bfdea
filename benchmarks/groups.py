"""Small floats in groups beside integers of the same bytes: NVFP4, MXFP4 and MXFP8 on weights and inputs.

Run it from the repository root::

    python -m benchmarks.groups --pipeline tiny-dit --clips 16 --output benchmarks/results

Every row rounds weights and inputs alike, input scales are found at run time, and first, last, temporal and prompt layers are those of
``mxfp4-w4a4``. Float clips are sampled once and kept; rows that are already in the output are not measured again. Rows are kept in
``rows.jsonl``; the table is ``groups-PIPELINE.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

import reelquant
from benchmarks.common import Clips, Records, markdown, measure, parser
from reelquant.evidence import bootstrap
from reelquant.recipes.recipe import Recipe, load_recipe

MSE = {"name": "mse", "p": 2.0, "candidates": 16, "smallest": 0.7}


def integers(fmt: str, granularity: str, scale: str = "float", rule: Any = MSE) -> dict[str, Any]:
    """``mxfp4-w4a4``, which needs no data, with these numbers in the place of its own."""
    numbers = {"format": fmt, "granularity": granularity, "scale": scale}
    defaults = {"weight": numbers | {"range": rule}, "input": numbers | {"dynamic": True}}
    return {"extends": "mxfp4-w4a4", "name": f"{fmt} {granularity} {scale}", "defaults": defaults}


Rows = Mapping[str, tuple[Any, float, str]]  # label -> recipe, bits per weight with scales, the row it is compared with
ROWS: Rows = {
    "int4, groups of 32": (integers("int4", "group-32"), 4.5, ""),
    "e2m1, groups of 16, e4m3 scales (NVFP4)": (integers("e2m1", "group-16", "e4m3"), 4.5, "int4, groups of 32"),
    "int4, groups of 16, e4m3 scales": (integers("int4", "group-16", "e4m3"), 4.5, "int4, groups of 32"),
    "int4, groups of 64": (integers("int4", "group-64"), 4.25, ""),
    "mxfp4-w4a4": ("mxfp4-w4a4", 4.25, "int4, groups of 64"),
    "int8, groups of 64": (integers("int8", "group-64"), 8.25, ""),
    "mxfp8-w8a8": ("mxfp8-w8a8", 8.25, "int8, groups of 64"),
}
HEADINGS = ("weights and inputs", "bits per weight", "MB", "PSNR to float, dB (95 %)", "worst clip, dB", "clip by clip, dB (95 %)")


def key(clips: Clips, recipe: Recipe) -> tuple[str, str]:
    """Name and digest of a row: other weights, captions or numbers are another row."""
    return f"groups {recipe.name}", f"{clips.digest}-{recipe.digest()}"


def run(rows: Rows, clips: Clips, records: Records, reference: Tensor) -> None:
    """Measure the rows that are missing."""
    for label, (source, _, _) in rows.items():
        recipe = load_recipe(source)
        name, digest = key(clips, recipe)
        if records.done(name, digest):
            continue
        pipe = clips.open()
        report = reelquant.quantize(pipe, recipe)
        facts = {"name": name, "digest": digest, "pipeline": clips.name, "clips": clips.count, "status": "measured"}
        facts |= {"bytes": report.bytes_quantized, "kernel": report.kernel}
        records.add(facts | measure(clips.frames(pipe), reference, clips.prompts))
        print(f"{clips.name}: {label}", flush=True)


def table(rows: Rows, clips: Clips, records: Records, against: str) -> str:
    """The rows of these clips and of today's recipes, as far as they are measured."""
    known = {(row["name"], row["digest"]): row for row in records.load()}
    found = {label: known[at] for label, (source, _, _) in rows.items() if (at := key(clips, load_recipe(source))) in known}
    title = f"{clips.name}, {clips.count} clips; differences are {against}\n\n"
    return title + markdown(HEADINGS, [_line(rows, label, row, found) for label, row in found.items()])


def _line(rows: Rows, label: str, row: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    _, bits, other = rows[label]
    mean = f"{row['psnr_mean']:.1f} ({row['psnr_low']:.1f} to {row['psnr_high']:.1f})"
    gain = "-"
    if other in found:
        apart = bootstrap([a - b for a, b in zip(row["psnr"], found[other]["psnr"], strict=True)])
        gain = f"{apart.mean:+.1f} ({apart.low:+.1f} to {apart.high:+.1f})"
    return [label, f"{bits:.4g}", f"{row['bytes'] / 1e6:.2f}", mean, f"{min(row['psnr']):.1f}", gain]


def main() -> None:
    """Parse the command line, measure what is missing, write the table."""
    compare("groups", ROWS, __doc__, "to the row of the same bytes above")


def compare(name: str, rows: Rows, purpose: str, against: str) -> None:
    """The command line of a benchmark that measures rows and writes ``NAME-PIPELINE.md``; ``against`` says what differences are to."""
    options = parser(purpose or "")
    options.add_argument("--only", nargs="*", default=["*"], help="labels of rows to measure, or patterns")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    clips, records = Clips(args.pipeline, args.clips, dict(args.set), args.batch), Records(args.output / "rows.jsonl")
    if not args.table:
        some = {label: row for label, row in rows.items() if any(fnmatch(label, pattern) for pattern in args.only)}
        run(some, clips, records, clips.float_frames(args.output))
    (args.output / f"{name}-{clips.name}.md").write_text(text := table(rows, clips, records, against))
    print(text)


if __name__ == "__main__":
    main()
