"""``reelquant recipes``: the list of recipes, and what one of them does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reelquant.cli.options import Json

if TYPE_CHECKING:
    from rich.table import Table

    from reelquant.recipes.recipe import Recipe, Rule, TensorRecipe


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="One recipe, by name or as a YAML file; all if left out.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """List the recipes, or explain one and print its YAML.

    [bold]Examples[/bold]

    [cyan]reelquant recipes[/cyan]
    [cyan]reelquant recipes qvd-w8a8[/cyan]
    [cyan]reelquant recipes my.yaml[/cyan]        also checks the file: unknown keys are errors

    To write your own, start from a printed one; docs/adding-a-method.md explains every key.
    """
    from reelquant.cli import console
    from reelquant.recipes.recipe import load_recipe, names

    if name is None:
        found = [load_recipe(one) for one in names()]
        if json:
            return console.emit([{"name": r.name, "summary": r.summary, "paper": r.paper, "needs_data": not r.data_free} for r in found])
        return console.out.print(_all(found))
    recipe = load_recipe(name)
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
    from importlib import resources

    from rich.syntax import Syntax

    from reelquant._errors import printable
    from reelquant.cli import console
    from reelquant.cli.layout import facts
    from reelquant.recipes.recipe import names

    file = resources.files("reelquant.recipes").joinpath("library", f"{source}.yaml") if source in names() else Path(source)
    console.out.print(facts(recipe.name, explain(recipe)))
    console.out.print()
    console.out.print(Syntax(printable(file.read_text(encoding="utf-8")), "yaml", background_color="default", word_wrap=True))


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
