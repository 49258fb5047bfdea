"""The command line: one file per verb. What a Python user needs too belongs to :mod:`reelquant.api` and the packages below it.

Nothing heavy is imported before a verb runs.

``console`` prints and draws progress bars, ``errors`` makes one line of an error, ``options`` holds what verbs share,
``lines`` writes progress for programs, ``request`` does the work of ``quantize``, ``tables`` makes the tables, ``layout`` fits them to
the screen.
"""

from __future__ import annotations

from typing import Annotated

import typer

from reelquant._plugins import load_plugin
from reelquant._version import __version__
from reelquant.cli.benchmark import benchmark
from reelquant.cli.compare import compare
from reelquant.cli.demo import demo
from reelquant.cli.drop_blocks import drop_blocks
from reelquant.cli.errors import Verb, Verbs
from reelquant.cli.evaluate import evaluate
from reelquant.cli.export import export
from reelquant.cli.generate import generate
from reelquant.cli.inspect import inspect
from reelquant.cli.metrics import metrics, weights
from reelquant.cli.plan import plan
from reelquant.cli.quantize import quantize
from reelquant.cli.ranks import only_first_speaks
from reelquant.cli.recipes import recipes
from reelquant.cli.sensitivity import sensitivity
from reelquant.cli.serve import serve
from reelquant.cli.tune import tune
from reelquant.cli.verify import verify

app = typer.Typer(
    name="reelquant",
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"reelquant {__version__}")
        raise typer.Exit


@app.callback(epilog="Start with [bold]reelquant demo[/bold]: two minutes, no network, no GPU, and you see what quantization does.")
def main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Before the verb: show tracebacks and what the libraries log."),
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="MODULE", help="Before the verb: import methods of others, a module or a .py file. Repeatable."),
    ] = None,
    progress: Annotated[
        str,
        typer.Option("--progress", help="Before the verb: bars (in a terminal), or json: lines on stderr for programs.", metavar="STYLE"),
    ] = "bars",
) -> None:
    """Quantize diffusers video pipelines after training, and see that the videos are still good.

    [bold]A session, step by step:[/bold]

    [cyan]reelquant recipes[/cyan]                                   list the recipes
    [cyan]reelquant inspect tiny-dit[/cyan]                          look inside
    [cyan]reelquant plan tiny-dit --max-memory 1GB[/cyan]            recipes that fit
    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 --dry-run[/cyan]   what every layer becomes
    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 -o out[/cyan]      quantize
    [cyan]reelquant generate out -p "a red circle" -o a.mp4[/cyan]   make a clip
    [cyan]reelquant evaluate out --reference tiny-dit[/cyan]         compare with float
    [cyan]reelquant benchmark out --reference tiny-dit[/cyan]        measure the speed
    [cyan]reelquant sensitivity tiny-dit -o map[/cyan]               find layers that need bits
    [cyan]reelquant tune out -o fast[/cyan]                          skip blocks at some steps
    [cyan]reelquant drop-blocks tiny-dit -o smaller[/cyan]           remove blocks
    [cyan]reelquant export out --format gguf -o out.gguf[/cyan]      write for other programs
    [cyan]reelquant serve[/cyan]                                     do all of it in a browser
    """
    from reelquant.cli.console import show_progress_as

    only_first_speaks(context.invoked_subcommand)
    show_progress_as(progress)
    for name in plugin or ():
        load_plugin(name)


VERBS = (
    demo, plan, quantize, sensitivity, tune, drop_blocks, generate, evaluate, compare, benchmark, export, verify, inspect, recipes,
    metrics, weights, serve,
)  # fmt: skip
"""In the order of ``--help``."""
for verb in VERBS:
    app.command(cls=Verb)(verb)
