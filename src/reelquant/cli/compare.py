"""``reelquant compare``: one folder of clips against another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reelquant.cli.evaluate import (
    ClipModel,
    Data,
    FailUnder,
    FidFrames,
    Gate,
    Metrics,
    Resume,
    Shown,
    Weights,
    finish,
    listening,
    make_options,
)
from reelquant.cli.options import Device, Force, Json, more_help

Texts = Annotated[
    Path | None,
    typer.Option("--prompts", "--conditions", help="Texts of the clips, in the order of their names.", show_default=False),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for report.html, report.json, summary.md.")]


@more_help("""
    [bold]Examples[/bold]

    [cyan]reelquant compare quantized-clips float-clips[/cyan]
    [cyan]reelquant compare generated real -m fvd,fid,kid --weights weights[/cyan]
    [cyan]reelquant compare after before --gate strict -o proof --json[/cyan]

    Clips of the same name are compared with each other; FVD, FID and KID compare the folders as sets and need no equal
    names.
""")
def compare(
    test: Annotated[Path, typer.Argument(help="Folder of clips under test, paired by name.", show_default=False)],
    reference: Annotated[Path, typer.Argument(help="Folder of clips to compare with.", show_default=False)],
    prompts: Texts = None,
    metrics: Metrics = None,
    output: Output = None,
    weights: Weights = None,
    data: Data = None,
    gate: Gate = None,
    fail_under: FailUnder = None,
    device: Device = "cpu",
    clip_model: ClipModel = None,
    shown: Shown = 12,
    fid_frames: FidFrames = 0,
    resume: Resume = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Measure a folder of clips against another, made by any program: mp4, gif, webm, or numbered pictures."""
    figures = dict(metrics=metrics, gate=gate, fail_under=fail_under, clip_model=clip_model, fid_frames=fid_frames)
    folders = dict(output=output, weights=weights, data=data)
    options = make_options(device=device, resume=resume, force=force, shown=shown, **folders, **figures)
    from reelquant.evidence.run import compare as run

    with listening(options) as heard:
        made = run(test, reference, _texts(prompts, test), options=heard)
    finish(made, json)


def _texts(file: Path | None, folder: Path) -> dict[str, str] | None:
    if file is None:
        return None
    from reelquant._errors import CalibrationError
    from reelquant.evidence.clips import find_clips
    from reelquant.models.prompts import read_prompts

    texts, names = read_prompts(file), list(find_clips(folder))
    if len(texts) != len(names):
        raise CalibrationError(f"'{file}' holds {len(texts)} texts and '{folder}' {len(names)} clips; write one text per clip")
    return dict(zip(names, texts, strict=True))
