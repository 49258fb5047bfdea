"""What a job would do, before it starts: the answer of a dry run, and its parts for the page.

This is the seam to whatever plans: :func:`made` runs one command, and :class:`Shown` reads its document. Fields that the document lacks are
left out on the page.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reelquant._errors import CheckpointError
from reelquant._numbers import size
from reelquant.serve import commands
from reelquant.serve.files import read_object
from reelquant.serve.folder import Folder
from reelquant.serve.work import POLL, Launch, reason

ESTIMATE = "estimate"


def made(folder: Folder, start: Launch, form: Mapping[str, Any]) -> dict[str, Any]:
    """The document of the plan. It takes the seconds that a new process and the headers of the model take.

    Args:
        folder: the served one.
        start: starts a process.
        form: as in :func:`~reelquant.serve.commands.quantize`.

    Raises:
        ReelQuantError: if a value of the form is refused, or with what the command says.
    """
    words = commands.plan(folder, form)
    place = folder.own("plans")
    place.mkdir(parents=True, exist_ok=True)
    number = commands.new_number()
    out, err = place / f"{number}.out", place / f"{number}.err"
    try:
        process = start(words, folder.root, out, err)
        while (code := process.poll()) is None:
            time.sleep(POLL)
        found = read_object(out)
        if code != 0 or "error" in found:
            raise CheckpointError(reason(found, err, code))
        return found
    finally:
        for file in (out, err):
            file.unlink(missing_ok=True)


def resumable(document: Mapping[str, Any]) -> bool:
    """Whether the work can be done from disk to disk, so that a stopped run goes on."""
    return bool(document.get(ESTIMATE))


@dataclass(frozen=True)
class Shown:
    """The plan of one component.

    Attributes:
        name: of the component; empty if there is only one.
        title: recipe and class of the model.
        tiles: name, value and remark of the figures on top.
        stages: what is done, and to how many layers.
        layers: name, role, what it becomes, bytes before and after, and whether it stays float.
    """

    name: str
    title: str
    tiles: list[tuple[str, str, str]]
    stages: list[tuple[str, str]]
    layers: list[tuple[str, str, str, str, str, bool]]


def parts(document: Mapping[str, Any]) -> list[Shown]:
    """The plan of every component in a document."""
    takes = document.get(ESTIMATE) or {}
    if "layers" in document:
        return [_part("", document, takes)]
    found = {name: part for name, part in document.items() if name != ESTIMATE and isinstance(part, dict)}
    return [_part(name, part, takes if number == 0 else {}) for number, (name, part) in enumerate(found.items())]


def _part(name: str, found: Mapping[str, Any], takes: Mapping[str, Any]) -> Shown:
    before, after = found["bytes_before"], found["bytes_after"]
    smaller = f"{before / max(after, 1):.2f}x smaller than float32"
    quantized, skipped = found["quantized"], found["skipped"]
    tiles = [
        ("Layers", f"{quantized} of {quantized + skipped}", "become quantized"),
        ("Their size", f"{size(before)} → {size(after)}", smaller),
    ]
    stages = [(f"{one['axis']}: {one['name']}", _touched(one)) for one in found.get("stages") or []]
    return Shown(
        name, f"{found['recipe']} on {found['denoiser']}", [*tiles, *_takes(takes)], stages, [_layer(one) for one in found["layers"]]
    )


def _touched(stage: Mapping[str, Any]) -> str:
    words = f"{stage['layers']} layers" if stage.get("layers") else "all layers"
    return f"{words}; {stage['outlook']}" if stage.get("outlook") else words


def _layer(one: Mapping[str, Any]) -> tuple[str, str, str, str, str, bool]:
    stays = one.get("skipped") is not None
    words = f"float: {one['skipped']}" if stays else f"{one['weight']}, input {one['input'] or 'float'}"
    kernel = f", by {one['kernel']}" if one.get("kernel") else ""
    return one["name"], one["role"], words + kernel, size(one["bytes_before"]), size(one["bytes_after"]), stays


def _takes(takes: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Memory, disk and time; nothing if the work could not be planned from disk."""
    if not takes:
        return []
    streams = bool(takes.get("streams"))
    memory = takes["memory"] if streams else takes["in_memory"]
    seconds = f"about {duration(takes['seconds'])}"
    if takes.get("calls"):
        took = ("Work", f"{takes['calls']:,} calls", f"of the model, and {seconds} of reading, rounding, writing")
    else:
        took = ("Time", seconds, "reading, rounding, writing")
    return [
        ("Memory", size(memory), f"of {size(takes['budget'])}; {'from disk to disk' if streams else 'the whole model fits'}"),
        ("Result", size(takes["result"]), f"the float folder has {size(takes['source'])}"),
        took,
    ]


def duration(seconds: float) -> str:
    """Seconds for people: ``1 s``, ``3 min``, ``2.5 h``."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{max(seconds, 1):.0f} s"
