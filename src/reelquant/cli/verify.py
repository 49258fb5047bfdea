"""``reelquant verify``: is a folder still what was written?"""

from __future__ import annotations

from typing import Annotated

import typer

from reelquant.cli.options import Json, more_help

Folder = Annotated[str, typer.Argument(help="A folder that `reelquant quantize` or reelquant.save wrote.", show_default=False)]
Renew = Annotated[bool, typer.Option("--renew", help="Take the files as they are: you changed them on purpose.")]


@more_help("""
    [bold]Examples[/bold]

    [cyan]reelquant verify out[/cyan]
    [cyan]reelquant verify out --renew[/cyan]      after you have exchanged its scheduler

    Every file is compared with its SHA-256 sum in reelquant-checksums.json, every quantized layer with the sums in its
    config.json. Opening a folder does the first of these by itself. Nothing is run.
""")
def verify(folder: Folder, renew: Renew = False, json: Json = False) -> None:
    """Compare every byte of a saved folder with what was written."""
    from reelquant import api
    from reelquant._errors import printable
    from reelquant.cli import console

    found = api.verify(folder, renew=renew)
    if json:
        return console.emit(found.to_json())
    where, layers = printable(str(found.folder)), f"{found.layers} quantized layers"
    if not found.files:
        return typer.echo(f"{where} has no sums of its files; {layers} have the values they were given")
    words = "has new sums" if found.renewed else "is what was written"
    return typer.echo(f"{where} {words}: {found.files} files, {console.size(found.bytes)}, {layers}")
