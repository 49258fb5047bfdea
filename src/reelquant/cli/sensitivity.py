"""``reelquant sensitivity``: what rounding each layer does, and budgets divided by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelquant.cli import console
from reelquant.cli.options import (
    ALLOCATORS,
    Device,
    Dtype,
    Force,
    Frames,
    Guidance,
    Height,
    Json,
    Prompts,
    Steps,
    Width,
    call_options,
    check_device,
    conditions,
    more_help,
    one_of,
    recipe_names,
    torch_dtype,
)
from reelquant.recipes.usual import MAPPED

if TYPE_CHECKING:
    from reelquant.allocate import Allocation, SensitivityTable, StepPlan

CLIPS, RANGES = 4, 5
ROWS = 12  # layers that are printed; --all and --json give every one

MapOrModel = Annotated[
    str,
    typer.Argument(
        help="A float pipeline (bundled name, folder, hub id) to measure, or a folder that this verb wrote, to read.", show_default=False
    ),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the table and its picture.", show_default=False)]
BaseRecipe = Annotated[
    str | None,
    typer.Option(
        "--recipe", "-r", help=f"Takes layers, ranges of weights and granularity of inputs from it. Default: {MAPPED}.", show_default=False,
        autocompletion=recipe_names,
    ),
]  # fmt: skip
MeasureBy = Annotated[
    list[str] | None,
    typer.Option(
        "--measure", help="trajectory, gradient or noise; gradient by default. Repeatable.", show_default=False,
        autocompletion=one_of("trajectory", "gradient", "noise"),
    ),
]  # fmt: skip
Formats = Annotated[
    str | None,
    typer.Option("--formats", help="Formats of weights to measure: int3/group-64,int4/group-64,int6/channel.", show_default=False),
]
Inputs = Annotated[
    str | None,
    typer.Option("--inputs", help="Formats of inputs to measure: int4/token,int8/token; none leaves inputs out.", show_default=False),
]
Clips = Annotated[int, typer.Option("--clips", min=1, help="Clips that are sampled.")]
Ranges = Annotated[int, typer.Option("--ranges", min=1, help="Ranges of steps in the map of layers over steps.")]
Configurations = Annotated[int, typer.Option("--configurations", min=0, help="Whole allocations to try out, for --method surrogate.")]
BySteps = Annotated[
    bool, typer.Option("--by-step", help="Sample the clips with every single step rounded, too: for --step-bits, --step-weight-bits.")
]
Components = Annotated[list[str] | None, typer.Option("--component", help="Only this denoiser. Repeatable.", show_default=False)]
Skip = Annotated[list[str] | None, typer.Option("--skip", help="Pattern of layers that stay float. Repeatable.", show_default=False)]
Bits = Annotated[
    float | None, typer.Option("--bits", help="Give layers formats with so many bits per weight on average, like 4.5.", show_default=False)
]
Size = Annotated[
    str | None, typer.Option("--size", help="The same, by the bytes of all quantized weights, like 2.5GB.", show_default=False)
]
StepBits = Annotated[float | None, typer.Option("--step-bits", help="Give steps so many bits of inputs on average.", show_default=False)]
StepWeightBits = Annotated[
    float | None,
    typer.Option(
        "--step-weight-bits", help="Give steps so many bits of weights on average; weights are stored as -r says.", show_default=False
    ),
]
Method = Annotated[
    str,
    typer.Option("--method", help="How bits are divided: milp, greedy, sampled or surrogate.", autocompletion=ALLOCATORS),
]


@more_help("""
    [bold]Examples[/bold]

    [cyan]reelquant sensitivity tiny-dit -o map[/cyan]          measure, by gradients
    [cyan]reelquant sensitivity tiny-dit -o map --measure trajectory[/cyan]
    [cyan]reelquant sensitivity tiny-dit -o steps -r minmax-w8a8 --by-step[/cyan]
    [cyan]reelquant sensitivity map[/cyan]                      read it again
    [cyan]reelquant sensitivity map --bits 4.5[/cyan]           divide: map/recipe.yaml
    [cyan]reelquant sensitivity steps --step-bits 6 --step-weight-bits 6[/cyan]
    [cyan]reelquant quantize tiny-dit -r map/recipe.yaml -o out[/cyan]

    The table is map/sensitivity.json, the picture map/sensitivity.png. A run that was stopped goes on with the same command.

    You may edit the table: "skip": ["proj_out"] keeps layers float, "fixed": {"blocks.0.*": "int8/channel"} gives layers a format.
    Budgets that are divided afterwards follow it.
""")
def sensitivity(
    model: MapOrModel,
    output: Output = None,
    recipe: BaseRecipe = None,
    measure: MeasureBy = None,
    formats: Formats = None,
    inputs: Inputs = None,
    clips: Clips = CLIPS,
    ranges: Ranges = RANGES,
    configurations: Configurations = 0,
    by_step: BySteps = False,
    component: Components = None,
    skip: Skip = None,
    bits: Bits = None,
    size: Size = None,
    step_bits: StepBits = None,
    step_weight_bits: StepWeightBits = None,
    method: Method = "milp",
    everything: Annotated[bool, typer.Option("--all", help="Print every layer.")] = False,
    prompts: Prompts = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    force: Force = False,
    json: Json = False,
) -> None:
    """Measure how much rounding each layer changes the clips, write it as a table, and divide a budget of bits by it."""
    call = call_options(steps=steps, frames=frames, height=height, width=width, guidance=guidance)
    over_steps = {"input": step_bits, "weight": step_weight_bits}
    _check_budgets(bits, size, over_steps, method)
    if not is_table(model):
        _check_model(model, bits, _list(formats))
        _check_recipe(recipe or MAPPED, over_steps)
        if output is None and any(one is not None for one in (bits, size, *over_steps.values())):
            names = "--bits, --size, --step-bits, --step-weight-bits"
            raise typer.BadParameter("the map and the recipe need a folder to lie in: give --output", param_hint=names)
    if is_table(model):
        asked = {
            "--measure": measure, "--inputs": inputs, "--clips": clips != CLIPS, "--ranges": ranges != RANGES, "--by-step": by_step,
            "--configurations": configurations, "--component": component, "--prompts": prompts, "--steps": steps, "--frames": frames,
            "--height": height, "--width": width, "--guidance": guidance,
        }  # fmt: skip
        table, folder = _read(model, [name for name, given in asked.items() if given], skip), output or _folder_of(model)
    else:
        told = dict(
            recipe=recipe or MAPPED, measures=tuple(measure or ("gradient",)), formats=_list(formats), inputs=_list(inputs),
            clips=clips, ranges=ranges, configurations=configurations, components=component, steps=by_step, skip=skip or (),
            step_bits=step_bits, step_weight_bits=step_weight_bits, prompts=conditions(prompts), device=device, force=force,
        )  # fmt: skip
        table, folder = _measure(model, output, dtype, told, call), output
    found, plans = _divided(table, bits, size, over_steps, method, _list(formats))
    written = _recipes(table, folder, recipe, found, plans) if folder is not None and (found or plans) else []
    if json:
        return console.emit(as_data(table, found, plans, written))
    for part in tables(table, found, plans, None if everything else ROWS):
        console.out.print(part)
        console.out.print()
    for number, file in enumerate(written, 1):
        console.done(file, _command(table, written) if number == len(written) else "")
    if folder is not None and not written:
        console.done(folder, "sensitivity.json, sensitivity.png")
    return None


def _check_budgets(bits: float | None, size: str | None, over_steps: Mapping[Any, float | None], method: str) -> None:
    """Refuse budgets that no table meets before hours of measuring.

    Raises:
        RecipeError: for a number that is not positive, a size that is none, or an unknown method.
    """
    from reelquant._errors import RecipeError, nearest
    from reelquant.allocate import METHODS
    from reelquant.streaming import parse_bytes

    if method not in METHODS:
        raise RecipeError(f"unknown method '{method}' of allocation; {nearest(method, METHODS)}")
    if size is not None:
        parse_bytes(size)
    wanted = {"--bits": bits, "--step-bits": over_steps["input"], "--step-weight-bits": over_steps["weight"]}
    for name, value in wanted.items():
        if value is not None and value <= 0:
            raise RecipeError(f"{name} is a number of bits above 0, like 4.5, got {value:g}")


def _check_recipe(recipe: str, over_steps: Mapping[Any, float | None]) -> None:
    """Refuse a budget that the recipe has no bits for, before anything is measured."""
    from reelquant.allocate.step_map import KEYS
    from reelquant.recipes.allocated import with_steps

    if entries := [{KEYS[part]: [int(bits)]} for part, bits in over_steps.items() if bits is not None]:
        with_steps(recipe, entries)


def is_table(model: str) -> bool:
    """Whether this is a folder or file that ``reelquant sensitivity`` wrote, and no pipeline."""
    from reelquant.allocate.table import FILE

    path = Path(model)
    return (path.is_dir() and (path / FILE).is_file() and not (path / "model_index.json").is_file()) or path.suffix == ".json"


def _check_model(model: str, bits: float | None, formats: tuple[str, ...] | None) -> None:
    """Refuse what would be refused after measuring, which takes minutes.

    Raises:
        ReelQuantError: if there is no pipeline, or the budget is below the codes of the smallest format.
    """
    from reelquant._errors import CheckpointError, RecipeError
    from reelquant.allocate.sizes import weight_bits
    from reelquant.allocate.table import FILE
    from reelquant.damage import Wanted
    from reelquant.models.pipelines import locate

    if Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        raise CheckpointError(f"'{model}' holds no pipeline to measure (model_index.json) and no map to read ({FILE})")
    locate(model)
    known = formats or Wanted().formats
    if bits is not None and bits < (least := min(map(weight_bits, known))):
        raise RecipeError(f"--bits {bits:g} is less than the codes of {', '.join(known)} take, {least:g} bits and more with scales")


def _read(model: str, asked: list[str], skip: list[str] | None) -> SensitivityTable:
    """The table of a folder or file; layers to skip are added to its own.

    Args:
        asked: what was asked of a measurement; nothing is measured here.
    """
    from reelquant.allocate import load_table

    if asked:
        raise typer.BadParameter(
            f"'{model}' is a table that was measured already, and is only read, so {', '.join(asked)} would change nothing: name the "
            "pipeline to measure"
        )
    return load_table(model).edited(skip or ())


def _folder_of(model: str) -> Path:
    return Path(model) if Path(model).is_dir() else Path(model).parent


def _measure(model: str, output: Path | None, dtype: str, told: dict[str, Any], call: dict[str, Any]) -> SensitivityTable:
    from reelquant.cli.signals import keeping

    check_device(told["device"])
    number = torch_dtype(dtype)
    console.quiet_loading()
    from reelquant.api import sensitivity as run

    words = f"what was measured is in '{output}': run the same command again to go on" if output is not None else ""
    with keeping(lambda: words), console.Bars() as bars:
        return run(model, output, **told, dtype=number, progress=bars, **call)


def _list(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return () if text == "none" else tuple(part.strip() for part in text.split(","))


def _divided(
    table: SensitivityTable,
    bits: float | None,
    size: str | None,
    over_steps: dict[Any, float | None],
    method: str,
    formats: tuple[str, ...] | None,
) -> tuple[Allocation | None, list[StepPlan]]:
    from reelquant.allocate import allocate, allocate_steps
    from reelquant.streaming import parse_bytes

    found = None
    if bits is not None or size is not None:
        found = allocate(table, bits=bits, nbytes=None if size is None else parse_bytes(size), method=method, formats=formats)
    wanted = [(part, budget) for part, budget in over_steps.items() if budget is not None]
    return found, [allocate_steps(table, budget, name, part=part) for name in table.components for part, budget in wanted]


def _recipes(table: SensitivityTable, folder: Path, base: str | None, found: Allocation | None, plans: list[StepPlan]) -> list[Path]:
    """A recipe for every denoiser, written into the folder of the table."""
    from reelquant.evidence.store import write_text
    from reelquant.recipes.allocated import allocated, recipe_text, with_steps

    made = []
    for name in table.components:
        recipe: Any = base or table.settings.get("recipe") or table.recipe
        if found is not None:
            recipe = allocated(recipe, found.of(name), found.skipped[name])
        mine = [entry for one in plans if one.component == name for entry in one.entries(table)]
        if mine:
            recipe = with_steps(recipe, mine)
        file = folder / ("recipe.yaml" if len(table.components) == 1 else f"recipe-{name}.yaml")
        write_text(file, recipe_text(recipe))
        made.append(file)
    return made


def _command(table: SensitivityTable, written: list[Path]) -> str:
    """What makes a model of the recipes: all of them together."""
    import shlex

    names = [""] if len(written) == 1 else [f"{name}=" for name in table.components]
    recipes = " ".join(f"-r {shlex.quote(f'{name}{file}')}" for name, file in zip(names, written, strict=True))
    return f"reelquant quantize {shlex.quote(table.model)} {recipes} -o out"


def as_data(table: SensitivityTable, found: Allocation | None, plans: list[StepPlan], written: list[Path]) -> dict[str, Any]:
    """What ``--json`` prints."""
    import json
    from dataclasses import asdict

    return {
        "table": json.loads(table.to_text()),
        "allocation": None if found is None else asdict(found) | {"bits": found.bits},
        "steps": [asdict(plan) for plan in plans],
        "recipes": [str(file) for file in written],
    }


def tables(table: SensitivityTable, found: Allocation | None, plans: list[StepPlan], rows: int | None) -> list[Any]:
    """Roles, the most sensitive layers, single steps, and what was divided."""
    from reelquant.cli.sensitivity_tables import allocation_facts, layer_tables, role_table, step_plan_facts, step_tables

    made = [role_table(table), *layer_tables(table, rows), *step_tables(table)]
    made += [allocation_facts(found)] if found is not None else []
    return made + [step_plan_facts(plan) for plan in plans]
