"""``reelquant generate``: a text in, a clip out, from a float or a quantized pipeline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from reelquant._errors import CalibrationError, CheckpointError
from reelquant.cli.options import (
    SEEDS,
    Device,
    Dtype,
    Force,
    Frames,
    Guidance,
    Height,
    Json,
    Model,
    Runtime,
    Steps,
    Width,
    call_options,
    more_help,
    opened,
    run_by,
)

Prompt = Annotated[str, typer.Option("--prompt", "-p", help="What the clip shows.", show_default=False)]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="clip.mp4, clip.gif, or clip.png (a file per frame).", show_default=False),
]
WATCHED = 8  # in one of so many steps, saturation is counted
Seed = Annotated[int, typer.Option("--seed", min=-SEEDS, max=SEEDS, help="Seed of the noise; the same seed gives the same clip.")]
Fps = Annotated[int, typer.Option("--fps", min=1, help="Frames per second of the file.")]


@more_help("""
    [bold]Examples[/bold]

    [cyan]reelquant generate tiny-dit -p "a red circle moving left" -o clip.mp4[/cyan]
    [cyan]reelquant generate out -p "a small blue star spinning" -o clip.gif --seed 3[/cyan]
    [cyan]reelquant generate tiny-unet -p "a green heart growing" -o a.png --steps 30[/cyan]
    [cyan]reelquant generate out -p "a red circle moving left" -o clip.mp4 --runtime openvino[/cyan]

    The model can be a folder that [cyan]reelquant quantize[/cyan] wrote.
""")
def generate(
    model: Model,
    prompt: Prompt,
    output: Output,
    seed: Seed = 0,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    fps: Fps = 8,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    runtime: Runtime = "torch",
    force: Force = False,
    json: Json = False,
) -> None:
    """Sample one clip and write it as MP4, GIF or PNG frames."""
    from reelquant.evidence.media import check_video, frame_paths, write_video

    check_video(output)
    if not prompt.strip() and _takes_prompt(model):
        raise CalibrationError("the prompt is empty; say what the clip shows")
    if not force and (taken := _taken(output, frame_paths(output, 1)[0])):
        raise CheckpointError(f"'{taken}' already exists; choose another name or pass --force to replace it")
    pipe = run_by(opened(model, device, dtype), runtime)
    start = time.perf_counter()
    call = call_options(steps=steps, frames=frames, height=height, width=width, guidance=guidance)
    clip, warning = _sample(pipe, prompt, seed, call)
    seconds = time.perf_counter() - start
    _tell(write_video(clip, output, fps), clip, seconds, json, {"prompt": prompt, "seed": seed, "warning": warning})


def _takes_prompt(model: str) -> bool:
    from reelquant.models.conditions import takes_prompt
    from reelquant.models.pipelines import pipeline_class

    return takes_prompt(pipeline_class(model))


def _taken(output: Path, first_frame: Path) -> Path | None:
    path = first_frame if output.suffix.lower() == ".png" else output
    return path if path.exists() else None


def _sample(pipe: Any, prompt: str, seed: int, call: dict[str, Any]) -> tuple[Any, str | None]:
    """One clip ``[frames, 3, h, w]``, and a warning if it left the calibrated ranges by far; an image counts as a clip of one frame."""
    from reelquant.cli.console import Bars
    from reelquant.discover import denoiser_of
    from reelquant.models.sampling import call_arguments, sample
    from reelquant.nn import Saturation

    seen = Saturation()
    with Bars() as bars, seen.counting(denoiser_of(pipe)[1], lambda step: step % WATCHED == seed % WATCHED):
        bars.phase("sample", call_arguments(pipe, **call).get("num_inference_steps") or 50)
        clip = sample(pipe, [prompt], seed=seed, on_step=bars.advance, **call)[0]
    if not bool(clip.isfinite().all()):
        raise CalibrationError("the clip holds NaN or inf; check the weights, or try --dtype float32")
    return clip if clip.ndim == 4 else clip[None], seen.sentence()


def _tell(files: list[Path], clip: Any, seconds: float, json: bool, given: dict[str, Any]) -> None:
    from reelquant.cli import console

    count, _, height, width = clip.shape
    if json:
        console.emit(given | {"files": files, "frames": count, "height": height, "width": width, "seconds": seconds})
        return
    name = str(files[0]) if len(files) == 1 else f"{files[0]} ... {files[-1].name}"
    console.done(name, f"{count} frames of {width}x{height}, {seconds:.1f} s")
    if given["warning"]:
        console.out.print(f"[yellow]![/yellow] {console.safe(given['warning'])}", soft_wrap=True)
