"""``reelquant serve``: a page to work with, on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from reelquant.cli.options import more_help
from reelquant.cli.signals import keeping

FolderName = Annotated[str, typer.Argument(metavar="[FOLDER]", help="Where pipelines and evaluations are. No other file is opened.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen on. Others than localhost let other machines in.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 for any free one.")]
OPEN = (
    "reelquant: the page listens on {host}: whoever reaches this machine can start jobs, write into the folder and see what is in it; "
    "there is no password"
)


@more_help("""
    [bold]Examples[/bold]

    [cyan]reelquant serve[/cyan]                      this folder, at http://127.0.0.1:7860
    [cyan]reelquant serve models --port 0[/cyan]      another folder, any free port

    Choose a pipeline, see the plan, quantize, compare clips frame by frame or blind, evaluate. Jobs run one after the other
    in processes of their own; Ctrl-C ends the page, and what had not ended is started again from it. The page asks no
    network. It needs gradio: [cyan]pip install 'reelquant\\[serve]'[/cyan]. docs/serve.md has pictures.
""")
def serve(folder: FolderName = ".", host: Host = "127.0.0.1", port: Port = 7860) -> None:
    """Open a page in the browser: plan, quantize, compare, evaluate, on this machine only."""
    from reelquant.serve.server import LOCAL
    from reelquant.serve.server import serve as run

    if host not in LOCAL:
        typer.echo(OPEN.format(host=host), err=True)

    def tell(address: str) -> None:
        typer.echo(f"reelquant: the page is at {address} (Ctrl-C ends it)")

    with keeping(lambda: "jobs that had not ended can be started again from the page"):
        run(folder, host, port, tell=tell)
