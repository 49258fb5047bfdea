"""``reelquant generate``: texts and pictures in, clips out, from a float or a quantized pipeline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelquant._errors import CalibrationError, CheckpointError
from reelquant.cli.options import (
    Device,
    Dtype,
    Force,
    Frames,
    Guidance,
    Height,
    Json,
    Model,
    Prompts,
    Runtime,
    Steps,
    Variant,
    Width,
    call_options,
    conditions,
    more_help,
    opened,
    run_by,
    seed_within_bounds,
)
from reelquant.cli.signals import keeping

if TYPE_CHECKING:
    from reelquant.models.condition import Condition

Prompt = Annotated[str, typer.Option("--prompt", "-p", help="What the clip shows.", show_default=False)]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="clip.mp4, clip.gif, or clip.png (a file per frame).", show_default=False),
]
WATCHED = 8  # in one of so many steps, saturation is counted
Seed = Annotated[int, typer.Option("--seed", callback=seed_within_bounds, help="Seed of the noise; the same seed gives the same clip.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep the clips that are there and make the others.")]
Fps = Annotated[int, typer.Option("--fps", min=1, help="Frames per second of the file.")]


@more_help("""
    [bold]Examples[/bold]

    [cyan]reelquant generate tiny-dit -p "a red circle moving left" -o clip.mp4[/cyan]
    [cyan]reelquant generate out -p "a small blue star spinning" -o clip.gif --seed 3[/cyan]
    [cyan]reelquant generate tiny-unet -p "a green heart growing" -o a.png --steps 30[/cyan]
    [cyan]reelquant generate out -p "a red circle moving left" -o clip.mp4 --runtime openvino[/cyan]
    [cyan]reelquant generate wan-i2v -p "the dog runs" --conditions dog.png -o clip.mp4[/cyan]
    [cyan]reelquant generate out --conditions clips.jsonl -o clip.mp4[/cyan]      clip-000.mp4, clip-001.mp4 ...

    The model can be a folder that [cyan]reelquant quantize[/cyan] wrote.
""")
def generate(
    model: Model,
    output: Output,
    prompt: Prompt = "",
    prompts: Prompts = None,
    seed: Seed = 0,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    fps: Fps = 8,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    variant: Variant = None,
    runtime: Runtime = "torch",
    resume: Resume = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Sample clips and write each as MP4, GIF or PNG frames: one, or one for every condition of a file."""
    from reelquant.checkpoint import check_writable
    from reelquant.evidence.media import check_video, frame_paths

    check_video(output)
    call = call_options(steps=steps, frames=frames, height=height, width=width, guidance=guidance)
    wanted = _wanted(model, prompt, conditions(prompts), call)
    outputs = [output] if len(wanted) == 1 else frame_paths(output, len(wanted))
    taken = [_taken(one, frame_paths(one, 1)[0]) for one in outputs]
    if any(taken) and not (force or resume):
        found = next(filter(None, taken))
        raise CheckpointError(f"'{found}' already exists; choose another name, pass --force to replace it or --resume to keep it")
    check_writable(output)
    pipe = run_by(opened(model, device, dtype, variant), runtime)
    made = list[dict[str, Any]]()
    with keeping(lambda: _kept(len(made), outputs)):
        for i, (one, path) in enumerate(zip(wanted, outputs, strict=True)):
            if not (resume and taken[i]):
                made.append(_make(pipe, one, seed + i, call, path, fps))
    _tell(made, json)


def _kept(count: int, outputs: list[Path]) -> str:
    """What is said if the command is stopped."""
    return f"{count} of {len(outputs)} clips are in '{outputs[0].absolute().parent}': continue with --resume" if count else ""


def _wanted(model: str, prompt: str, given: list[Condition] | None, call: dict[str, Any]) -> list[Condition]:
    """What the clips are made from; ``prompt`` is the text of those without one.

    Raises:
        CalibrationError: if something is missing, before the pipeline is opened.
    """
    from dataclasses import replace

    from reelquant.models.condition import Condition, as_condition, fitted
    from reelquant.models.conditions import check_given, check_texts, reads_texts
    from reelquant.models.pipelines import locate, pipeline_class
    from reelquant.models.sampling import folder_notes

    kind = pipeline_class(model)
    wanted = [as_condition(one) for one in fitted(kind, given or [Condition(prompt)])]
    if prompt.strip() and all(one.text for one in given or ()) and given:
        raise typer.BadParameter("every condition of the file has a text of its own", param_hint="--prompt")
    wanted = [one if one.text else replace(one, text=prompt) for one in wanted]
    check_texts(kind, [one.text.strip() for one in wanted])
    if reads_texts(kind, call, wanted) and any(not one.text.strip() and not one.inputs for one in wanted):
        raise CalibrationError("the prompt is empty; say what the clip shows")
    check_given(kind, folder_notes(locate(model)).get("call", {}) | call, wanted)
    return wanted


def _taken(output: Path, first_frame: Path) -> Path | None:
    path = first_frame if output.suffix.lower() == ".png" else output
    return path if path.exists() else None


def _make(pipe: Any, condition: Condition, seed: int, call: dict[str, Any], path: Path, fps: int) -> dict[str, Any]:
    """Make one clip and write it; the facts about it."""
    from reelquant.evidence.media import write_video
    from reelquant.models.described import described

    seed = seed if condition.seed is None else condition.seed
    start = time.perf_counter()
    clip, warning = _sample(pipe, condition, seed, call)
    seconds = time.perf_counter() - start
    count, _, height, width = clip.shape
    sizes = {"frames": count, "height": height, "width": width, "seconds": seconds}
    beside = {"conditions": described(dict(condition.inputs))} if condition.inputs else {}
    return {"prompt": condition.text, "seed": seed, "warning": warning} | beside | {"files": write_video(clip, path, fps)} | sizes


def _sample(pipe: Any, condition: Condition, seed: int, call: dict[str, Any]) -> tuple[Any, str | None]:
    """One clip ``[frames, 3, h, w]``, and a warning if it left the calibrated ranges by far; an image counts as a clip of one frame."""
    from reelquant.cli.console import Bars
    from reelquant.discover import denoiser_of
    from reelquant.models.sampling import call_arguments, sample
    from reelquant.nn import Saturation

    seen = Saturation()
    with Bars() as bars, seen.counting(denoiser_of(pipe)[1], lambda step: step % WATCHED == seed % WATCHED):
        bars.phase("sample", call_arguments(pipe, **call).get("num_inference_steps") or 50)
        clip = sample(pipe, [condition], seed=seed, on_step=bars.advance, **call)[0]
    if not bool(clip.isfinite().all()):
        raise CalibrationError("the clip holds NaN or inf; check the weights, or try --dtype float32")
    return clip if clip.ndim == 4 else clip[None], seen.sentence()


def _tell(made: list[dict[str, Any]], json: bool) -> None:
    from reelquant.cli import console

    if json:
        console.emit(made[0] if len(made) == 1 else {"clips": made})
        return
    if not made:
        console.out.print("every clip is there already")
    for one in made:
        files = one["files"]
        name = str(files[0]) if len(files) == 1 else f"{files[0]} ... {files[-1].name}"
        console.done(name, f"{one['frames']} frames of {one['width']}x{one['height']}, {one['seconds']:.1f} s")
        if one["warning"]:
            console.out.print(f"[yellow]![/yellow] {console.safe(one['warning'])}", soft_wrap=True)
