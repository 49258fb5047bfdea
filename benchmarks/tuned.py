"""What reuse from step to step brings under ``qvd-w8a8``: planned schedules beside even ones, fitted weights beside polynomials, schedules
planned on the quantized pipeline beside those of the float one; and what ``reelquant tune`` makes of it.

Run it from the repository root::

    python -m benchmarks.tuned --pipeline tiny-dit --clips 64 --output benchmarks/results
    python -m benchmarks.tuned --pipeline tiny-unet --clips 64 --output benchmarks/results
    python -m benchmarks.tuned --pipeline runs/tiny-ltx/pipeline --clips 16 --output benchmarks/results
    python -m benchmarks.tuned --pipeline tiny-unet --clips 32 --output benchmarks/results --answers --gate    # tuned-PIPELINE-answers.md

With ``--answers`` whole answers are kept, and planned with inner products of guided answers that count alike at all steps: what
``reelquant tune`` comes to where sampled schedules are against the damages of single steps.

Clips of evaluation captions, held against the same quantized pipeline without reuse; gains are clip by clip. Rows and recordings that are
there are not made again. Rows are kept in ``rows.jsonl``; the table is ``tuned-PIPELINE.md``; pipelines, recordings and trials are kept in
``runs/tuned``. Whole clips are timed in turns (A B, B A), in CPU time, against the quantized and against the float pipeline.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import reelquant
from benchmarks.common import SAMPLING_SEED, Clips, Records, markdown, measure, parser
from reelquant._progress import Silent
from reelquant.evidence import bootstrap
from reelquant.models.pipelines import calibration_prompts
from reelquant.models.sampling import sample
from reelquant.reuse import BlockReuse, installed_reuse
from reelquant.reuse.plans import Errors, even, plans
from reelquant.tuning.material import SEED
from reelquant.tuning.recording import Clips as Recorded
from reelquant.tuning.recording import Seconds, record, reusing, site_of, timesteps_and_gram
from reelquant.tuning.run import RECORDED, tune
from reelquant.tuning.search import Goal, Search
from reelquant.tuning.trials import Trial

RECIPE = "qvd-w8a8"
SHARES = (0.6, 0.5, 0.4)
STRETCH: tuple[float, ...] = (0.0, 1.0)
HEADINGS = ("computed", "schedule", "PSNR to no reuse, dB (95 %)", "worst clip, dB", "planned over this, clip by clip, dB (95 %)")
PLANNED, ROUNDS = "planned, fitted weights of two", 5
WHOLE: tuple[float, ...] = ()
"""The stretch of whole answers, which is what ``reelquant tune`` keeps of a denoiser without a chain of blocks."""
GUIDED = 16
"""Clips whose guided answers are recorded: one sampling each, with everything computed."""
ALIKE = "all damages alike, weights of two, whole answers"
LAST_ALIKE = "all damages alike, last result repeated, whole answers"
EVEN_ALIKE, FLOAT_ALIKE = "even, weights of two, whole answers", "on the float pipeline, all damages alike, weights of two, whole answers"
KEPT = Path("runs/tuned")


def quantized(clips: Clips, folder: Path) -> Path:
    """The quantized pipeline, made once."""
    made = folder / f"{clips.name}-{RECIPE}"
    if not made.is_dir():
        pipe = clips.open()
        reelquant.save(pipe, made, reelquant.quantize(pipe, RECIPE))
    return made


def recorded(pipe: Any, file: Path) -> Errors:
    """What schedules are planned with, recorded once."""
    if not file.is_file():
        texts = calibration_prompts(pipe, RECORDED)
        clips = Recorded(texts, range(SEED, SEED + len(texts)))
        errors, _ = record(pipe, site_of(pipe), STRETCH, clips, Silent(), lambda _: None, lambda *_: None)
        facts = {"timesteps": list(errors.timesteps), "gram": errors.gram.tolist(), "weight": errors.weight.tolist()}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(facts))
    facts = json.loads(file.read_text())
    return Errors(facts["timesteps"], np.array(facts["gram"]), np.array(facts["weight"]), fitted=True)


def guided(pipe: Any, file: Path) -> Errors:
    """The same of whole answers, where an error counts alike at all steps; recorded once."""
    if not file.is_file():
        texts = calibration_prompts(pipe, GUIDED)
        clips = Recorded(texts, range(SEED, SEED + len(texts)))
        timesteps, gram, _ = timesteps_and_gram(pipe, site_of(pipe), BlockReuse(every=1, stretch=WHOLE), clips, Silent())
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"timesteps": timesteps, "gram": gram.tolist()}))
    facts = json.loads(file.read_text())
    return Errors(facts["timesteps"], np.array(facts["gram"]), np.ones(len(facts["timesteps"])), fitted=True)


def stage(errors: Errors, computed: tuple[int, ...], order: int, stretch: tuple[float, ...] = STRETCH) -> BlockReuse:
    """The reuse that computes these steps."""
    search = Search(stretch, errors, Seconds(1.0, 0.0, 0.0, 1), None)  # type: ignore[arg-type]  (nothing is tried here)
    return search.stage(computed, order)


WHOLE_LABELS = (ALIKE, LAST_ALIKE, EVEN_ALIKE, FLOAT_ALIKE)
Schedules = Mapping[str, Callable[[int], BlockReuse]]


def schedules(own: Errors, of_float: Errors) -> Schedules:
    """Label -> number of computed steps -> reuse."""
    polynomial, steps = replace(own, fitted=False), len(own.timesteps)

    def planned(errors: Errors, order: int, weights: Errors | None = None) -> Callable[[int], BlockReuse]:
        found = plans(errors, order)
        return lambda number: stage(weights or errors, found[number].steps, order)

    return {
        PLANNED: planned(own, 1),
        "planned, weights of a line": planned(polynomial, 1),
        "planned, last result repeated": planned(polynomial, 0),
        "even, fitted weights of two": lambda number: stage(own, even(steps, number), 1),
        "even, last result repeated": lambda number: stage(polynomial, even(steps, number), 0),
        "planned on the float pipeline, fitted weights of two": planned(of_float, 1),
    }


def whole_answers(own: Errors, of_float: Errors) -> Schedules:
    """Schedules of whole answers, planned with damages that are all alike: label -> number of computed steps -> reuse."""
    steps = len(own.timesteps)
    plain = replace(own, fitted=False)
    planned, repeated, rival = plans(own, 1), plans(plain, 0), plans(of_float, 1)
    return {
        ALIKE: lambda number: stage(own, planned[number].steps, 1, WHOLE),
        LAST_ALIKE: lambda number: stage(plain, repeated[number].steps, 0, WHOLE),
        EVEN_ALIKE: lambda number: stage(own, even(steps, number), 1, WHOLE),
        FLOAT_ALIKE: lambda number: stage(of_float, rival[number].steps, 1, WHOLE),
    }


def run(clips: Clips, records: Records, folder: Path, labels: Mapping[tuple[int, str], BlockReuse]) -> None:
    """Measure the rows that are missing."""
    missing = {key: one for key, one in labels.items() if not records.done(*_key(clips, key, one))}
    if not missing:
        return
    pipe = reelquant.open_pipeline(quantized(clips, folder))
    site = site_of(pipe)
    reference = _reference(clips, pipe, folder)
    for (number, label), one in missing.items():
        with reusing(site, one):
            frames = clips.frames(pipe)
        name, digest = _key(clips, (number, label), one)
        facts = {"name": name, "digest": digest, "pipeline": clips.name, "clips": clips.count, "status": "measured", "at": list(one.at)}
        records.add(facts | measure(frames, reference, clips.prompts))
        print(f"{clips.name}: {name}", flush=True)


def _reference(clips: Clips, pipe: Any, folder: Path) -> Tensor:
    """The clips without reuse, sampled once."""
    from safetensors.torch import load_file, save_file

    file = folder / f"{clips.name}-{RECIPE}-{clips.digest}.safetensors"
    if not file.is_file():
        save_file({"frames": clips.frames(pipe).contiguous()}, file)
    return load_file(file)["frames"]


def _key(clips: Clips, key: tuple[int, str], one: BlockReuse) -> tuple[str, str]:
    import hashlib

    return f"tuned {key[1]}, {key[0]} steps", f"{clips.digest}-{hashlib.sha256(repr(one).encode()).hexdigest()[:12]}"


def table(clips: Clips, records: Records, labels: Mapping[tuple[int, str], BlockReuse], steps: int) -> str:
    """The rows of these clips, as far as they are measured."""
    known = {(row["name"], row["digest"]): row for row in records.load()}
    found = {key: row for key, one in labels.items() if (row := known.get(_key(clips, key, one)))}
    best = {key: ALIKE if key[1] in WHOLE_LABELS else PLANNED for key in found}
    return markdown(HEADINGS, [_line(key, row, found.get((key[0], best[key])), steps) for key, row in found.items()])


def _line(key: tuple[int, str], row: Mapping[str, Any], best: Mapping[str, Any] | None, steps: int) -> list[str]:
    mean = f"{row['psnr_mean']:.1f} ({row['psnr_low']:.1f} to {row['psnr_high']:.1f})"
    gain = "-"
    if best is not None and best is not row:
        apart = bootstrap([a - b for a, b in zip(best["psnr"], row["psnr"], strict=True)])
        gain = f"{apart.mean:+.1f} ({apart.low:+.1f} to {apart.high:+.1f})"
    return [f"{key[0]} of {steps}", key[1], mean, f"{min(row['psnr']):.1f}", gain]


def whole(clips: Clips, folder: Path, gate: str) -> str:
    """What ``reelquant tune`` chooses with these clips, and how fast whole clips are then."""
    source, output = quantized(clips, folder), folder / f"{clips.name}-{RECIPE}-{gate}-{clips.count}"
    made = tune(source, output, goal=Goal(gate=gate), clips=clips.count, force=True)
    if made.chosen is None or made.output is None:
        return f"`reelquant tune --gate {gate} --clips {clips.count}`: no schedule passes.\n"
    fast, plain = in_turns(clips, made.output, source), in_turns(clips, made.output, None)
    graph = in_turns(clips, made.output, None, runtime="openvino") if _kept(made.output) == "answer" else None
    beside = f" ({graph} as an OpenVINO graph)" if graph else ""
    chosen, tried = made.chosen, "; ".join(map(_tried, made.trials))
    computed = ", ".join(str(step + 1) for step in chosen.computed)
    return (
        f"`reelquant tune --gate {gate} --clips {clips.count}`: blocks are computed at {len(chosen.computed)} of {chosen.steps} steps "
        f"({computed}), {chosen.figures['psnr']:.1f} dB to no reuse (worst clip {chosen.worst:.1f}), motion "
        f"{chosen.figures['motion_deviation']:+.3f}. Whole clips in turns, one thread: {fast} times as fast as without reuse, {plain} "
        f"as fast as eager float32{beside}. Tried, by computed steps: {tried}.\n"
    )


def _tried(trial: Trial) -> str:
    forecast = "two results" if trial.order else "one result"
    return f"{len(trial.computed)} from {forecast}: {trial.figures['psnr']:.1f} dB, {'passes' if trial.passed else 'fails'}"


def _kept(folder: Path) -> str:
    """What a tuned pipeline keeps from step to step."""
    return installed_reuse(site_of(reelquant.open_pipeline(folder)).denoiser)["blocks"].facts["keeps"]


def in_turns(clips: Clips, fast: Path, other: Path | None, runtime: str = "torch") -> str:
    """Ratio of the CPU times of whole clips, median and extremes; the other one is float if no folder is given."""
    ratios = times_in_turns(clips, fast, other, runtime)
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def times_in_turns(clips: Clips, fast: Path, other: Path | None, runtime: str = "torch") -> list[float]:
    """Ratios of the CPU times of whole clips, one for each round of turns; the first round does not count."""
    pipes = [reelquant.open_pipeline(fast), clips.open() if other is None else reelquant.open_pipeline(other)]
    reelquant.configure(pipes[0], runtime=runtime)
    ratios = []
    for number in range(ROUNDS + 1):
        spent = [0.0, 0.0]
        for which in ((0, 1), (1, 0))[number % 2]:
            began = time.process_time()
            sample(pipes[which], clips.prompts[:1], seed=SAMPLING_SEED)
            spent[which] = time.process_time() - began
        if number:
            ratios.append(spent[1] / spent[0])
    return ratios


def main() -> None:
    """Parse the command line, measure what is missing, write the table."""
    made = parser(__doc__)
    made.add_argument("--gate", nargs="*", default=["default"], help="gates to tune for; none to leave tuning out")
    made.add_argument(
        "--shares", type=float, nargs="*", default=SHARES, help="of computed steps, whose rows are measured; none to only tune"
    )
    made.add_argument("--answers", action="store_true", help="measure schedules of whole answers, of a denoiser without a chain of blocks")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    clips, records, folder = Clips(args.pipeline, args.clips, {}, args.batch), Records(args.output / "rows.jsonl"), KEPT
    folder.mkdir(parents=True, exist_ok=True)
    form, make = ("-answers", guided) if args.answers else ("", recorded)
    own = make(reelquant.open_pipeline(quantized(clips, folder)), folder / f"{clips.name}-{RECIPE}{form}.json")
    of_float, steps = make(clips.open(), folder / f"{clips.name}-float{form}.json"), len(own.timesteps)
    known = (whole_answers if args.answers else schedules)(own, of_float)
    labels = {(round(share * steps), label): make(round(share * steps)) for share in SHARES for label, make in known.items()}
    if not args.table:
        asked = {round(share * steps) for share in args.shares}
        run(clips, records, folder, {key: one for key, one in labels.items() if key[0] in asked})
    text = f"{clips.name}, {clips.count} clips, `{RECIPE}`\n\n{table(clips, records, labels, steps)}"
    for gate in () if args.table else args.gate:
        text += f"\n{whole(clips, folder, gate)}"
    (args.output / f"tuned-{clips.name}{form}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
