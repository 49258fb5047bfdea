"""``reelquant recipes``: the list of recipes, and what one of them does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reelquant.cli.options import BUNDLED, Json, recipe_names

For = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="Which roles of a pipeline's layers are sensitive: a pipeline, or its table.",
        show_default=False,
        autocompletion=BUNDLED,
    ),
]
Yaml = Annotated[bool, typer.Option("--yaml", help="Print the YAML of one recipe and nothing else.")]

if TYPE_CHECKING:
    from rich.table import Table

    from reelquant.recipes.recipe import Recipe, Rule, TensorRecipe


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="One recipe, by name or as a YAML file; all if left out.", show_default=False, autocompletion=recipe_names),
    ] = None,
    model: For = None,
    yaml: Yaml = False,
    json: Json = False,
) -> None:
    """List the recipes, or explain one and print its YAML.

    [bold]Examples[/bold]

    [cyan]reelquant recipes[/cyan]
    [cyan]reelquant recipes qvd-w8a8[/cyan]
    [cyan]reelquant recipes qvd-w8a8 --yaml > my.yaml[/cyan]        a start of your own
    [cyan]reelquant recipes my.yaml[/cyan]        also checks the file: unknown keys are errors
    [cyan]reelquant recipes --for tiny-dit[/cyan]        which roles of layers need bits
    [cyan]reelquant recipes --for map[/cyan]        the same by its own table, a folder that reelquant sensitivity wrote

    What [cyan]--yaml[/cyan] prints is a file for [cyan]quantize --recipe[/cyan]; docs/adding-a-method.md explains every key.
    """
    from reelquant.cli import console
    from reelquant.recipes.recipe import load_recipe, names

    if model is not None:
        if name is not None or yaml:
            raise typer.BadParameter("it is about a model; leave out the recipe and --yaml", param_hint="--for")
        from reelquant.cli.recipes_for import show

        return show(model, json)
    if yaml and (name is None or json):
        raise typer.BadParameter("name one recipe, and leave out --json", param_hint="--yaml")
    if name is None:
        found = [load_recipe(one) for one in names()]
        if json:
            return console.emit([{"name": r.name, "summary": r.summary, "paper": r.paper, "needs_data": not r.data_free} for r in found])
        return console.out.print(_all(found))
    recipe = load_recipe(name)
    if yaml:
        return typer.echo(_alone(name), nl=False)
    if json:
        return console.emit(recipe.model_dump(mode="json", exclude_unset=True) | {"digest": recipe.digest()})
    return _one(name, recipe)


def _all(found: list[Recipe]) -> Table:
    from rich.text import Text

    from reelquant.cli.layout import table

    made = table("Recipes", ["name", "what it does", "paper", "data"])
    for recipe in found:
        made.add_row(
            Text(recipe.name, "cyan"),
            recipe.summary,
            recipe.paper or "",
            "none" if recipe.data_free else "prompts",
        )
    return made


def _one(source: str, recipe: Recipe) -> None:
    from rich.syntax import Syntax

    from reelquant.cli import console
    from reelquant.cli.layout import facts

    console.out.print(facts(recipe.name, explain(recipe)))
    console.out.print()
    console.out.print(Syntax("", "yaml", background_color="default").highlight(_text(source)), soft_wrap=True, end="")


def _text(source: str) -> str:
    """The file of a recipe, with everything spelled out that a terminal obeys."""
    from importlib import resources

    from reelquant._errors import printable
    from reelquant.recipes.recipe import names

    file = resources.files("reelquant.recipes").joinpath("library", f"{source}.yaml") if source in names() else Path(source)
    return printable(file.read_text(encoding="utf-8"))


def _alone(source: str) -> str:
    """YAML that gives the same recipe wherever it lies: the file with its comments, or merged with a parent that lies beside it."""
    import yaml

    from reelquant.recipes.recipe import load_recipe, names

    found = yaml.safe_load(text := _text(source))
    if found.get("extends") is None or found["extends"] in names():
        return text
    data = load_recipe(source).model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def explain(recipe: Recipe) -> list[tuple[str, str]]:
    """A recipe as pairs of topic and explanation: weights, inputs, rules, steps in order, data."""
    from reelquant.cli.tables import stage_words

    told = {"summary": recipe.summary, "paper": recipe.paper, "ours": recipe.ours}
    rows = [(topic, text) for topic, text in told.items() if text]
    rows += [("weights", _tensor(recipe.defaults.weight)), ("inputs", _tensor(recipe.defaults.input))]
    for rule in recipe.rules:
        rows.append(("except", f"{rule.on} {_fate(rule)}"))
    rows += [(f"step {number}", stage_words(entry)) for number, entry in enumerate(recipe.entries, 1)]
    return [*rows, ("data", _data(recipe)), ("digest", recipe.digest())]


def _fate(rule: Rule) -> str:
    """What a rule does to its layers."""
    if rule.skip:
        return f"skipped, stay float: {rule.because or 'the rule says so'}"
    changed = [part for part in ("weight", "input") if part in rule.model_fields_set]
    return "; ".join(f"{part} {_tensor(getattr(rule, part))}" for part in changed)


def _tensor(recipe: TensorRecipe | None) -> str:
    if recipe is None:
        return "stay float"
    formats = [recipe.format] if isinstance(recipe.format, str) else recipe.format
    found = recipe.range if isinstance(recipe.range, str) else " ".join(str(value) for value in recipe.range.values())
    shared = "a scale per " + recipe.granularity if recipe.granularity != "tensor" else "one scale"
    shared += "" if recipe.scale == "float" else f" ({recipe.scale})"
    when = ", found at run time" if recipe.dynamic else ""
    slots = ", per denoising step" if recipe.slots == "per_step" else ""
    return f"{' or '.join(formats)}, {shared}, range by {found}{when}{slots}"


def _data(recipe: Recipe) -> str:
    if recipe.calibrate is None:
        return "none needed"
    steps = f"{recipe.calibrate.steps} steps" if recipe.calibrate.steps else "the pipeline's usual steps"
    probes = f" and {recipe.calibrate.probe_count} probes of random words" if recipe.calibrate.probe_count else ""
    own = f"{recipe.calibrate.prompts} prompts{probes}, {steps}, seed {recipe.calibrate.seed}"
    return f"{own}; {recipe.search.prompts} more are held out for choices and the final check"
