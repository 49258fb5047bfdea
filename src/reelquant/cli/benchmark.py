"""``reelquant benchmark``: how fast a quantized pipeline is on this machine, and how much memory it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from reelquant.cli.options import Device, Frames, Guidance, Height, Json, Runtime, Steps, Width, call_options

if TYPE_CHECKING:
    from rich.table import Table

    from reelquant.evidence.speed import Benchmark


def benchmark(
    model: Annotated[str, typer.Argument(help="The quantized pipeline's folder.", show_default=False)],
    reference: Annotated[str, typer.Option("--reference", "-r", help="The float pipeline: name, folder or hub id.", show_default=False)],
    rounds: Annotated[int, typer.Option("--rounds", "-n", min=1, help="Clips that each pipeline makes, after one to warm up.")] = 5,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What the clips show. Default: one of the pipeline's own.")] = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of both: float32, bfloat16 or float16. Default: bfloat16, or float32 on "
                                              "processors that only emulate it.", show_default=False)] = None,
    runtime: Runtime = "torch",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads; by default what torch takes.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Both denoisers go through torch.compile.")] = False,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Also measure peak memory, in a fresh process for each.")] = True,
    json: Json = False,
) -> None:  # fmt: skip
    """Time a quantized pipeline against the float one, in turns, on this machine.

    [bold]Examples[/bold]

    [cyan]reelquant benchmark out --reference tiny-dit[/cyan]
    [cyan]reelquant benchmark out -r tiny-dit --steps 10 --rounds 9 --threads 1[/cyan]
    [cyan]reelquant benchmark out -r my-folder --dtype float32 --compile --json[/cyan]
    [cyan]reelquant benchmark out -r tiny-dit --runtime openvino[/cyan]

    Both make the same clip A B, B A, A B ...; a speed-up is a ratio of two times of one round, and the table shows its median and
    quartiles. 2x means half the time. Other work on the machine moves times much and ratios little.
    """
    from reelquant.cli import console
    from reelquant.cli.options import check_device, torch_dtype
    from reelquant.models.pipelines import locate

    kind = None if dtype is None else torch_dtype(dtype)
    for one in (model, reference):
        locate(one)
    check_device(device)
    console.quiet_loading()
    made = _measure(model, reference, kind, threads, rounds=rounds, device=device, compiled=compiled, runtime=runtime, memory=memory,
                    prompt=prompt, **call_options(steps=steps, frames=frames, height=height, width=width, guidance=guidance))  # fmt: skip
    if json:
        console.emit(made.to_json())
        return
    for part in _tables(made):
        console.out.print(part)


def _measure(model: str, reference: str, dtype: object, threads: int | None, **options: object) -> Benchmark:
    import torch

    from reelquant.cli.console import Bars
    from reelquant.evidence.speed import benchmark as run

    if threads is not None:
        torch.set_num_threads(threads)
    with Bars() as bars:
        return run(model, reference, dtype=dtype, progress=bars, **options)  # type: ignore[arg-type]


def _tables(made: Benchmark) -> list[Table]:
    """Times and memory beside each other, then what computes the layers."""
    from reelquant.cli.console import size
    from reelquant.cli.tables import attended_by, computed_by, facts, table

    data = made.data
    times = table(
        f"{data['test']['name']} against {data['reference']['name']} in {data['reference']['short']}", ["", "float", "quantized"], ["ratio"]
    )
    rows = {"whole clip": (made.seconds, made.speedup), "one step": (made.step_seconds, made.step_speedup)}
    for name, (seconds, ratio) in rows.items():
        if ratio is not None:
            words = [f"{seconds[variant].median:.3g} s" for variant in ("reference", "test")]
            times.add_row(name, *words, f"[bold]{ratio.median:.2f}x as fast[/bold] ({ratio.low:.2f} to {ratio.high:.2f})")
    sizes = {"weights of the denoiser": made.weight_bytes, "peak memory": made.peak_bytes}
    for name, values in sizes.items():
        if values:
            share = values["test"] / max(values["reference"], 1)
            times.add_row(name, size(values["reference"]), size(values["test"]), f"{share:.2f} of it")
    why = [("not the best kernel", f"{reason} ({count} layers)") for reason, count in made.refused.items()]
    machine = f"{data['machine']['gpu'] if data['device'] != 'cpu' else data['machine']['cpu']}, {data['threads']} threads"
    why += [("peak memory", f"not measured: {data['peak_memory_failed']}")] if data["peak_memory_failed"] else []
    how = [
        ("kernels", computed_by(made.kernels, made.simulated)),
        *attended_by(made.attention),
        *why,
        *_slower(made),
        ("machine", machine),
        ("rounds", f"{data['rounds']}, in turns, medians and quartiles"),
    ]
    return [times, facts("How", how)]


def _slower(made: Benchmark) -> list[tuple[str, str]]:
    """What would help where a quantized denoiser lost on a processor."""
    ratio = made.step_speedup or made.speedup
    if ratio.median >= 1 or made.data["device"] != "cpu" or made.data["runtime"] != "torch":
        return []
    return [("slower than float", "small layers take as long to call as to compute; one graph calls none: try --runtime openvino")]
