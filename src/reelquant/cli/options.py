"""Options that several verbs share, and what they mean."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from reelquant._errors import RecipeError, UnsupportedError, nearest
from reelquant.cli.ranks import of_this_process

if TYPE_CHECKING:
    from reelquant.models.condition import Condition
SEEDS = 2**62  # clips count on from the first one, within 64 bits
DTYPES = ("float32", "bfloat16", "float16")


def one_of(*names: str) -> Callable[[str], list[str]]:
    """Completion of a value in the shell: one of some names. What begins like none of them is completed as a file."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def seed_within_bounds(value: int | None) -> int | None:
    """Refuse a seed after which clips could not be counted within 64 bits.

    Raises:
        typer.BadParameter: with the bounds.
    """
    if value is not None and abs(value) > SEEDS:
        raise typer.BadParameter(f"give a number from -{SEEDS} to {SEEDS}, got {value}")
    return value


def recipe_names(incomplete: str) -> list[str]:
    """Completion of a recipe."""
    from reelquant.recipes.text import names

    return one_of(*names())(incomplete)


BUNDLED, GATES = one_of("tiny-dit", "tiny-unet"), one_of("strict", "default", "loose")
ALLOCATORS = one_of("milp", "greedy", "sampled", "surrogate")
MODEL = typer.Argument(
    help="A bundled pipeline (tiny-dit, tiny-unet), a folder, a hub id (owner/name), or FILE@PIPELINE: "
    "its denoiser from a .safetensors or .gguf file.",
    show_default=False,
    autocompletion=BUNDLED,
)
Model = Annotated[str, MODEL]
QuantizedFolder = Annotated[str, typer.Argument(help="The quantized pipeline's folder.", show_default=False)]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        help="The float pipeline: name, folder, hub id or FILE@PIPELINE. Default: what it was quantized from.",
        show_default=False,
        autocompletion=BUNDLED,
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", help="cpu, cuda, cuda:1, mps ...; cuda is a GPU for each of several processes.", callback=of_this_process),
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Type of the float parts: float32, bfloat16 or float16.", autocompletion=one_of(*DTYPES))
]
Variant = Annotated[
    str | None,
    typer.Option("--variant", help="Which weight files, for example fp16, if a folder or hub id has several kinds.", show_default=False),
]
Runtime = Annotated[
    str,
    typer.Option(
        "--runtime",
        help="What runs quantized denoisers: torch, or openvino (one graph, on processors).",
        autocompletion=one_of("torch", "openvino"),
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Denoising steps; by default what the pipeline recommends."),
]
Frames = Annotated[int | None, typer.Option("--frames", min=1, help="Frames of a clip.")]
Height = Annotated[int | None, typer.Option("--height", min=1, help="Pixels.")]
Width = Annotated[int | None, typer.Option("--width", min=1, help="Pixels.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Guidance scale; 1 switches guidance off.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        "--conditions",
        help="What clips are made from: a text per line; .jsonl, .json, .yaml, .csv or .tsv with prompt, image, last_image, video, mask, "
        "class_labels ...; or a folder of pictures, each with its .txt.",
        show_default=False,
    ),
]
NEW_FOLDER = typer.Option("--output", "-o", help="Folder to write; it must not exist yet.", show_default=False)
NewFolder = Annotated[Path, NEW_FOLDER]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output once the new one is complete.")]

Verb = TypeVar("Verb", bound=Callable[..., None])


def more_help(text: str) -> Callable[[Verb], Verb]:
    """Append examples and notes to a verb's help, below the sentence of its docstring.

    Commands keep their lines; the lines of a note are joined, because typer would print every line break.
    """

    blocks = inspect.cleandoc(text).split("\n\n")
    whole = "\n\n".join(block if block.startswith("[cyan]") else " ".join(block.split("\n")) for block in blocks)

    def append(verb: Verb) -> Verb:
        verb.__doc__ = f"{inspect.cleandoc(verb.__doc__ or '')}\n\n{whole}"
        return verb

    return append


def opened(model: str, device: str = "cpu", dtype: str = "float32", variant: str | None = None) -> Any:
    """Open a pipeline where and how the options say.

    Raises:
        UnsupportedError: for an unknown dtype or a device that is not here.
        CheckpointError: if the pipeline cannot be opened.
    """
    _check_dtype(dtype)
    from reelquant.models.pipelines import locate

    locate(model)  # before the slow imports
    from reelquant.api import open_pipeline
    from reelquant.cli.console import quiet_loading

    check_device(device)
    quiet_loading()
    return open_pipeline(model, dtype=torch_dtype(dtype), device=device, variant=variant)


def run_by(pipe: Any, runtime: str) -> Any:
    """The pipeline with its quantized denoisers on a runtime.

    Raises:
        ReelQuantError: if the runtime is unknown, or cannot run any part of this pipeline.
    """
    from reelquant.api import configure

    if runtime != "torch":
        configure(pipe, runtime=runtime)
    return pipe


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UnsupportedError(f"unknown dtype '{dtype}'; {nearest(dtype, DTYPES)}")


def torch_dtype(name: str) -> Any:
    """The dtype of torch with that name.

    Raises:
        UnsupportedError: for an unknown one.
    """
    _check_dtype(name)
    import torch

    return getattr(torch, name)


def check_device(device: str) -> None:
    """Refuse devices that torch does not know or that this machine lacks.

    Raises:
        UnsupportedError: naming the devices that work.
    """
    import torch

    here = [
        "cpu",
        *(["cuda"] if torch.cuda.is_available() else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
    ]
    if device.split(":")[0] not in here:
        raise UnsupportedError(f"no device '{device}' on this machine; it has {', '.join(here)}")
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)


def conditions(file: Path | None) -> list[Condition] | None:
    """What a file of conditions holds; None without one.

    Raises:
        CalibrationError: if it cannot be read.
    """
    if file is None:
        return None
    from reelquant.models.prompts import load_conditions

    return load_conditions(file)


def call_options(**given: Any) -> dict[str, Any]:
    """Arguments of the pipeline call from options: those that were given, by the names diffusers uses."""
    names = {"steps": "num_inference_steps", "frames": "num_frames", "guidance": "guidance_scale"}
    return {names.get(key, key): value for key, value in given.items() if value is not None}


def settings(pairs: list[str]) -> dict[str, Any]:
    """``["calibrate.steps=10", "defaults.weight.format=int4"]`` as overrides; values are YAML.

    Raises:
        RecipeError: for a pair without ``=`` or a value that is not YAML.
    """
    from reelquant.recipes.recipe import parse_value

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set takes key=value, got '{pair}'; for example --set calibrate.steps=10")
        try:
            found[key.strip()] = parse_value(value)
        except RecipeError:
            raise RecipeError(f"--set {key.strip()}: '{value}' is not a YAML value; quote it or write a list like [0.5, 1.0]") from None
    return found
