"""The command line: one file per verb. What a Python user needs too belongs to :mod:`reelquant.api` and the packages below it.

Nothing heavy is imported before a verb runs.

``console`` prints and draws progress bars, ``errors`` makes one line of an error, ``options`` holds what verbs share,
``request`` does the work of ``quantize``, ``tables`` makes the tables, ``layout`` fits them to the screen.
"""

from __future__ import annotations

from typing import Annotated

import typer

from reelquant._plugins import load_plugin
from reelquant._version import __version__
from reelquant.cli.benchmark import benchmark
from reelquant.cli.compare import compare
from reelquant.cli.demo import demo
from reelquant.cli.errors import Verbs
from reelquant.cli.evaluate import evaluate
from reelquant.cli.export import export
from reelquant.cli.generate import generate
from reelquant.cli.inspect import inspect
from reelquant.cli.metrics import metrics, weights
from reelquant.cli.quantize import quantize
from reelquant.cli.ranks import only_first_speaks
from reelquant.cli.recipes import recipes
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
) -> None:
    """Quantize diffusers video pipelines after training, and see that the videos are still good.

    [bold]The way through:[/bold]

    [cyan]reelquant recipes[/cyan]                                   the recipes
    [cyan]reelquant inspect tiny-dit[/cyan]                          look inside
    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 --dry-run[/cyan]   the plan
    [cyan]reelquant quantize tiny-dit -r qvd-w8a8 -o out[/cyan]      the job
    [cyan]reelquant generate out -p "a red circle" -o a.mp4[/cyan]   watch it
    [cyan]reelquant evaluate out --reference tiny-dit[/cyan]         the proof
    [cyan]reelquant benchmark out --reference tiny-dit[/cyan]        the speed
    [cyan]reelquant tune out -o fast[/cyan]                          more speed: blocks skip steps
    [cyan]reelquant export out --format gguf -o out.gguf[/cyan]      the same for other programs
    """
    only_first_speaks(context.invoked_subcommand)
    for name in plugin or ():
        load_plugin(name)


for verb in (demo, quantize, tune, generate, evaluate, compare, benchmark, export, verify, inspect, recipes, metrics, weights):
    app.command()(verb)
