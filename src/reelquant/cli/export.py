"""``reelquant export``: a quantized folder in the format of another project."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reelquant.cli.options import Force, Json, more_help, one_of

if TYPE_CHECKING:
    from rich.table import Table

    from reelquant.checkpoint.export import Exported, Outcome


FORMATS = one_of("comfyui", "gguf", "torchao")
Folder = Annotated[str, typer.Argument(help="A folder that `reelquant quantize` wrote.", show_default=False)]
Format = Annotated[str, typer.Option("--format", "-f", help="comfyui, gguf or torchao.", show_default=False, autocompletion=FORMATS)]
Output = Annotated[Path, typer.Option("--output", "-o", help="File to write; a folder for torchao.", show_default=False)]
Type = Annotated[
    str | None,
    typer.Option(
        "--type",
        "-t",
        help="int8, fp8, scaled_fp8, Q8_0, Q4_0, Q4_1 or Q4_K for all layers; by default the type that keeps the codes.",
    ),
]
Component = Annotated[
    str | None,
    typer.Option("--component", help="Which denoiser, if there are several.", show_default=False),
]


@more_help("""
    [bold]Examples[/bold]

    [cyan]reelquant export out --format comfyui -o wan-int8.safetensors[/cyan]
    [cyan]reelquant export out --format gguf -o wan-q4.gguf[/cyan]
    [cyan]reelquant export out --format torchao -o out-torchao[/cyan]          a whole pipeline

    Codes are carried over unchanged where the format holds them. The table says what was rounded a second time and how
    far it moved, what is written as floats, and what was left out (ranges of inputs, tables). docs/exporters.md has the
    details.
""")
def export(
    folder: Folder,
    format: Format,
    output: Output,
    type: Type = None,
    component: Component = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a quantized denoiser for ComfyUI, for readers of GGUF, or for stock diffusers with torchao."""
    from reelquant import api
    from reelquant.checkpoint import check_writable
    from reelquant.cli import console

    check_writable(output)
    console.quiet_loading()
    with console.Bars() as bars:
        made = api.export(folder, format, output, type=type, component=component, force=force, progress=bars)
    if json:
        console.emit(made.to_json())
        return
    for part in _tables(made):
        console.out.print(part)
        console.out.print()
    console.whole("opens with", made.opens_with)
    console.done(made.path)


def _tables(made: Exported) -> list[Table]:
    from reelquant.checkpoint.export import FATES
    from reelquant.cli.console import marked, size
    from reelquant.cli.layout import facts, table

    layers = table(
        f"{', '.join(made.components)} for {made.format}",
        ["", "was", "becomes"],
        ["layers", "before", "after", "largest error"],
    )
    for (fate, was, becomes), outcomes in _alike(made.layers).items():
        error = max(outcome.error for outcome in outcomes)
        sizes = (size(sum(getattr(outcome, name) for outcome in outcomes)) for name in ("bytes_before", "bytes_after"))
        layers.add_row(fate, was, becomes, str(len(outcomes)), *sizes, f"{error:.1e}" if error else "0")
    layers.add_section()
    layers.add_row(marked("[bold]all"), "", "", str(len(made.layers)), size(made.bytes_before), size(made.bytes_after), "")
    layers.caption = "; ".join(f"{fate}: {words}" for fate, words in FATES.items()) + ". error: of the weight, over its square"
    why: dict[str, list[Outcome]] = {}
    for outcome in made.layers:
        if outcome.why:
            why.setdefault(f"{outcome.fate}: {outcome.why}", []).append(outcome)
    notes = [
        *((reason, _some([outcome.name for outcome in outcomes])) for reason, outcomes in why.items()),
        *((f"left behind: {what}", _some(names)) for what, names in made.left_behind.items()),
        ("names of tensors", made.names),
    ]
    told = facts("What differs", notes)
    return [layers, told]


def _alike(outcomes: list[Outcome]) -> dict[tuple[str, str, str], list[Outcome]]:
    """Layers of one fate and the same numbers, the most numerous fates as they come."""
    found: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.fate == "float"):
        found.setdefault((outcome.fate, outcome.was, outcome.becomes), []).append(outcome)
    return found


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:2])
    return f"{len(names)} layers: {shown}{' ...' if len(names) > 2 else ''}"
