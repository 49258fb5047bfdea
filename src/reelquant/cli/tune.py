"""``reelquant tune``: at which steps the blocks of a quantized pipeline need not be computed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelquant._errors import printable
from reelquant.cli import console
from reelquant.cli.evaluate import Weights
from reelquant.cli.options import (
    Device,
    Dtype,
    Force,
    Frames,
    Guidance,
    Height,
    Json,
    NewFolder,
    Prompts,
    QuantizedFolder,
    Steps,
    Width,
    call_options,
    check_device,
    conditions,
    more_help,
    torch_dtype,
)
from reelquant.cli.ranks import sharing

if TYPE_CHECKING:
    from reelquant.cli.layout import Plain
    from reelquant.tuning import Trial, Tuned

FAILED = 1

TargetSpeedup = Annotated[
    float | None,
    typer.Option(
        "--target-speedup", help="How many times faster a clip has to be, like 1.8: the best schedule that reaches it.", show_default=False
    ),
]
Gate = Annotated[
    str | None,
    typer.Option(
        "--gate", help="strict, default or loose: the fastest schedule that passes. Without any goal: --gate default.",
        show_default=False,
    ),
]  # fmt: skip
MaxLpips = Annotated[
    float | None, typer.Option("--max-lpips", help="The fastest schedule whose LPIPS is at most this, like 0.1.", show_default=False)
]
FailUnder = Annotated[list[str] | None, typer.Option("--fail-under", metavar="METRIC=VALUE", help="A further limit: psnr=30. Repeatable.")]
Clips = Annotated[int, typer.Option("--clips", min=1, help="Clips that every schedule is tried on.")]
Record = Annotated[
    int, typer.Option("--record", min=1, help="Clips that schedules are planned from; each is sampled as many times as it has steps.")
]
Searched = Annotated[
    int,
    typer.Option(
        "--search",
        min=0,
        help="Schedules that are sampled on twice as many clips as --record has, to see which damages to plan with; 0 for none.",
    ),
]
Stretch = Annotated[
    str,
    typer.Option(
        "--stretch",
        metavar="START:END",
        help="Which share of the blocks is reused: 0:1 is all of them; 'answer' is the output of the whole denoiser.",
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        help="The float pipeline: limits then hold for quantization and reuse together, as those of evaluate do. By default they hold for "
        "reuse alone, against clips of MODEL without it.",
        show_default=False,
    ),
]
Component = Annotated[
    str | None,
    typer.Option("--component", help="Which denoiser, where there are several: transformer_2.", show_default=False),
]


@more_help("""
    [bold]Examples[/bold]

    [cyan]reelquant tune out -o fast[/cyan]      the fastest schedule that passes the default gate
    [cyan]reelquant tune out -o fast --target-speedup 1.8[/cyan]
    [cyan]reelquant tune out -o fast --reference tiny-dit --clips 64[/cyan]      the fastest that evaluate passes on these clips
    [cyan]reelquant tune out -o fast --max-lpips 0.1 --fail-under psnr=30[/cyan]
    [cyan]reelquant tune out -o half --component transformer[/cyan]      two experts, one after the other
    [cyan]reelquant tune half -o fast --component transformer_2[/cyan]
    [cyan]reelquant tune out -o fast --steps 30 --clips 16 --prompts texts.txt[/cyan]

    What blocks compute often changes little from one step to the next. At such steps their last result is used again, or a line
    through the last two. Which steps these are depends on the model and on its quantization, so it is measured: a few clips are
    recorded, the schedule of the least error is planned for every number of computed steps, and some schedules are tried on other texts.
    What single steps do may mislead: [cyan]--search[/cyan] schedules are sampled first, and the plan follows what explains them best.

    What was tried is kept in the folder OUTPUT.tuning: clips, figures, curve.png, and recipe.yaml for [cyan]reelquant quantize -r[/cyan].
    A run that was stopped goes on from there.
""")
def tune(
    model: QuantizedFolder,
    output: NewFolder,
    target_speedup: TargetSpeedup = None,
    gate: Gate = None,
    max_lpips: MaxLpips = None,
    fail_under: FailUnder = None,
    reference: Reference = None,
    clips: Clips = 8,
    record: Record = 4,
    search: Searched = 8,
    component: Component = None,
    stretch: Stretch = "0:1",
    prompts: Prompts = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    weights: Weights = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Find the steps at which blocks of a quantized pipeline need not be computed, and write the pipeline with that schedule."""
    from reelquant.models.pipelines import locate

    locate(model)
    check_device(device)
    number = torch_dtype(dtype)
    share = _stretch(stretch)
    wanted = _limits(fail_under or [], max_lpips)
    if target_speedup is not None and gate is not None:
        raise typer.BadParameter("the fastest that passes a gate, or the best that is so fast: give one of them", param_hint="--gate")
    console.quiet_loading()
    from reelquant.api import tune as run

    call = call_options(steps=steps, frames=frames, height=height, width=width, guidance=guidance)
    goal = dict(target_speedup=target_speedup, gate=gate or (None if wanted else "default"), limits=wanted)
    where = dict(
        component=component,
        stretch=share,
        clips=clips,
        record=record,
        search=search,
        prompts=conditions(prompts),
        reference=reference,
        device=device,
        dtype=number,
        weights=weights,
        force=force,
    )
    with _kept(output), console.Bars() as bars:
        made = run(model, output, **goal, **where, shared=sharing(_work(output)), progress=bars, **call)
    if json:
        console.emit(made.to_json())
    else:
        for part in tables(made):
            console.out.print(part)
            console.out.print()
    if made.output is None:
        for reason in _missed(made):
            typer.echo(printable(f"reelquant: no schedule keeps the limits: {reason}"), err=True)
        raise typer.Exit(FAILED)
    if not json:
        console.done(made.output, f"what was tried: {made.work}")


def _kept(output: Path) -> Any:
    """Say after Ctrl-C where the work lies, and how to go on."""
    from reelquant.cli.signals import keeping

    work = _work(output)
    return keeping(lambda: f"what was tried is in '{work}': run the same command again to go on" if work.is_dir() else "")


def _work(output: Path) -> Path:
    """Where what is tried lies."""
    from reelquant.tuning.run import WORK

    return output.with_name(output.name + WORK)


def _stretch(text: str) -> tuple[float, ...]:
    from reelquant._errors import RecipeError

    if text == "answer":
        return ()
    try:
        start, end = (float(one) for one in text.split(":"))
    except ValueError:
        raise RecipeError(f"--stretch takes a start and an end, or 'answer', got '{text}'; for example --stretch 0.25:0.75") from None
    return start, end


def _limits(pairs: list[str], max_lpips: float | None) -> dict[str, float]:
    """Limits by metric; their values are checked where they are used."""
    from reelquant.evidence.gate import parse_limits

    parse_limits(pairs)
    own = {} if max_lpips is None else {"lpips_alex": max_lpips}
    named = (pair.partition("=")[::2] for pair in pairs)
    return {name.strip().lower().replace("-", "_"): float(value) for name, value in named} | own


def _missed(made: Tuned) -> list[str]:
    """What the two gentlest schedules missed."""
    return list(dict.fromkeys(sentence for trial in made.trials[:2] for sentence in trial.failures))


def tables(made: Tuned) -> list[Plain]:
    """What was tried, what was chosen, and where quality falls."""
    from reelquant.cli.layout import facts, table

    rows = table("Schedules that were tried", ["steps", "from the last", "limits"], ["faster", "PSNR", "worst", "motion"])
    for trial in made.trials:
        limits = "kept" if trial.passed else f"{len(trial.failures)} missed"
        results = f"{trial.order + 1} results" if trial.order else "result"
        rows.add_row(_count(trial), results, limits, *_figures(trial), style="bold" if _is(trial, made) else "")
    return [rows, facts("Choice", _choice(made))]


def _is(trial: Trial, made: Tuned) -> bool:
    return made.chosen is not None and (trial.computed, trial.order) == (made.chosen.computed, made.chosen.order)


def _count(trial: Trial) -> str:
    return f"{len(trial.computed)} of {trial.steps}"


def _figures(trial: Trial) -> list[str]:
    motion = trial.figures.get("motion_deviation")
    moved = "-" if motion is None else f"{motion:+.3f}"
    return [f"{trial.speedup:.2f}x", f"{trial.figures['psnr']:.1f} dB", f"{trial.worst:.1f} dB", moved]


def _choice(made: Tuned) -> list[tuple[str, str]]:
    chosen = made.chosen
    found: list[tuple[str, str]] = []
    if chosen is None:
        found.append(("chosen", "nothing: no schedule kept the limits"))
        found += [("missed", sentence) for sentence in _missed(made)]
    else:
        share, steps = len(chosen.computed) / chosen.steps, ", ".join(str(step + 1) for step in chosen.computed)
        found.append(("blocks", f"computed at {_count(chosen)} steps ({share:.0%}): {steps}"))
        found.append(("speed", f"{made.speedup:.2f}x as fast, whole clips in turns; expected {chosen.speedup:.2f}x"))
    if made.reference is not None:
        found.append(("held against", f"{made.reference}: PSNR and limits are those of quantization and reuse together"))
    if made.cliff is not None:
        more, fewer = made.cliff
        drop = more.figures["psnr"] - fewer.figures["psnr"]
        found.append(("cliff", f"from {len(more.computed)} to {len(fewer.computed)} computed steps PSNR falls by {drop:.1f} dB"))
    return found
