"""Rows of recipes, each beside a rival of the same bits: measured once, gains clip by clip. What ``benchmarks.reel`` and
``benchmarks.library`` share.

Rows of one process share a calibration where they calibrate alike. Rows that are already in the output, whoever measured them, are not
measured again. Rows are kept in ``rows.jsonl``; the table has a section for every number of clips.
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

Rows = Mapping[str, tuple[Any, str]]
"""Label -> recipe, label of the row that it is held against."""
MOST = 64
HEADINGS = ("recipe", "MB", "PSNR to float, dB (95 %)", "worst clip, dB", "held against", "clip by clip, dB (95 %)", "kernels")


def digest(clips: Clips, recipe: Recipe) -> str:
    """As benchmarks.peers and benchmarks.groups have it."""
    return f"{clips.digest}-{recipe.digest()}"


def measured(records: Records, clips: Clips, source: Any) -> dict[str, Any] | None:
    """The row of a recipe on these clips, whatever benchmark measured it; that of ``benchmarks.trust`` has no bytes."""
    recipe = load_recipe(source)
    wanted, usual = digest(clips, recipe), f"trust as usual: {recipe.name}"
    found = [row for row in records.load() if "psnr" in row and row["digest"].startswith(wanted)]
    whole = [row for row in found if row["digest"] == wanted]
    return next(iter([*whole, *(row for row in found if row["name"] == usual)]), None)


def run(rows: Rows, clips: Clips, records: Records, reference: Tensor, labels: list[str]) -> None:
    """Measure the rows that are missing."""
    missing = [label for label in labels if measured(records, clips, rows[label][0]) is None]
    if not missing:
        return
    comparison = Comparison(clips.open(), clips.prompts, SAMPLING_SEED, clips.call, batch=clips.batch)
    for label in missing:
        recipe = load_recipe(rows[label][0])
        report = comparison.quantize(recipe)
        facts = {"name": f"beside {recipe.name}", "digest": digest(clips, recipe), "pipeline": clips.name, "clips": clips.count}
        facts |= {"status": "measured", "bytes": report.bytes_quantized, "bytes_model": report.bytes_model, "kernel": report.kernel}
        facts |= {"seconds": {name: round(value) for name, value in report.seconds.items()}, "warnings": report.warnings}
        facts["tdscore"] = report.mean("tdscore", "temporal")
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


def table(rows: Rows, records: Records, clips: Clips) -> str:
    """Rows of these clips, as far as they are measured; of rivals, if need be, the first clips of longer rows."""
    found = {label: row for label, (source, _) in rows.items() if (row := measured(records, clips, source))}
    rivals = {rows[label][1] for label in found} - {"", *found}
    found |= {label: row for label in rivals if (row := first_of_more(records, clips, rows[label][0]))}
    return markdown(HEADINGS, [_line(label, rows[label][1], found) for label in rows if label in found]) if found else ""


def _line(label: str, other: str, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    row = found[label]
    mean = f"{row['psnr_mean']:.1f} ({row['psnr_low']:.1f} to {row['psnr_high']:.1f})"
    gain = "-"
    if other in found:
        apart = bootstrap([a - b for a, b in zip(row["psnr"], found[other]["psnr"], strict=True)])
        gain = f"{apart.mean:+.1f} ({apart.low:+.1f} to {apart.high:+.1f})"
    kernels = row.get("kernel", "-")
    named = ", ".join(f"{name} {count}" for name, count in kernels.items()) if isinstance(kernels, Mapping) else str(kernels)
    return [label, f"{row['bytes'] / 1e6:.2f}" if "bytes" in row else "-", mean, f"{min(row['psnr']):.1f}", other or "-", gain, named]


def main(rows: Rows, page: str, doc: str | None) -> None:
    """Parse the command line, measure what is missing, write the table ``PAGE-PIPELINE.md``."""
    options = parser(doc)
    options.add_argument("--only", nargs="*", default=["*"], help="labels of rows, or patterns")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    records, call = Records(args.output / "rows.jsonl"), dict(args.set)
    clips = Clips(args.pipeline, args.clips, call, args.batch)
    labels = [label for label in rows if any(fnmatch(label, pattern) for pattern in args.only)]
    if not args.table:
        run(rows, clips, records, clips.float_frames(args.output), labels)
    counts = {count: Clips(args.pipeline, count, call, args.batch) for count in sorted({16, 32, MOST, args.clips})}
    parts = {count: text for count, one in counts.items() if (text := table(rows, records, one))}
    text = "\n".join(f"{clips.name}, {count} clips\n\n{part}" for count, part in parts.items())
    (args.output / f"{page}-{clips.name}.md").write_text(text)
    print(text)
