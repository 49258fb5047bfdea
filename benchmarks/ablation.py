"""What every part of QVD brings: float, minmax, and the parts added one by one, at W8A8, W6A6 and W4A8.

Run it from the repository root::

    python -m benchmarks.ablation --pipeline tiny-dit --clips 64 --output runs/ablation
    python -m benchmarks.ablation --pipeline tiny-unet --clips 64 --output runs/ablation

Float clips are sampled once and kept; rows that are already in the output are not measured again, so the command can be stopped and
started. Writes ``ablation-PIPELINE.jsonl`` (a line per row, PSNR of every clip included), ``.csv`` and ``.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import SAMPLING_SEED, Clips, Records, judged, markdown, measure, write_csv
from reelquant.cli.compare import Comparison
from reelquant.evaluate import bootstrap
from reelquant.models.pipelines import BUNDLED
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
    """The recipe as it ships: float inputs of prompt layers and of a UNet's narrow layers, and for some bits a scale per step."""
    return full


def table(stage: Mapping, full: Mapping) -> Mapping:
    """Temporal layers are dropped for a table of their exact outputs."""
    return full | {"temporal": "table"}


STAGES: dict[str, Callable[[Mapping, Mapping], Mapping]] = {
    "+ temporal formats": temporal_formats,
    "+ shift": shift,
    "+ range_integrate": range_integrate,
    "+ gptq, bias correction": solver,
    "+ headroom": headroom,
    "+ rotate": rotate,
    "+ the rest = qvd": whole,
    "+ temporal table": table,
}
PAPER = ("+ temporal formats", "+ shift", "+ range_integrate", "+ the rest = qvd")
BITS = {"w8a8": tuple(STAGES), "w6a6": PAPER, "w4a8": PAPER}
"""Stages measured for each pair of widths: all where they are told apart best, the paper's own for the others."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a stage at a bit width."""

    bits: str
    stage: str
    recipe: Mapping

    @property
    def name(self) -> str:
        return f"{self.bits} {self.stage}"


def rows(bits: str) -> Iterator[Row]:
    """The plain baseline, then every part on top of the ones before."""
    stage, full = recipe(f"{BASE}-{bits}"), recipe(f"{METHOD}-{bits}")
    yield Row(bits, BASE, stage)
    for name in BITS[bits]:
        stage = STAGES[name](stage, full) | {"name": f"{bits} {name}"}
        yield Row(bits, name, stage)


# --- measuring ------------------------------------------------------------------------------------------------------------------------


def figures(comparison: Comparison, row: Row) -> Mapping:
    """Quantize, sample and judge."""
    assert comparison.reference is not None
    outcome = comparison.measure(row.recipe)
    report = outcome.report
    assert report is not None
    return {
        "bits": row.bits,
        "stage": row.stage,
        **measure(outcome.frames, comparison.reference, comparison.captions),
        "tdscore": report.mean("tdscore", "temporal"),
        "coverage": report.mean("coverage", "main"),
        "error": report.mean("error"),
        "ratio": report.ratio,
        "bytes": report.bytes_quantized,
        "bytes_tables": report.bytes_tables,
        "search": [[trial.family, trial.options, trial.psnr] for trial in report.trials],
        "warnings": report.warnings,
        "seconds_quantize": round(outcome.seconds_quantize, 2),
        "seconds_sample": round(outcome.seconds_sample, 2),
    }


def run(clips: Clips, bits: list[str], output: Path) -> None:
    """Measure what is missing."""
    records = Records(output / f"ablation-{clips.name}.jsonl")
    reference = clips.float_frames(output)
    if not records.done("float", clips.digest):
        records.add(
            {
                "name": "float",
                "digest": clips.digest,
                "status": "measured",
                "bits": "",
                "stage": "float",
                "judge": judged(reference, clips.prompts),
            }
        )
    comparison: Comparison | None = None
    for row in [row for one in bits for row in rows(one)]:
        digest = f"{clips.digest}-{load_recipe(row.recipe).digest()}"
        if records.done(row.name, digest):
            continue
        if comparison is None:
            comparison = Comparison(clips.open(), clips.prompts, SAMPLING_SEED, clips.call, reference=reference, batch=clips.batch)
        start = time.perf_counter()
        records.add({"name": row.name, "digest": digest, "status": "measured", **figures(comparison, row)})
        print(f"{clips.name}: {row.name}, {time.perf_counter() - start:.0f} s", flush=True)


# --- tables ---------------------------------------------------------------------------------------------------------------------------


def current(clips: Clips, bits: list[str], records: Records) -> list[Mapping]:
    """The measured rows of these clips and of today's recipes, in the order of the table."""
    known = {(row["name"], row["digest"]): row for row in records.load()}
    wanted = [("float", clips.digest)]
    wanted += [(row.name, f"{clips.digest}-{load_recipe(row.recipe).digest()}") for one in bits for row in rows(one)]
    return [known[key] for key in wanted if key in known]


def gain(row: Mapping, base: Mapping) -> str:
    """Mean and interval of the difference to the baseline on the same clips, dB."""
    found = bootstrap(torch.tensor(row["psnr"]) - torch.tensor(base["psnr"]))
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def write_tables(clips: Clips, bits: list[str], output: Path) -> None:
    """CSV and Markdown from what is there."""
    found = current(clips, bits, Records(output / f"ablation-{clips.name}.jsonl"))
    bases = {row["bits"]: row for row in found if row["stage"] == BASE}
    kinds = list(dict.fromkeys(kind for row in found for kind in row["judge"]))
    headings = ["bits", "stage", "PSNR to float, dB (95 %)", f"over {BASE}, dB", *kinds, "TDScore", "coverage", "smaller"]
    lines = [_line(row, bases.get(row["bits"]), kinds) for row in found]
    title = f"{clips.name}, {clips.count} clips; judge: share of clips that show what their caption says; TDScore: 1 is lossless\n\n"
    (output / f"ablation-{clips.name}.md").write_text(title + markdown(headings, lines))
    skip = ("psnr", "judge", "search", "warnings", "status")
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


def number(text: str) -> tuple[str, float]:
    """``num_inference_steps=20``."""
    key, _, value = text.partition("=")
    return key, float(value) if "." in value else int(value)


def main() -> None:
    """Parse the command line, measure what is missing, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", required=True, help=f"{' or '.join(BUNDLED)}, or a folder")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--bits", nargs="*", choices=BITS, default=list(BITS))
    parser.add_argument("--batch", type=int, default=4, help="clips per pipeline call")
    parser.add_argument("--set", type=number, nargs="*", default=[], metavar="KEY=NUMBER", help="arguments of the pipeline call")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only write the tables from what is there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clips = Clips(args.pipeline, args.clips, dict(args.set), args.batch)
    if not args.table:
        run(clips, args.bits, args.output)
    write_tables(clips, args.bits, args.output)
    print((args.output / f"ablation-{clips.name}.md").read_text())


if __name__ == "__main__":
    main()
