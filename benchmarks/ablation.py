"""What every part of QVD brings: float, minmax, and the parts added one by one, at W8A8, W6A6 and W4A8.

Run it from the repository root::

    python -m benchmarks.ablation --pipeline tiny-dit --clips 64 --output runs/peers
    python -m benchmarks.ablation --pipeline tiny-unet --clips 64 --output runs/peers

Float clips are sampled once and kept; rows that are already in the output are not measured again, so the command can be stopped and
started. Rows are kept in ``rows.jsonl`` together with those of ``benchmarks.peers`` (PSNR of every clip included); the table is
``ablation-PIPELINE.csv`` and ``.md``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.common import SAMPLING_SEED, Clips, Records, judged, markdown, measure, parser, report_facts, write_csv
from reelquant.evidence import bootstrap
from reelquant.evidence.variants import Comparison
from reelquant.recipes.recipe import load_recipe

BASE, METHOD = "minmax", "qvd"
Mapping = dict[str, Any]


# --- stages ---------------------------------------------------------------------------------------------------------------------------


def recipe(name: str) -> Mapping:
    """A recipe of the library as a mapping that may be changed."""
    return load_recipe(name).model_dump(mode="json", exclude_unset=True)


def _rule(full: Mapping, role: str) -> Mapping:
    return next(rule for rule in full["rules"] if rule["on"] == f"role:{role}")


def _step(full: Mapping, name: str) -> Mapping:
    return next(step for step in full["steps"] if name in step.values())


def prompt_inputs(stage: Mapping, full: Mapping) -> Mapping:
    """Inputs of prompt layers stay float: first, because a static range that words leave would hide everything else."""
    return stage | {"rules": [*stage["rules"], _rule(full, "prompt")]}


def temporal_formats(stage: Mapping, full: Mapping) -> Mapping:
    """Temporal layers get the format that keeps timesteps apart."""
    return stage | {"rules": [*stage["rules"], _rule(full, "temporal")]}


def shift(stage: Mapping, full: Mapping) -> Mapping:
    """Channels are centred, so the grid of main layers becomes symmetric."""
    symmetric = {"on": "role:main", "input": {key: full["defaults"]["input"][key] for key in ("format", "granularity")}}
    return stage | {"rules": [*stage["rules"], symmetric], "steps": [_step(full, "shift"), *stage["steps"]]}


def range_integrate(stage: Mapping, full: Mapping) -> Mapping:
    """Channel ranges are made alike, by how much a search decides."""
    return stage | {"steps": [*stage["steps"][:-1], _step(full, "range_integrate"), stage["steps"][-1]], "search": full.get("search", {})}


def solver(stage: Mapping, full: Mapping) -> Mapping:
    """Weight codes are chosen against the statistics, biases corrected for them."""
    return stage | {
        "steps": [*stage["steps"][:-1], _step(full, "gptq")],
        "defaults": {**stage["defaults"], "weight": full["defaults"]["weight"]},
    }


def rotate(stage: Mapping, full: Mapping) -> Mapping:
    """Inputs whose outliers sit in tokens are rotated."""
    return stage | {"steps": [_step(full, "rotate"), *stage["steps"]]}


def headroom(stage: Mapping, full: Mapping) -> Mapping:
    """Channels whose range varies between calibration runs get room for later clips."""
    return stage | {"calibrate": full["calibrate"]}


def whole(stage: Mapping, full: Mapping) -> Mapping:
    """The recipe as it ships: float inputs of a UNet's narrow layers, and for some bits a scale per step."""
    return full


def table(stage: Mapping, full: Mapping) -> Mapping:
    """Temporal layers are dropped for a table of their exact outputs."""
    return full | {"temporal": "table"}


STAGES: dict[str, Callable[[Mapping, Mapping], Mapping]] = {
    "+ float prompt inputs": prompt_inputs,
    "+ temporal formats": temporal_formats,
    "+ shift": shift,
    "+ range_integrate": range_integrate,
    "+ gptq, bias correction": solver,
    "+ headroom": headroom,
    "+ rotate": rotate,
    "+ the rest = qvd": whole,
    "+ temporal table": table,
}
PAPER = ("+ float prompt inputs", "+ temporal formats", "+ shift", "+ range_integrate", "+ the rest = qvd")
BITS = {"w8a8": tuple(STAGES), "w6a6": PAPER, "w4a8": PAPER}
"""Stages measured for each pair of widths: all where they are told apart best, the paper's own for the others."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a stage at a bit width. ``library`` names the configuration of ``benchmarks.peers`` that it is, if any."""

    bits: str
    stage: str
    recipe: Mapping
    library: str | None = None

    @property
    def name(self) -> str:
        return self.library or f"{self.bits} {self.stage}"

    def digest(self, clips: Clips) -> str:
        """As in ``benchmarks.peers``: of the clips and the recipe."""
        return f"{clips.digest}-{load_recipe(self.recipe).digest()}"


def rows(bits: str) -> Iterator[Row]:
    """The plain baseline, then every part on top of the ones before."""
    stage, full = recipe(f"{BASE}-{bits}"), recipe(f"{METHOD}-{bits}")
    yield Row(bits, BASE, stage, f"{BASE}-{bits}")
    for name in BITS[bits]:
        library = f"{METHOD}-{bits}" if STAGES[name] is whole else None
        stage = STAGES[name](stage, full) | ({} if library else {"name": f"{bits} {name}"})
        yield Row(bits, name, stage, library)


# --- measuring ------------------------------------------------------------------------------------------------------------------------


def figures(comparison: Comparison, row: Row) -> Mapping:
    """Quantize, sample and judge."""
    assert comparison.reference is not None
    outcome = comparison.measure(row.recipe)
    assert outcome.report is not None
    return {
        **measure(outcome.frames, comparison.reference, comparison.captions),
        **report_facts(outcome.report),
        "seconds_quantize": round(outcome.seconds_quantize, 2),
        "seconds_sample": round(outcome.seconds_sample, 2),
    }


def run(clips: Clips, bits: list[str], records: Records, reference: Tensor) -> None:
    """Measure what is missing; rows that are recipes of the library are left to ``benchmarks.peers``."""
    comparison: Comparison | None = None
    for row in [row for one in bits for row in rows(one)]:
        if records.done(row.name, row.digest(clips)):
            continue
        start = time.perf_counter()
        if row.library:
            records.add(peers.row(next(c for c in peers.CONFIGURATIONS if c.name == row.library), clips, reference))
        else:
            comparison = comparison or Comparison(
                clips.open(), clips.prompts, SAMPLING_SEED, clips.call, reference=reference, batch=clips.batch
            )
            key = {"name": row.name, "digest": row.digest(clips), "pipeline": clips.name, "clips": clips.count, "status": "measured"}
            records.add(key | figures(comparison, row))
        print(f"{clips.name}: {row.name}, {time.perf_counter() - start:.0f} s", flush=True)


# --- tables ---------------------------------------------------------------------------------------------------------------------------


def current(clips: Clips, bits: list[str], records: Records, reference: Tensor) -> list[Mapping]:
    """The measured rows of these clips and of today's recipes, in the order of the table, the float clips first."""
    known = {(row["name"], row["digest"]): row for row in records.load()}
    wanted = [(row, (row.name, row.digest(clips))) for one in bits for row in rows(one)]
    found = [known[key] | {"bits": row.bits, "stage": row.stage} for row, key in wanted if key in known]
    return [{"bits": "", "stage": "float", "judge": judged(reference, clips.prompts)}, *found]


def gain(row: Mapping, base: Mapping) -> str:
    """Mean and interval of the difference to the baseline on the same clips, dB."""
    found = bootstrap(torch.tensor(row["psnr"]) - torch.tensor(base["psnr"]))
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def write_tables(clips: Clips, found: list[Mapping], output: Path) -> None:
    """CSV and Markdown from what is there."""
    bases = {row["bits"]: row for row in found if row["stage"] == BASE}
    kinds = list(dict.fromkeys(kind for row in found for kind in row["judge"]))
    headings = ["bits", "stage", "PSNR to float, dB (95 %)", f"over {BASE}, dB", *kinds, "TDScore", "coverage", "smaller"]
    lines = [_line(row, bases.get(row["bits"]), kinds) for row in found]
    title = f"{clips.name}, {clips.count} clips; judge: share of clips that show what their caption says; TDScore: 1 is lossless\n\n"
    (output / f"ablation-{clips.name}.md").write_text(title + markdown(headings, lines))
    skip = (*peers.NESTED, "status", "note", "rival", "skips", "package", "version", "torch")
    flat = [{k: v for k, v in row.items() if k not in skip} | {f"judge_{k}": v for k, v in row["judge"].items()} for row in found]
    write_csv(output / f"ablation-{clips.name}.csv", flat)


def _line(row: Mapping, base: Mapping | None, kinds: list[str]) -> list[str]:
    judge = [f"{100 * row['judge'][kind]:.1f} %" for kind in kinds]
    if row["stage"] == "float":
        return ["", "float", "", "", *judge, "", "", "1.00x"]
    psnr = f"{row['psnr_mean']:.1f} ({row['psnr_low']:.1f} to {row['psnr_high']:.1f})"
    score = "-" if row["tdscore"] is None else f"{row['tdscore']:.4f}"
    over = "" if base is None or row is base else gain(row, base)
    return [row["bits"], row["stage"], psnr, over, *judge, score, f"{100 * row['coverage']:.1f} %", f"{row['ratio']:.2f}x"]


def main() -> None:
    """Parse the command line, measure what is missing, write the tables."""
    options = parser(__doc__)
    options.add_argument("--bits", nargs="*", choices=BITS, default=list(BITS))
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    clips = Clips(args.pipeline, args.clips, dict(args.set), args.batch)
    records, reference = Records(args.output / "rows.jsonl"), clips.float_frames(args.output)
    if not args.table:
        run(clips, args.bits, records, reference)
    write_tables(clips, current(clips, args.bits, records, reference), args.output)
    print((args.output / f"ablation-{clips.name}.md").read_text())


if __name__ == "__main__":
    main()
