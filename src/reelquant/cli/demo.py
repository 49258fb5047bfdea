"""``reelquant demo``: quantize the bundled pipelines and write pictures and videos that show the result."""

from __future__ import annotations

import json as json_
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelquant._errors import CheckpointError
from reelquant.cli.options import Json, Steps, more_help

if TYPE_CHECKING:
    from rich.table import Table

    from reelquant.evidence.variants import Comparison, Outcome

VARIANTS = ("minmax-w8a8", "qvd-w8a8", "qvd-w6a6", "qvd-w4a8")  # as they are shown
SAVED = "qvd-w8a8"  # first, because its statistics cover the other variants; also saved and opened again
SHORTER: dict[str, Any] = {
    "search.prompts": 2,
    "calibrate.steps": 10,
}  # shorter than the defaults: benchmarks/ has figures at full length
RESULTS = "results.json"
SEED = 42
PARTIAL = ".reelquant-demo."  # begins the name of what is not complete
SHOWN, PLAYED = 3, 3  # clips on the contact sheet, clips in the video
LOOPS = 3  # of the MP4: a clip is under two seconds
CAPTIONS = (
    "a large red circle moving right on a black background",
    "a large blue star spinning on a white background",
    "a large yellow heart moving up on a gray background",
    "a large green square moving left on a white background",
    "a large purple triangle growing on a black background",
    "a large orange star moving down on a gray background",
    "a small red heart bouncing on a white background",
    "a large blue square shrinking on a black background",
)


class Which(StrEnum):
    """Pipelines of the demo."""

    UNET = "tiny-unet"
    DIT = "tiny-dit"
    BOTH = "both"


Output = Annotated[Path, typer.Option("--output", "-o", help="A folder that is new, empty, or of an earlier demo.")]
Pipeline = Annotated[Which, typer.Option("--pipeline", help="Which of the bundled pipelines.")]
Clips = Annotated[int, typer.Option("--clips", min=1, help="Clips per variant.")]


@more_help("""
    [bold]Examples[/bold]

    [cyan]reelquant demo[/cyan]
    [cyan]reelquant demo --pipeline tiny-dit --clips 16 -o dit[/cyan]    one of them, tighter intervals

    Writes per pipeline a contact sheet (PNG) and the clips side by side (MP4 and GIF), results.json, and one quantized
    pipeline that was opened again with stock diffusers. No network, no GPU.
""")
def demo(
    output: Output = Path("reelquant-demo"),
    pipeline: Pipeline = Which.BOTH,
    clips: Clips = 4,
    steps: Steps = None,
    json: Json = False,
) -> None:
    """Quantize the bundled video pipelines in four ways and compare them with float: the same texts and noise."""
    start = time.perf_counter()
    target = _target(output)
    names = [Which.UNET.value, Which.DIT.value] if pipeline is Which.BOTH else [pipeline.value]
    from reelquant.models.pipelines import bundled_path

    for name in names:
        bundled_path(name)  # before the slow imports
    with _replacing(target) as folder:
        data = _run(names, folder, clips, steps, json)
        data["seconds"] = round(time.perf_counter() - start, 1)
        (folder / RESULTS).write_text(json_.dumps(data, indent=2) + "\n")
    _goodbye(data, target, json)


def _target(output: Path) -> Path:
    """Refuse anything but a new or empty folder or one that an earlier demo wrote."""
    from reelquant.checkpoint import absolute

    path = absolute(output)
    if path.exists() and not (path.is_dir() and (_is_empty(path) or _is_demo(path))):
        raise CheckpointError(f"'{path}' exists and was not written by reelquant demo; choose another --output")
    return path


def _is_empty(path: Path) -> bool:
    """Whether a folder holds nothing, but for what a demo that was killed left."""
    return all(one.name.startswith(PARTIAL) for one in path.iterdir())


def _is_demo(path: Path) -> bool:
    file = path / RESULTS
    return file.is_file() and '"made_by": "reelquant demo"' in file.read_text(encoding="utf-8", errors="replace")


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A folder whose content becomes the target's on success. A target that exists stays: it may be a mount, or where the user stands."""
    fresh = target / f"{PARTIAL}{os.getpid()}" if target.is_dir() else target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if target.is_dir():
            _refill(target, fresh)
        else:
            fresh.rename(target)
    except OSError as error:
        raise (error if isinstance(error, CheckpointError) else CheckpointError(f"cannot write '{target}': {error}")) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _refill(target: Path, fresh: Path) -> None:
    """Let what is in ``fresh`` take the place of all else in the target."""
    for old in target.iterdir():
        if old != fresh:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    for one in fresh.iterdir():
        one.rename(target / one.name)


def _run(names: list[str], folder: Path, clips: int, steps: int | None, json: bool) -> dict[str, Any]:
    """Every pipeline, each in its own process if there are cores: small models gain little from a second thread."""
    from reelquant._version import __version__
    from reelquant.cli.console import Bars, out
    from reelquant.cli.parallel import run_each

    workers = min(len(names), _cores())
    jobs = [Job(name, folder, clips, steps, max(1, _cores() // workers)) for name in names]
    with Bars() as bars:
        found = run_each(work, jobs, [bars.lane() for _ in jobs], workers)
    if not json:
        for name, one in zip(names, found, strict=True):
            out.print(results_table(name, one["variants"], clips))
    facts = {
        "made_by": "reelquant demo",
        "version": __version__,
        "cores": _cores(),
        "seed": SEED,
        "captions": _captions(clips),
    }
    return facts | {"pipelines": dict(zip(names, found, strict=True))}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _captions(clips: int) -> list[str]:
    return [CAPTIONS[i % len(CAPTIONS)] for i in range(clips)]


@dataclass(frozen=True)
class Job:
    """One pipeline of the demo."""

    name: str
    folder: Path
    clips: int
    steps: int | None
    threads: int


def work(job: Job, lane: Any) -> dict[str, Any]:
    """Compare and draw the variants of one pipeline; return their figures."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        outcomes, reopened = _compare(job, lane)
    finally:
        torch.set_num_threads(before)
    lane.about(job.name)
    lane.phase("pictures", 1)
    files = _pictures(job.name, job.folder, outcomes)
    lane.finish()
    return {"variants": [one.figures() for one in outcomes], "reopened": reopened, "files": files}


def _compare(job: Job, lane: Any) -> tuple[list[Outcome], dict[str, Any]]:
    """Float and every variant on the same clips; the saved variant goes first and is opened again."""
    from reelquant.cli.options import call_options, opened
    from reelquant.evidence.variants import Comparison

    lane.about(job.name)
    lane.phase("open", 1)
    comparison = Comparison(opened(job.name), _captions(job.clips), SEED, call_options(steps=job.steps), lane)
    lane.about(f"{job.name} float")
    found = {"float": comparison.measure_float()}
    reopened: dict[str, Any] = {}
    for recipe in sorted(VARIANTS, key=lambda recipe: recipe != SAVED):
        lane.about(f"{job.name} {recipe}")
        found[recipe] = comparison.measure(recipe, overrides=SHORTER)
        if recipe == SAVED:
            reopened = _save(comparison, found[recipe], job.folder / f"{job.name}-{recipe}", lane)
    comparison.restore()
    return [found[variant] for variant in ("float", *VARIANTS)], reopened


def _save(comparison: Comparison, outcome: Outcome, folder: Path, lane: Any) -> dict[str, Any]:
    from reelquant.api import save
    from reelquant.evidence.variants import reopened_equals

    lane.phase("save and open with stock diffusers", 2)
    save(comparison.pipe, folder, outcome.report)
    lane.advance()
    call = comparison.call | {"num_inference_steps": 4}
    equal = reopened_equals(comparison.pipe, folder, comparison.captions[:2], SEED, call)
    weights = sum(file.stat().st_size for file in (folder / comparison.component).glob("*.safetensors"))
    return {"folder": folder.name, "equal": equal, "bytes_on_disk": weights}


# -------------------------------------------------------------------------------------------------------------------------- output


def _pictures(name: str, folder: Path, outcomes: list[Outcome]) -> list[str]:
    """Contact sheet, MP4 and GIF of one pipeline."""
    from reelquant.evidence import contact_sheet, side_by_side, write_video

    captions = _captions(len(outcomes[0].frames))
    title = f"{name}: the same texts and the same noise, float and quantized"
    shown = [one.frames[:SHOWN] for one in outcomes]
    sheet = contact_sheet(shown, folder / f"{name}-sheet.png", [label(one) for one in outcomes], captions[:SHOWN], title=title)
    labels = [label(one, short=True) for one in outcomes]
    played = [one.frames[:PLAYED] for one in outcomes]
    films = [
        *write_video(side_by_side(played, labels, loops=LOOPS), folder / f"{name}.mp4"),
        *write_video(side_by_side(played, labels), folder / f"{name}.gif"),
    ]
    return [sheet.name, *(film.name for film in films)]


def label(outcome: Outcome, short: bool = False) -> str:
    """Name and figures of a variant, for pictures."""
    if outcome.report is None or outcome.psnr is None:
        return f"{outcome.name}\n{'reference' if short else 'the reference'}"
    ratio, psnr = f"{outcome.report.ratio:.1f}x smaller", f"{outcome.psnr.mean:.1f} dB"
    return f"{outcome.name}\n{psnr}" if short else f"{outcome.name}\n{ratio}\n{psnr} to float\n{_text_match(outcome)}"


def _text_match(outcome: Outcome) -> str:
    return "text match " + "/".join(f"{100 * outcome.judge[kind]:.0f}" for kind in KINDS if kind in outcome.judge) + " %"


KINDS = ("color", "shape", "motion")
COLUMNS = ("bytes", "smaller", "PSNR, dB", "95 % interval", "TDScore", "colour", "shape", "motion", "quantize", "a clip")
HIDES = ("95 % interval", "quantize", "a clip", "TDScore")


def results_table(name: str, variants: list[dict[str, Any]], clips: int) -> Table:
    """A row per variant, from its figures."""
    from reelquant.cli.layout import table

    made = table(f"{name}, {clips} clips", ["variant"], COLUMNS, HIDES)
    floats = next(one["bytes_float"] for one in variants if one["bytes_float"])
    for one in variants:
        made.add_row(one["variant"], *_cells(one | {"bytes": one["bytes"] or floats}, clips))
    made.caption = (
        "bytes: of the quantized layers, scales included; PSNR: to the float clips, mean and interval; TDScore: 1 is lossless; "
        "colour, shape, motion: text match, the share of clips that show what their text says"
    )
    return made


def _cells(one: dict[str, Any], clips: int) -> tuple[str, ...]:
    from reelquant.cli.console import figure, size

    matches = [figure(one.get(f"judge_{kind}"), "{:.0%}") for kind in KINDS]
    psnr = ("-", "") if one["psnr"] is None else (f"{one['psnr']:.1f}", f"{one['psnr_low']:.1f} to {one['psnr_high']:.1f}")
    seconds = figure(one["seconds_quantize"] or None, "{:.1f} s"), f"{one['seconds_sample'] / clips:.2f} s"
    return size(one["bytes"]), f"{one['ratio']:.2f}x", *psnr, figure(one["tdscore"]), *matches, *seconds


def _goodbye(data: dict[str, Any], target: Path, json: bool) -> None:
    from reelquant.cli import console
    from reelquant.cli.layout import facts

    if json:
        return console.emit(data | {"output": str(target)})
    rows = []
    for name, found in data["pipelines"].items():
        sheet, *films = found["files"]
        again = found["reopened"]
        same = "gives the same clips" if again["equal"] else "gives other clips: a fault, please report it"
        rows.append((name, f"{sheet} (look at this first), {', '.join(films)}"))
        rows.append(
            (
                "",
                f"{again['folder']} ({console.size(again['bytes_on_disk'])}): opened again with stock diffusers, {same}",
            )
        )
    console.out.print(facts(f"Done in {data['seconds']:.0f} s", rows))
    console.done(target)
    return None
