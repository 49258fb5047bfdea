"""The words of a job: one function for each kind, from what a form holds to the commands that are run in the served folder.

Values of a form are checked here or by the command line itself; none can become an option of its own, because every value is joined to the
name of its option (``--prompt=...``) or begins with ``./``.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from reelquant._errors import CheckpointError, UnsupportedError
from reelquant.serve.folder import STATE, Folder

COMPARISONS = f"{STATE}/comparisons"
NUMBER = re.compile(r"\d{20}-[0-9a-f]{8}")  # of jobs and comparisons
WEIGHTS = "weights"  # folder of networks for metrics, if the served folder has one
DEVICE = re.compile(r"cpu|mps|cuda(:\d{1,2})?")
DTYPES = ("float32", "bfloat16", "float16")
MEMORY = re.compile(r"\d+(\.\d+)?\s*[kMGT]?B", re.IGNORECASE)
SEEDS = 2**62


@dataclass(frozen=True)
class Work:
    """What a job does.

    Attributes:
        kind: ``quantize``, ``compare`` or ``evaluate``.
        title: for people.
        commands: words of each command, one after the other.
        output: the folder that will appear, relative to the served one.
        form: what the words were made from, complete: a job that is started again makes its words again, because the record of a job
            is a file that came with the folder and must not choose what is run.
    """

    kind: str
    title: str
    commands: list[list[str]]
    output: str
    form: dict[str, Any]


def plan(folder: Folder, form: Mapping[str, Any]) -> list[str]:
    """The command that says what :func:`quantize` would do.

    Raises:
        ReelQuantError: if a value of the form is refused.
    """
    words = _quantize(folder, form)
    if name := str(form.get("name") or ""):
        folder.new(name)  # refused now, not after the plan
    return [*words, "--dry-run", "--json"]


def quantize(folder: Folder, form: Mapping[str, Any], *, again: bool = False) -> Work:
    """Quantize a float model.

    Args:
        folder: the served one.
        form: ``model``, ``recipe``, ``name`` of the new folder (empty: one is made), ``device``, ``dtype``, ``max_memory``, and
            ``resumable``: whether the plan could be made from disk, so that the work is kept when it is stopped.
        again: the job was begun before.

    Raises:
        ReelQuantError: if a value of the form is refused.
    """
    words = _quantize(folder, form)
    model, recipe = str(form["model"]), str(form["recipe"])
    name = folder.new(str(form.get("name") or "") or folder.free(f"{plain(model)}-{plain(recipe)}"), again=again)
    end = [f"--output=./{name}", "--json", *(["--resume"] if form.get("resumable") else [])]
    return Work("quantize", f"{shown(model)} with {shown(recipe)}", [[*words, *end]], name, dict(form) | {"name": name})


def _quantize(folder: Folder, form: Mapping[str, Any]) -> list[str]:
    model = folder.model(str(form["model"]), quantized=False).name
    words = ["quantize", model, f"--recipe={folder.recipe(str(form['recipe']))}", *_machine(form)]
    if memory := str(form.get("max_memory") or "").strip():
        if not MEMORY.fullmatch(memory):
            raise UnsupportedError(f"'{memory:.40}' is not an amount of memory; give one like 8GB or 500MB")
        words.append(f"--max-memory={memory}")
    return words


def compare(folder: Folder, form: Mapping[str, Any], *, again: bool = False) -> Work:
    """Make the same clip with a float and a quantized model.

    Args:
        folder: the served one.
        form: ``float``, ``quantized``, ``prompt``, ``seed``, ``steps`` (empty: what the pipeline recommends), ``device``, ``dtype``, and
            ``number`` of the comparison, which names its folder.
        again: the job was begun before; its frames are replaced either way.

    Raises:
        ReelQuantError: if a value of the form is refused.
    """
    sides = {"float": folder.model(str(form["float"])).name, "quantized": folder.model(str(form["quantized"]), quantized=True).name}
    prompt, seed = str(form.get("prompt") or ""), whole("seed", form.get("seed") or 0, -SEEDS, SEEDS)
    place = f"{COMPARISONS}/{checked(form['number'])}"
    clip = [f"--prompt={prompt}", f"--seed={seed}", *_steps(form), *_machine(form), "--force", "--json"]
    commands = [["generate", model, f"--output=./{place}/{side}.png", *clip] for side, model in sides.items()]
    return Work("compare", f"{shown(sides['quantized'])} beside {shown(sides['float'])}", commands, place, dict(form) | {"seed": seed})


def evaluate(folder: Folder, form: Mapping[str, Any], *, again: bool = False) -> Work:
    """Evaluate a quantized model against a float one.

    Args:
        folder: the served one.
        form: ``float``, ``quantized``, ``clips``, ``steps``, ``gate`` (empty: none), ``metrics``, ``name`` of the new folder, ``device``,
            ``dtype``.
        again: the job was begun before, and its folder may be there.

    Raises:
        ReelQuantError: if a value of the form is refused.
    """
    test, reference = folder.model(str(form["quantized"]), quantized=True).name, folder.model(str(form["float"])).name
    name = folder.new(str(form.get("name") or "") or folder.free(f"{plain(test)}-evaluation"), again=again)
    clips, metrics, gate = whole("clips", form.get("clips") or 8, 1, 100_000), str(form.get("metrics") or "quick"), form.get("gate")
    words = ["evaluate", test, f"--reference={reference}", f"--clips={clips}", f"--metrics={metrics}", f"--output=./{name}"]
    words += [f"--gate={gate}"] if gate else []
    words += [f"--weights=./{WEIGHTS}"] if (folder.root / WEIGHTS).is_dir() and folder.tree(WEIGHTS) else []
    command = [*words, *_steps(form), *_machine(form), "--resume", "--json"]
    return Work("evaluate", f"{shown(test)} against {shown(reference)}", [command], name, dict(form) | {"name": name})


WORKS: dict[str, Callable[..., Work]] = {"quantize": quantize, "compare": compare, "evaluate": evaluate}


def _machine(form: Mapping[str, Any]) -> list[str]:
    device, dtype = str(form.get("device") or "cpu"), str(form.get("dtype") or "float32")
    if not DEVICE.fullmatch(device):
        raise UnsupportedError(f"'{device:.40}' is not a device; give cpu, cuda, cuda:1 or mps")
    if dtype not in DTYPES:
        raise UnsupportedError(f"'{dtype:.40}' is not a type of the float parts; give one of {', '.join(DTYPES)}")
    return [f"--device={device}", f"--dtype={dtype}"]


def _steps(form: Mapping[str, Any]) -> list[str]:
    return [f"--steps={whole('steps', form['steps'], 1, 10_000)}"] if form.get("steps") else []


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number within bounds.

    Raises:
        UnsupportedError: if it is none, or beyond them.
    """
    try:
        number = int(value)
        fits = number == float(value) and low <= number <= high
    except (TypeError, ValueError, OverflowError):
        fits, number = False, 0
    if not fits:
        raise UnsupportedError(f"{name} is a whole number from {low} to {high}, got {value!r:.60}")
    return number


def new_number() -> str:
    """A name for a job or comparison that sorts by time."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return f"{time.strftime('%Y%m%d%H%M%S', time.localtime(seconds))}{nanoseconds // 1000:06d}-{secrets.token_hex(4)}"


def checked(number: Any) -> str:
    """The number, if it is one: it becomes a part of paths.

    Raises:
        CheckpointError: if it is not.
    """
    if not isinstance(number, str) or not NUMBER.fullmatch(number):
        raise CheckpointError(f"no job or comparison '{number!s:.60}'")
    return number


def plain(name: str) -> str:
    """The last part of a name, for the name of a folder."""
    last = name.rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml")
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"


def shown(name: str) -> str:
    """The name of a model or recipe, for people."""
    return name.removeprefix("./")
