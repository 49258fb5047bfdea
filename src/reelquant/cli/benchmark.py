"""``reelquant benchmark``: how fast a quantized pipeline is on this machine, and how much memory it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from reelquant.cli import console
from reelquant.cli.options import (
    Device,
    Frames,
    Guidance,
    Height,
    Json,
    Prompts,
    QuantizedFolder,
    Reference,
    Runtime,
    Steps,
    Variant,
    Width,
    call_options,
    check_device,
    conditions,
    more_help,
    torch_dtype,
)

if TYPE_CHECKING:
    from rich.table import Table

    from reelquant.evidence.speed import Benchmark


Rounds = Annotated[
    int,
    typer.Option("--rounds", min=1, help="Clips that each pipeline makes, after one to warm up."),
]
OldRounds = Annotated[int | None, typer.Option("-n", min=1, hidden=True)]  # means clips in every other verb
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="What the clips show. Default: one of the pipeline's own."),
]
BothDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Type of both pipelines: float32, bfloat16 or float16. Default: bfloat16, or float32 on processors that only emulate it.",
        show_default=False,
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads; default: those of torch.")]
Compiled = Annotated[bool, typer.Option("--compile", help="Both denoisers go through torch.compile.")]
Memory = Annotated[bool, typer.Option("--memory/--no-memory", help="Also measure peak memory, in a fresh process for each.")]


@more_help("""
    [bold]Examples[/bold]

    [cyan]reelquant benchmark out --reference tiny-dit[/cyan]
    [cyan]reelquant benchmark out --reference tiny-dit --steps 10 --rounds 9 --threads 1[/cyan]
    [cyan]reelquant benchmark out --reference my-folder --dtype float32 --compile --json[/cyan]
    [cyan]reelquant benchmark out --reference tiny-dit --runtime openvino[/cyan]
    [cyan]reelquant benchmark out --reference svd --conditions first.png[/cyan]      the first condition of a file is the clip that is made

    Both pipelines make the same clip in turns: A B, B A, A B ... A speed-up is the ratio of the two times of one round; the table
    shows its median and quartiles. 2x means half the time. Other work on the machine changes times much and ratios little.
""")
def benchmark(
    model: QuantizedFolder,
    reference: Reference = None,
    rounds: Rounds = 5,
    prompt: Prompt = None,
    prompts: Prompts = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: BothDtype = None,
    variant: Variant = None,
    runtime: Runtime = "torch",
    threads: Threads = None,
    compiled: Compiled = False,
    memory: Memory = True,
    json: Json = False,
    old_rounds: OldRounds = None,
) -> None:
    """Time a quantized pipeline against the float one, in turns, on this machine."""
    from reelquant.models.origin import float_original
    from reelquant.models.pipelines import locate

    if old_rounds is not None:
        typer.echo("reelquant: -n of benchmark will go, because it means clips elsewhere; write --rounds", err=True)
        rounds = old_rounds
    first = (conditions(prompts) or [None])[0]
    if first is not None and prompt is not None:
        raise typer.BadParameter("give the text in the file, or no file", param_hint="--prompt")
    kind = None if dtype is None else torch_dtype(dtype)
    reference = reference or float_original(model)
    for name in (model, reference):
        locate(name)
    check_device(device)
    console.quiet_loading()
    how = dict(
        dtype=kind,
        rounds=rounds,
        device=device,
        compiled=compiled,
        runtime=runtime,
        memory=memory,
        variant=variant,
        prompt=prompt if first is None else first,
    )
    call = call_options(steps=steps, frames=frames, height=height, width=width, guidance=guidance)
    made = _measure(model, reference, threads, **how, **call)
    if json:
        console.emit(made.to_json())
        return
    for part in _tables(made):
        console.out.print(part)


def _measure(model: str, reference: str, threads: int | None, **options: object) -> Benchmark:
    import torch

    from reelquant.cli.console import Bars
    from reelquant.evidence.speed import benchmark as run

    if threads is not None:
        torch.set_num_threads(threads)
    with Bars() as bars:
        return run(model, reference, progress=bars, **options)  # type: ignore[arg-type]


def _tables(made: Benchmark) -> list[Table]:
    """Times and memory beside each other, then what computes the layers."""
    from reelquant.cli.layout import facts
    from reelquant.cli.tables import attended_by, computed_by

    data = made.data
    machine = data["machine"]["gpu"] if data["device"] != "cpu" else data["machine"]["cpu"]
    failed = data["peak_memory_failed"]
    how = [
        ("kernels", computed_by(made.kernels, made.simulated)),
        *attended_by(made.attention),
        *(("not the best kernel", f"{reason} ({count} layers)") for reason, count in made.refused.items()),
        *([("peak memory", f"not measured: {failed}")] if failed else []),
        *_slower(made),
        ("machine", f"{machine}, {data['threads']} threads"),
        ("rounds", f"{data['rounds']}, in turns, medians and quartiles"),
    ]
    return [_times(made), facts("How", how)]


def _times(made: Benchmark) -> Table:
    """A row per time and per size, float beside quantized."""
    from reelquant.cli.layout import table

    data = made.data
    title = f"{data['test']['name']} against {data['reference']['name']} in {data['reference']['short']}"
    rows = table(title, ["", "float", "quantized"], ["ratio"])
    times = {"whole clip": (made.seconds, made.speedup), "one step": (made.step_seconds, made.step_speedup)}
    for name, (seconds, ratio) in times.items():
        if ratio is not None:
            words = [f"{seconds[variant].median:.3g} s" for variant in ("reference", "test")]
            spread = f"({ratio.low:.2f} to {ratio.high:.2f})"
            rows.add_row(name, *words, console.marked(f"[bold]{ratio.median:.2f}x as fast[/bold] {spread}"))
    for name, values in {"weights of the denoiser": made.weight_bytes, "peak memory": made.peak_bytes}.items():
        if values:
            share = values["test"] / max(values["reference"], 1)
            sizes = (console.size(values[variant]) for variant in ("reference", "test"))
            rows.add_row(name, *sizes, f"{share:.2f} of it")
    return rows


def _slower(made: Benchmark) -> list[tuple[str, str]]:
    """What would help where a quantized denoiser lost on a processor."""
    ratio = made.step_speedup or made.speedup
    if ratio.median >= 1 or made.data["device"] != "cpu" or made.data["runtime"] != "torch":
        return []
    return [
        (
            "slower than float",
            "small layers take as long to call as to compute; one graph calls none: try --runtime openvino",
        )
    ]
