"""Blocks dropped of a float pipeline: which, how long the others were trained, and what clips and the judge say.

Run it from the repository root::

    python -m benchmarks.dropped --pipeline tiny-dit --clips 64 --output benchmarks/results
    python -m benchmarks.dropped --pipeline tiny-dit --clips 16 --output benchmarks/results --only "measured, not trained"

Clips of evaluation captions, held against the float pipeline with all blocks; gains are clip by clip over the same block not trained. Rows
that are there are not made again. Rows are kept in ``rows.jsonl``, the table is ``dropped-PIPELINE.md``, and pipelines are kept in
``runs/dropped``; a training that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reelquant
from benchmarks.common import Clips, Records, markdown, measure, parser
from benchmarks.resolution import judge_words
from reelquant.evidence import bootstrap
from reelquant.models.pipelines import calibration_prompts

KEPT = Path("runs/dropped")
HEADINGS = (
    "dropped",
    "parameters",
    "error of held-out calls",
    "PSNR to float, dB (95 %)",
    "worst clip, dB",
    "gain of training, dB (95 %)",
    "judge",
)


class Way(NamedTuple):
    """How one block is dropped.

    Attributes:
        choose, iterations, calls, rate: of :func:`reelquant.drop_blocks`.
        clips: that calls are recorded of.
        beside: the row that it is held against.
    """

    choose: str
    iterations: int = 0
    calls: int = 64
    clips: int = 8
    rate: float = 3e-4
    beside: str = ""


ROWS: Mapping[str, Way] = {
    "measured, not trained": Way("measured"),
    "measured, 300 iterations": Way("measured", 300, beside="measured, not trained"),
    "measured, 500 iterations on 400 calls": Way("measured", 500, 400, 12, 1e-3, "measured, not trained"),
    "shallow, not trained": Way("shallow"),
    "shallow, 300 iterations": Way("shallow", 300, beside="shallow, not trained"),
    "deep, not trained": Way("deep"),
    "deep, 300 iterations": Way("deep", 300, beside="deep, not trained"),
}


def key(clips: Clips, label: str) -> tuple[str, str]:
    """Name and digest of a row."""
    return f"dropped: {label}", f"{clips.digest}-{hashlib.sha256(json.dumps(ROWS[label]).encode()).hexdigest()[:12]}"


def made(clips: Clips, label: str) -> Path:
    """The pipeline of a row, made once."""
    folder, way = KEPT / f"{clips.name}-{label.replace(', ', '-').replace(' ', '-')}", ROWS[label]
    if not folder.is_dir():
        pipe = clips.open()
        options = {"choose": way.choose, "iterations": way.iterations, "calls": way.calls, "rate": way.rate}
        work = folder.with_name(f"{folder.name}.removal")
        found = reelquant.drop_blocks(pipe, 1, prompts=calibration_prompts(pipe, way.clips), work=work, **options)
        reelquant.save(pipe, folder)
        facts = {"blocks": found.blocks, "error": found.error, "parameters": found.parameters}
        folder.with_suffix(".json").write_text(json.dumps(facts) + "\n")
    return folder


def row(clips: Clips, label: str, reference: Tensor) -> dict[str, Any]:
    """A measured row."""
    folder = made(clips, label)
    name, digest = key(clips, label)
    facts = {"name": name, "digest": digest, "pipeline": clips.name, "clips": clips.count, "status": "measured"}
    facts |= json.loads(folder.with_suffix(".json").read_text())
    return facts | measure(clips.frames(reelquant.open_pipeline(folder)), reference, clips.prompts)


def table(clips: Clips, records: Records) -> str:
    """The rows of these clips, as far as they are measured."""
    known = {(one["name"], one["digest"]): one for one in records.load()}
    found = {label: one for label in ROWS if (one := known.get(key(clips, label)))}
    return markdown(HEADINGS, [_line(label, found) for label in found])


def _line(label: str, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    one, beside = found[label], found.get(ROWS[label].beside)
    before, after = one["parameters"]
    gain = "-"
    if beside:
        mean = bootstrap([a - b for a, b in zip(one["psnr"], beside["psnr"], strict=True)])
        gain = f"{mean.mean:+.1f} ({mean.low:+.1f} to {mean.high:+.1f})"
    return [
        f"block {', '.join(map(str, one['blocks']))}: {label}",
        f"{after / before:.0%}",
        f"{one['error'][0]:.3f}" + (f", trained {one['error'][1]:.3f}" if one["error"][1] < one["error"][0] else ""),
        f"{one['psnr_mean']:.1f} ({one['psnr_low']:.1f} to {one['psnr_high']:.1f})",
        f"{min(one['psnr']):.1f}",
        gain,
        judge_words(one["judge"]),
    ]


def main() -> None:
    """Parse the command line, measure what is missing, write the table."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="*", help="labels of rows")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    clips, records = Clips(args.pipeline, args.clips, dict(args.set), args.batch), Records(args.output / "rows.jsonl")
    missing = [label for label in args.only or ROWS if not args.table and not records.done(*key(clips, label))]
    if missing:
        KEPT.mkdir(parents=True, exist_ok=True)
        reference = clips.float_frames(KEPT)
        for label in missing:
            records.add(row(clips, label, reference))
            print(f"{clips.name}: {label}", flush=True)
    text = f"{clips.name}, {clips.count} clips, judge: motion, shape, digit, colour\n\n{table(clips, records)}"
    (args.output / f"dropped-{clips.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
