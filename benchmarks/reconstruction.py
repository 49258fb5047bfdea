"""What solvers and reconstructions bring, each beside its start: codes and scales by second moments, learned rounding, scales and updates.

Run it from the repository root::

    python -m benchmarks.reconstruction --pipeline tiny-dit --clips 16 --output benchmarks/results
    python -m benchmarks.reconstruction --pipeline tiny-dit --clips 16 --output benchmarks/results --sets w4a8 w4a4

Rows are measured as ``benchmarks.rounding`` does it, which explains the columns: calibrated on the pipeline's own captions, judged on
evaluation captions with other noise. Rows that are already in the output are not measured again. Rows are kept in ``rows.jsonl``; the
table is ``reconstruction-PIPELINE.md``.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.beside import MOST
from benchmarks.common import Clips, Records, parser
from benchmarks.rounding import LAYERS, Rows, run, table

REWRITES = [
    {"transform": "rotate", "least": 3.0, "on": "role:main"},
    {"transform": "shift", "center": "mid", "least": 0.05, "on": "role:main"},
    {"transform": "range_integrate", "power": 0.5, "on": "role:main"},
]
MSE = {"name": "mse", "p": 2.0, "candidates": 16, "smallest": 0.7}
GROUPS = {"format": "int4", "granularity": "group-16", "scale": "e4m3"}


def solve(name: str, **options: Any) -> dict[str, Any]:
    """A line of a recipe."""
    return {"solve": name, "correct_bias": True, "on": LAYERS} | options


def learn(name: str, **options: Any) -> dict[str, Any]:
    """A line of a recipe."""
    return {"reconstruct": name, "on": LAYERS} | options


ADAROUND = learn("adaround")
BOTH = {"drop": 0.5, "inputs": "mixed"}
LONGER = {"iterations": 1200, "calls": 64}
SOLVED: dict[str, list[Any]] = {
    "nearest": [solve("nearest")],
    "adaround from nearest": [solve("adaround")],
    "gptq": [solve("gptq")],
    "comq from nearest": [solve("comq", start="nearest")],
    "comq from gptq": [solve("comq")],
    "als from gptq": [solve("als")],
    "gptq + adaround of blocks": [solve("gptq"), ADAROUND],
    "gptq + adaround of blocks, 600 steps": [solve("gptq"), learn("adaround", iterations=600, calls=96)],
    "gptq + adaround of the last block, 1,200 steps": [solve("gptq"), learn("adaround", on="block:end & role:main", **LONGER)],
}
LEARNED: dict[str, list[Any]] = {
    "als + adaround": [solve("als"), ADAROUND],
    "als + adaround, drop 0.5": [solve("als"), learn("adaround", **BOTH)],
    "als + straight_through": [solve("als"), learn("straight_through")],
    "als + straight_through, model": [solve("als"), learn("straight_through", scope="model")],
    "als + straight_through, model, 96 calls": [solve("als"), learn("straight_through", scope="model", calls=96)],
    "als + adaround + straight_through, model": [solve("als"), ADAROUND, learn("straight_through", scope="model")],
}


def solvers(bits: int) -> dict[str, Any]:
    """Plain static recipes with these bits of weights."""
    weight = {"format": f"int{bits}"}
    return {name: {"extends": "minmax-w4a8", "defaults": {"weight": weight}, "steps": steps} for name, steps in SOLVED.items()}


def qvd() -> dict[str, Any]:
    """``qvd-w4a8`` without a search, and more of it."""
    rows = {name: SOLVED[name] for name in ("gptq", "comq from gptq", "als from gptq")} | LEARNED
    return {name: {"extends": "qvd-w4a8", "steps": [*REWRITES, *steps]} for name, steps in rows.items()}


def dynamic() -> dict[str, Any]:
    """Weights and inputs in four bits, inputs in groups whose scales are found at run time."""
    base = {
        "extends": "mxfp4-w4a4",
        "name": "int4 groups of 16",
        "defaults": {"weight": GROUPS | {"range": MSE}, "input": GROUPS | {"dynamic": True}},
        "calibrate": {"prompts": 16, "seed": 1000},
    }
    rows = {name: SOLVED[name] for name in ("nearest", "gptq", "als from gptq")} | LEARNED
    return {name: base | {"steps": steps} for name, steps in rows.items()}


def static() -> dict[str, Any]:
    """Weights and inputs in four bits, a static scale of each input for each step."""
    base: dict[str, Any] = {"extends": "qvd-w4a8", "defaults": {"input": {"format": "int4", "slots": "per_step"}}}
    base["rules"] = {4: {"input": {"format": "int4"}}}  # what cross-attention hands over, a scale for each token
    rates = {"input_rate": 0.01}
    rows = {
        "gptq": SOLVED["gptq"],
        "gptq + lsq": [*SOLVED["gptq"], learn("lsq")],
        "gptq + lsq, fitted": [*SOLVED["gptq"], learn("lsq", follow="fitted")],
        "gptq + adaround": [*SOLVED["gptq"], ADAROUND],
        "gptq + adaround, drop 0.5": [*SOLVED["gptq"], learn("adaround", **BOTH)],
        "gptq + adaround with scales": [*SOLVED["gptq"], learn("adaround", **rates)],
        "gptq + straight_through with scales": [*SOLVED["gptq"], learn("straight_through", **rates)],
        "gptq + straight_through with scales, model": [*SOLVED["gptq"], learn("straight_through", scope="model", **rates)],
    }
    return {name: base | {"steps": [*REWRITES, *steps]} for name, steps in rows.items()}


def rounds() -> dict[str, Any]:
    """``tcaq-w4a4`` with float attention, piece by piece: scales of channels, and rounds of learning on one trajectory or the other."""
    scales = {f"scale, {peak}": [{"transform": "scale", "peak": peak, "on": "role:main"}] for peak in ("all", "mean", "weighted")}
    start, learned = [*scales["scale, weighted"], solve("nearest")], learn("adaround", input_rate=0.003)
    rows = {name: [*steps, solve("nearest")] for name, steps in ({"no scale": []} | scales).items()} | {
        "one round": [*start, learned],
        "two rounds, float trajectory": [*start, learned, learned],
        "two rounds, the second on the quantized trajectory": [*start, learned, learned | {"trajectory": "quantized"}],
    }
    return {name: {"extends": "tcaq-w4a4", "steps": steps, "attention": None} for name, steps in rows.items()}


SETS: dict[str, tuple[str, Rows]] = {
    "solvers-w4a8": ("4-bit weights in groups of 64, static 8-bit inputs", solvers(4)),
    "solvers-w3a8": ("3-bit weights in groups of 64, static 8-bit inputs", solvers(3)),
    "w4a8": ("qvd-w4a8 with power 0.5: 4-bit weights in groups of 64, static 8-bit inputs", qvd()),
    "w4a4": ("4-bit integers in groups of 16 with e4m3 scales, those of inputs found at run time", dynamic()),
    "w4a4-rounds": ("tcaq-w4a4 with float attention: 4-bit weights in groups of 64, static 4-bit inputs for each step", rounds()),
    "w4a4-static": ("QVD's rewrites, 4-bit weights in groups of 64, static 4-bit inputs for each step", static()),
}


def named(key: str) -> Rows:
    """The rows of a set, with names that tell them from those of other sets."""
    return {label: {**recipe, "name": f"reconstruction {key} {label}"} for label, recipe in SETS[key][1].items()}


def main() -> None:
    """Parse the command line, measure what is missing, write the table."""
    options = parser(__doc__)
    options.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    options.add_argument("--rows", nargs="*", help="labels of the rows to measure; all by default")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    clips, records = Clips(args.pipeline, args.clips, dict(args.set), args.batch), Records(args.output / "rows.jsonl")
    for key in [] if args.table else args.sets:
        wanted = {label: recipe for label, recipe in named(key).items() if args.rows is None or label in args.rows}
        run(clips, records, clips.float_frames(args.output), wanted)
    counts = [Clips(args.pipeline, count, dict(args.set), args.batch) for count in sorted({16, MOST, args.clips})]
    texts = [table(one, records, named(key), about) for one in counts for key, (about, _) in SETS.items()]
    measured = [text for text in texts if text.count("\n|") > 2]
    (args.output / f"reconstruction-{clips.name}.md").write_text(text := "\n".join(measured))
    print(text)


if __name__ == "__main__":
    main()
