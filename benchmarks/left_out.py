"""Published ways to leave out work: what we expect of each of them, and what was found here.

Run it from the repository root::

    python -m benchmarks.left_out --output benchmarks/results            # the table, from the rows that are there
    python -m benchmarks.left_out --output benchmarks/results --pipeline tiny-unet                  # what no other benchmark measures
    python -m benchmarks.left_out --output benchmarks/results --pipeline tiny-unet --only speeds    # on free cores, if they are to be had
    python -m benchmarks.methods                                         # puts the table into docs/methods.md

Most figures are rows of other benchmarks in ``rows.jsonl``: with as many clips as both rows of a gain have. A gain is *passed* if its
mean is at least what was asked and the lower end of its 95 % interval is above zero, *not told* if the mean is enough and the interval
reaches zero. Figures that no row holds stand here with the command that gives them. Tests that show what no clip shows are named, and
the table is not written if one of them does not exist.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

import reelquant
from benchmarks.checks import verdict
from benchmarks.common import Clips, Records, markdown, measure
from benchmarks.tuned import ALIKE, EVEN_ALIKE, FLOAT_ALIKE, KEPT, LAST_ALIKE, quantized, times_in_turns
from reelquant.evidence import bootstrap
from reelquant.recipes.recipe import load_recipe
from reelquant.reuse import installed_reuse
from reelquant.reuse.reuse import put
from reelquant.tuning.recording import site_of

PAGE, ROWS = Path("benchmarks/results/left-out.md"), Path("benchmarks/results/rows.jsonl")
HEADINGS = ("method", "ours", "asked", "on", "found", "clips", "verdict", "why not", "measured by")
SEPARATE, SPEED = "left out: cachequant-w8a8, planned after calibration", "left out: speed of {}"
FAST = ("deepcache", "faster-diffusion")
PARTS = SPEEDS, CALIBRATION = "speeds", "calibration"
"""What is measured here: clips of recipes in turns, and the plan of ``cachequant-w8a8`` put on after calibration."""
Rows = Sequence[Mapping[str, Any]]
Told = tuple[str, str, str, str]
"""What was found, on how many clips, the verdict, by what it was measured."""


class Found(Protocol):
    """A figure, or what shows that something holds."""

    def told(self, rows: Rows, pipeline: str) -> Told:
        """In words."""
        ...


MISSING = "-", "-", "not measured"


def _named(rows: Rows, name: str, pipeline: str) -> Iterator[Mapping[str, Any]]:
    """Rows of this name, or of a recipe as it is today: ``recipe qvd-w8a8``; those of most clips first."""
    digest = f"-{load_recipe(name.removeprefix('recipe ')).digest()}" if name.startswith("recipe ") else ""
    own = [row for row in rows if row.get("pipeline") == pipeline and (row["digest"].endswith(digest) if digest else row["name"] == name)]
    yield from sorted((row for row in own if row.get("status") == "measured"), key=lambda row: -row["clips"])


@dataclass(frozen=True)
class Quality:
    """PSNR of a row, dB, to float or to the same pipeline that leaves out nothing."""

    row: str
    least: float
    command: str

    def told(self, rows: Rows, pipeline: str) -> Told:
        row = next((one for one in _named(rows, self.row, pipeline) if "psnr" in one), None)
        if row is None:
            return (*MISSING, self.command)
        words = f"{row['psnr_mean']:.1f} dB ({row['psnr_low']:.1f} to {row['psnr_high']:.1f}; worst {min(row['psnr']):.1f})"
        return words, str(row["clips"]), "passed" if row["psnr_mean"] >= self.least else "missed", self.command


@dataclass(frozen=True)
class Gain:
    """What a row has over another, clip by clip, dB."""

    row: str
    rival: str
    least: float
    command: str

    def told(self, rows: Rows, pipeline: str) -> Told:
        others = {(row["digest"][:12], row["clips"]): row for row in _named(rows, self.rival, pipeline) if "psnr" in row}
        for row in _named(rows, self.row, pipeline):
            if (other := others.get((row["digest"][:12], row["clips"]))) is not None:
                gain = bootstrap([a - b for a, b in zip(row["psnr"], other["psnr"], strict=True)])
                said = verdict(self.least, gain.mean, gain.low)
                return f"{gain.mean:+.1f} dB ({gain.low:+.1f} to {gain.high:+.1f})", str(row["clips"]), said, self.command
        return (*MISSING, self.command)


@dataclass(frozen=True)
class Sizes:
    """What the judge sees under a schedule of sizes, points of all that texts say, beside none."""

    schedule: str
    fewer: float
    points: float

    def told(self, rows: Rows, pipeline: str) -> Told:
        row = next(_named(rows, f"resolution: {self.schedule}", pipeline), None)
        if row is None:
            return (*MISSING, RESOLUTION)
        apart = 100 * (statistics.mean(row["judge"].values()) - statistics.mean(row["judge_plain"].values()))
        said = "passed" if row["fewer"] >= self.fewer and apart >= -self.points else "missed"
        return f"{apart:+.1f} points, {row['fewer']:.2f} times fewer", str(row["clips"]), said, RESOLUTION


@dataclass(frozen=True)
class Speed:
    """How many times faster a clip is than with the same quantized pipeline that leaves out nothing."""

    recipe: str
    least: float

    def told(self, rows: Rows, pipeline: str) -> Told:
        command = f"`left_out --pipeline {pipeline}`"
        row = next(_named(rows, SPEED.format(self.recipe), pipeline), None)
        if row is None:
            return (*MISSING, command)
        middle = statistics.median(row["ratios"])
        words = f"{middle:.2f} times ({min(row['ratios']):.2f} to {max(row['ratios']):.2f}), CPU time"
        return words, "1", "passed" if middle >= self.least else "missed", command


@dataclass(frozen=True)
class Figure:
    """A figure that no row holds, and where it stands or what gives it."""

    words: str
    clips: str
    verdict: str
    command: str

    def told(self, rows: Rows, pipeline: str) -> Told:
        return self.words, self.clips, self.verdict, self.command


@dataclass(frozen=True)
class Shown:
    """A test: ``tests/unit/reuse/test_blocks.py::test_name``."""

    test: str
    words: str = "holds"

    def told(self, rows: Rows, pipeline: str) -> Told:
        file, _, name = self.test.partition("::")
        if f"def {name}(" not in Path(file).read_text(encoding="utf-8"):
            raise SystemExit(f"there is no test {self.test}")
        return self.words, "-", "passed", f"`{self.test}`"


@dataclass(frozen=True)
class Line:
    """One thing that is asked of a method.

    Attributes:
        why: said of a line that did not pass.
        note: said in any case.
    """

    method: str
    ours: str
    asked: str
    found: Found
    on: str = ""
    why: str = ""
    note: str = ""


DIT, UNET, NONE = "tiny-dit", "tiny-unet", "-"
TUNED, ATTENTION, LIBRARY, REMOVAL, RESOLUTION = "`tuned`", "`attention_reuse`", "`library`", "`removal`", "`resolution`"
ANSWERS = "`tuned --answers`"
INNER = "the blocks it reuses are 37 % of a clip here; the first and the last, which see whole pictures, are always computed"
ENCODER = "blocks down and in the middle are about two fifths of a clip here, and 9 of 20 steps compute them"
TOKENS = "1.8 times fewer tokens, judge within 3 points"
BEST, EVEN, LAST, OF_FLOAT = (
    f"tuned {words}, 10 steps"
    for words in (
        "planned, fitted weights of two",
        "even, fitted weights of two",
        "planned, last result repeated",
        "planned on the float pipeline, fitted weights of two",
    )
)
ALIKE_BEST, ALIKE_LAST, ALIKE_EVEN, ALIKE_FLOAT = (f"tuned {words}, 10 steps" for words in (ALIKE, LAST_ALIKE, EVEN_ALIKE, FLOAT_ALIKE))
REUSE, PLACES = "tests/contracts/test_reuse.py", "tests/unit/reuse/test_attention.py"
EXACT = Shown(f"{REUSE}::test_told_to_compute_everything_it_changes_no_bit")
CACHE = "`cachequant-w8a8`, `reelquant tune`"
SAME = "the same schedule, step for step, in float and in eight bits; only weights of forecasts differ (+0.5 dB at 8 of 20 steps)"
SCHEDULE = "schedule: +1 dB over even spacing at half of the blocks"
REPAIR = "repair: +1 dB over the last result at half of the blocks"
ON_QUANTIZED = "planned on the quantized model: +0.5 dB over float"
PADDED = "places over frames have to be computed often there; a plan for a budget (`half-attention-w8a8`) passes"
SMALL = "models of one size lose motion and shape at smaller ones (docs/resolution.md)"
TRAINED = "the error of held-out calls falls from 0.130 to 0.009; clips part at the first steps all the same (docs/removal.md)"
ZERO = "the mean is enough; 16 clips do not tell it from zero"
USELESS = "what the small steps see is of no use: all held, which takes nothing of it, is better (32.0 dB to no schedule)"
SPARE = "no spare weights in so small a model; below 4.5 bits a weight fewer bits are better"


def _both(method: str, ours: str, asked: str, found: Found, why: str = "", unet: str | None = None) -> tuple[Line, Line]:
    """A line on each pipeline."""
    return Line(method, ours, asked, found, DIT, why), Line(method, ours, asked, found, UNET, why if unet is None else unet)


LINES: tuple[Line, ...] = (
    Line("CacheQuant", CACHE, SCHEDULE, Gain(BEST, EVEN, 1.0, TUNED), DIT),
    Line("CacheQuant", CACHE, SCHEDULE, Gain(ALIKE_BEST, ALIKE_EVEN, 1.0, ANSWERS), UNET),
    Line("CacheQuant", CACHE, REPAIR, Gain(BEST, LAST, 1.0, TUNED), DIT),
    Line("CacheQuant", CACHE, REPAIR, Gain(ALIKE_BEST, ALIKE_LAST, 1.0, ANSWERS), UNET),
    *_both(
        "CacheQuant",
        CACHE,
        "calibrated with the cache: no worse than apart",
        Gain("recipe cachequant-w8a8", SEPARATE, 0.0, "`left_out`"),
        ZERO,
    ),
    *_both("CacheQuant", CACHE, "30 dB to float at half of the blocks", Quality("recipe cachequant-w8a8", 30.0, LIBRARY)),
    Line("(ours)", "`reelquant tune`", ON_QUANTIZED, Gain(BEST, OF_FLOAT, 0.5, TUNED), DIT),
    Line("(ours)", "`reelquant tune`", ON_QUANTIZED, Gain(ALIKE_BEST, ALIKE_FLOAT, 0.5, ANSWERS), UNET, SAME),
    Line("DeepCache", "`deepcache`", "every third step: 25 dB", Quality("recipe deepcache", 25.0, LIBRARY), UNET),
    Line("DeepCache", "`deepcache`", "1.5 times as fast", Speed("deepcache", 1.5), UNET, INNER),
    Line("Faster Diffusion", "`faster-diffusion`", "25 dB", Quality("recipe faster-diffusion", 25.0, LIBRARY), UNET),
    Line("Faster Diffusion", "`faster-diffusion`", "1.4 times as fast", Speed("faster-diffusion", 1.4), UNET, ENCODER),
    Line("Delta-DiT", "`delta-dit`", "27 dB with 1.6 times fewer blocks (1.76 times)", Quality("recipe delta-dit", 27.0, LIBRARY), DIT),
    Line(
        "ProfilingDiT",
        "`profilingdit`",
        "+1 dB over other lists of as many blocks",
        Figure("-1.2 to +0.4 dB over seven lists of three blocks", "8", "missed", "`docs/reuse.md`"),
        DIT,
        "all six blocks change alike; meant for models with more of them",
    ),
    Line("all of these", "`reuse: blocks`", "the same bits when everything is computed", EXACT, NONE),
    *_both(
        "DiTFastAttn",
        "`ditfastattn`",
        "30 dB at half of the multiplications of attention",
        Quality("attention reuse a threshold chooses, 50%", 30.0, ATTENTION),
        unet=PADDED,
    ),
    *_both(
        "(ours)",
        "`half-attention-w8a8`",
        "30 dB at half of the multiplications of attention",
        Quality("attention reuse a plan for 50%", 30.0, ATTENTION),
    ),
    Line("DiTFastAttn", "`ditfastattn`", "the same bits with the threshold 0", EXACT, NONE),
    Line("AdaSpa", "`adaspa`", "all blocks: the same bits", Shown(f"{PLACES}::test_all_blocks_are_attention_bit_for_bit"), NONE),
    Line(
        "AdaSpa",
        "`adaspa`",
        "half of the blocks hold 0.9 of the weights",
        Figure("0.84; 0.92 with groups of 2 queries and blocks of 2 keys", "1", "missed", "`attention_reuse --recall`"),
        DIT,
        "28 tokens of a frame: blocks of seven keys are coarse; single queries and keys have 0.94",
    ),
    Line(
        "Variable-size",
        "`policy: scale_logits`",
        "half the size: the judge sees no less than unscaled",
        Figure("45.8 % of what the texts say, both", "24", "passed", "`attention_reuse --sizes`"),
        DIT,
        note="no gain either: what is missing at that size is not sharper attention",
    ),
    Line(
        "Bottleneck Sampling",
        "`bottleneck`",
        "one size in all stages: the same bits",
        Shown("tests/unit/models/test_resolution.py::test_one_size_changes_nothing_bit_for_bit"),
        NONE,
    ),
    Line("Bottleneck Sampling", "`bottleneck`", TOKENS, Sizes("bottleneck 0.5", 1.8, 3.0), DIT, SMALL),
    Line("Bottleneck Sampling", "late 0.5, details", TOKENS, Sizes("late 0.5, details", 1.8, 3.0), DIT, SMALL),
    Line("(ours)", "late 0.5, details, half held", TOKENS, Sizes("late 0.5, details, half held", 1.8, 3.0), DIT, SMALL, USELESS),
    Line(
        "VDMini",
        "`reelquant drop-blocks`",
        "5 of 6 blocks, distilled: +6 dB over not distilled",
        Gain("dropped: measured, 500 iterations on 400 calls", "dropped: measured, not trained", 6.0, "`dropped`"),
        DIT,
        TRAINED,
    ),
    Line(
        "VDMini",
        "`reelquant drop-blocks`",
        "a shallow block is missed no more than a deep one",
        Figure("17.2 dB without block 1, 20.5 dB without block 4", "16", "missed", "docs/removal.md"),
        DIT,
        "six blocks: the shallow ones are not spare",
    ),
    Line(
        "DiffuseHigh",
        "`diffuse-high`",
        "twice the size: the judge sees no less than at once",
        Figure("1.00, 1.00, 0.33, 1.00 (at once 0.50, 0.50, 0.17, 0.50)", "8", "passed", "`resolution`"),
        DIT,
    ),
    Line("LowDiff", "no", "as Bottleneck Sampling", Figure("-", "-", "not built", "-"), NONE, "needs a model that is trained for it"),
    Line(
        "GPUSQ-ViT",
        "`sparse24-w8a8`",
        "two of every four weights are zero",
        Shown("tests/unit/solvers/test_sparse.py::test_every_group_keeps_as_many_weights_as_it_should"),
        NONE,
    ),
    *_both(
        "GPUSQ-ViT",
        "`sparse24-w8a8`",
        "+2 dB over the largest weights",
        Gain("recipe sparse24-w8a8", "beside keep 2:4, largest", 2.0, REMOVAL),
    ),
    *_both(
        "Pruning SD",
        "`prune-35`",
        "30 dB with a third gone (30 % was asked, 34 % is measured)",
        Quality("beside keep 42:64", 30.0, REMOVAL),
        SPARE,
    ),
    Line(
        "COMCAT",
        "no recipe",
        "values and outputs with a quarter fewer ranks: 25 dB",
        Figure("29.9 dB in float", "4", "passed, not kept", "`docs/removal.md`"),
        DIT,
        "no stock class has narrower values, so from_pretrained could not open the result",
    ),
    Line("UVC", "no", "no worse than magnitudes at equal multiplications", Figure("-", "-", "not built", "-"), NONE, "heads: as COMCAT"),
    Line(
        "AdcSR",
        "`temporal: fold`",
        "folded timesteps: the same bits",
        Shown("tests/tiny/test_engine.py::test_folded_layers_have_their_outputs_alone_and_refuse_other_timesteps"),
        NONE,
        note="a fixed prompt is not folded: its outputs are larger than the layers (docs/removal.md)",
    ),
    Line(
        "Shortcut-V2V",
        "no recipe",
        "a block at every second frame: 25 dB",
        Figure("20.8 to 24.6 dB at all steps; 26.3 to 27.7 dB from the fifth on, for 13 % less work", "4", "missed", "`docs/reuse.md`"),
        DIT,
        "leaving out whole steps gives 34 dB at a quarter of the work",
    ),
    Line("FlashFFTConv", "no", "-", Figure("-", "-", "not built", "-"), NONE, "no denoiser here has long convolutions"),
)


def page(rows: Rows) -> str:
    """The table."""
    return markdown(HEADINGS, [_cells(line, rows) for line in LINES])


def _cells(line: Line, rows: Rows) -> list[str]:
    words, clips, said, command = line.found.told(rows, line.on)
    return [line.method, line.ours, line.asked, line.on, words, clips, said, line.note or (line.why if said != "passed" else ""), command]


def measure_speeds(clips: Clips, records: Records) -> None:
    """Clips of one prompt in turns with those of the same quantized pipeline that leaves out nothing."""
    for name in FAST:
        key, digest = SPEED.format(name), f"{clips.digest}-{load_recipe(name).digest()}"
        if records.done(key, digest):
            continue
        folder = KEPT / f"{clips.name}-{name}"
        if not folder.is_dir():
            pipe = clips.open()
            reelquant.save(pipe, folder, reelquant.quantize(pipe, name))
        ratios = times_in_turns(clips, folder, quantized(clips, KEPT))
        facts = {"name": key, "digest": digest, "pipeline": clips.name, "clips": 1, "status": "measured"}
        records.add(facts | {"ratios": ratios})
        print(f"{clips.name}: {key}", flush=True)


def measure_apart(clips: Clips, records: Records, folder: Path) -> None:
    """The plan of ``cachequant-w8a8`` on a pipeline that was calibrated without it."""
    digest = f"{clips.digest}-{load_recipe('cachequant-w8a8').digest()}-apart"
    if records.done(SEPARATE, digest):
        return
    own = clips.open()
    reelquant.quantize(own, "cachequant-w8a8")
    acting = installed_reuse(site_of(own).denoiser)["blocks"]
    pipe = reelquant.open_pipeline(quantized(clips, KEPT))
    put(site_of(pipe).denoiser, "blocks", acting.stage, acting.facts)
    facts = {"name": SEPARATE, "digest": digest, "pipeline": clips.name, "clips": clips.count, "status": "measured"}
    records.add(facts | measure(clips.frames(pipe), clips.float_frames(folder), clips.prompts))
    print(f"{clips.name}: {SEPARATE}", flush=True)


def main() -> None:
    """Parse the command line, measure what is missing, write the table."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--output", type=Path, default=ROWS.parent)
    options.add_argument("--pipeline", help="measure on it what no other benchmark measures")
    options.add_argument("--clips", type=int, default=16)
    options.add_argument("--only", choices=PARTS, nargs="*", default=PARTS, help="of what is measured on the pipeline")
    args = options.parse_args()
    torch.set_num_threads(1)
    records = Records(args.output / ROWS.name)
    if args.pipeline:
        KEPT.mkdir(parents=True, exist_ok=True)
        clips = Clips(args.pipeline, args.clips)
        if SPEEDS in args.only and clips.name == UNET:
            measure_speeds(clips, records)
        if CALIBRATION in args.only:
            measure_apart(clips, records, args.output)
    (args.output / PAGE.name).write_text(text := page(records.load()))
    print(text)


if __name__ == "__main__":
    main()
