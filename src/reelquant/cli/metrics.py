"""``reelquant metrics`` and ``reelquant weights``: which figures can be measured, and the networks that they need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelquant.cli.evaluate import Weights
from reelquant.cli.options import Json
from reelquant.cli.signals import keeping

if TYPE_CHECKING:
    from reelquant.evidence.metrics import Metric


def metrics(weights: Weights = None, json: Json = False) -> None:
    """List every metric: what it says, which way is better, and what is missing on this machine.

    [bold]Examples[/bold]

    [cyan]reelquant metrics[/cyan]
    [cyan]reelquant metrics --weights my-weights[/cyan]

    Names and groups go to [cyan]reelquant evaluate -m[/cyan] and [cyan]reelquant compare -m[/cyan]; docs/metrics.md defines each.
    """
    from reelquant.cli import console, layout
    from reelquant.evidence.mechanisms import MECHANISMS, Tools
    from reelquant.evidence.metrics import GROUPS, KINDS, METRICS

    tools = Tools(weights)
    missing = {name: MECHANISMS[name].missing(tools, ["a"]) for name in MECHANISMS if name not in ("clip", "judge")}
    if json:
        console.emit({name: _facts(one) | {"missing": missing.get(one.source)} for name, one in METRICS.items()})
        return
    for kind, words in KINDS.items():
        made = layout.table(f"{kind}: {words}", ["metric", "better", "what it says", "missing"])
        for name, one in METRICS.items():
            if one.kind == kind:
                made.add_row(name, one.better.replace("none", "-"), one.about, missing.get(one.source) or "")
        console.out.print(made)
    console.out.print(layout.facts("Groups", [(name, ", ".join(names)) for name, names in GROUPS.items()]))


def _facts(metric: Metric) -> dict[str, str]:
    return {key: getattr(metric, key) for key in ("title", "kind", "unit", "better", "about")}


Names = Annotated[list[str] | None, typer.Argument(help="i3d, inception, lpips-alex, lpips-vgg, raft, clip, all.")]


def weights(names: Names = None, json: Json = False) -> None:
    """Get the networks that metrics look through, or list which are here.

    [bold]Examples[/bold]

    [cyan]reelquant weights[/cyan]              what is here
    [cyan]reelquant weights i3d[/cyan]          get one
    [cyan]reelquant weights all[/cyan]          get what is missing
    """
    from reelquant._errors import RecipeError, nearest
    from reelquant.cli import console
    from reelquant.evidence.networks.published import WEIGHTS
    from reelquant.evidence.networks.weights import find, whole

    known = {**{name: (name,) for name in (*WEIGHTS, "clip")}, "all": (*WEIGHTS, "clip")}
    for name in names or ():
        if name not in known:
            raise RecipeError(f"unknown weights '{name}'; {nearest(name, known)}")
    wanted = list(dict.fromkeys(one for name in names or () for one in known[name]))
    with keeping(lambda: "networks that are complete are kept: run the same command again"), console.Bars() as bars:
        for name in wanted:
            bars.phase(f"getting {name}", 1)
            _get(name)
    from reelquant.evidence.text import CLIP, kept

    clip = kept(CLIP)
    here: dict[str, Any] = {**{name: find(name, None) for name in WEIGHTS}, "clip": clip if clip.is_dir() else None}
    if json:
        return console.emit({name: path if path is None or name == "clip" or whole(name, path) else None for name, path in here.items()})
    about = {name: f"{one.about} ({one.licence})" for name, one in WEIGHTS.items()} | {"clip": f"{CLIP}, from the hub (MIT)"}
    from reelquant.cli.layout import facts

    console.out.print(facts("Weights", [(name, f"{about[name]}: {_where(name, path)}") for name, path in here.items()]))
    for name, path in here.items():
        if path is not None:
            console.whole(name, path)
    return None


def _get(name: str) -> None:
    from reelquant._errors import CheckpointError
    from reelquant.evidence.networks.download import fetch
    from reelquant.evidence.networks.weights import find, read

    if name == "clip":
        from reelquant.evidence.text import CLIP, fetch_clip

        fetch_clip(CLIP)
        return
    try:
        if (file := find(name, None)) is not None:
            read(name, file)
            return
    except CheckpointError:  # broken: it is replaced
        pass
    fetch(name)


def _where(name: str, path: Path | None) -> str:
    from reelquant.evidence.networks.weights import whole

    if path is not None and name != "clip" and not whole(name, path):
        return f"broken; reelquant weights {name} gets it again"
    return "here" if path else f"not here; reelquant weights {name}"
