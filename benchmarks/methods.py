"""The page of methods: every recipe of the library, what it does, what is ours, and what was measured with it.

Run it from the repository root::

    python -m benchmarks.methods

It writes ``docs/methods.md`` from the recipes and from the rows in ``benchmarks/results/rows.jsonl``. A figure stands there only if it was
measured with the recipe as it is today.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import Records, markdown
from reelquant.recipes.recipe import Recipe, load_recipe, names

PIPELINES = ("tiny-dit", "tiny-unet", "tiny-ltx")
PAGE, ROWS = Path("docs/methods.md"), Path("benchmarks/results/rows.jsonl")
DIVIDED, LEFT_OUT = Path("benchmarks/results"), Path("benchmarks/results/left-out.md")
OTHER = ("trust", "first frame")  # rows of other calibrations and conditions; calibrated as usual counts
START = """# Methods

Every recipe of the library: the paper it comes from, its mechanisms, and its figures on pipelines of this repository. The recipes are
YAML files in `src/reelquant/recipes/library/`; `reelquant recipes NAME` explains one. [adding-a-method.md](adding-a-method.md) says how to
write another.

This page is written by `python -m benchmarks.methods`. Figures are mean PSNR to the float pipeline in dB, the worst clip, and how many
clips: captions and noise that nothing was calibrated on. They were measured with the recipes as they are; a dash says that it was not
measured. 16 clips tell rows apart that are 3 to 4 dB apart, 64 clips rows that are 1 to 2 dB apart. *simulated* means that no kernel
multiplies these numbers: quality is real, speed is not.
"""


BITS = """## Methods that divide bits

Methods that say which layer gets which bits measure and allocate ([sensitivity.md](sensitivity.md)); the recipes `mixed-w4.5a8`,
`mixed-formats` and `qua2-w3.5` have one of them inside. What their papers claim is held against ours, with weights rounded to nearest and
float inputs (`python -m benchmarks.sensitivity_rows`).
"""

WORK = """## Methods that leave out work

What we expect of published methods that compute less (blocks, attention, sizes, weights), and what was found (`python -m
benchmarks.left_out`). Gains are clip by clip, with 95 % intervals; more of each is in [reuse.md](reuse.md),
[resolution.md](resolution.md) and [removal.md](removal.md).
"""


def numbers(recipe: Recipe) -> str:
    """Formats of most weights and inputs."""
    sides = (recipe.defaults.weight, recipe.defaults.input)
    return " / ".join("float" if side is None else _numbers(side) for side in sides)


def _numbers(side: Any) -> str:
    formats = [side.format] if isinstance(side.format, str) else side.format
    scale = "" if side.scale == "float" else f", {side.scale} scales"
    return f"{' or '.join(formats)} per {side.granularity}{scale}{', at run time' if side.dynamic else ''}"


def mechanisms(recipe: Recipe) -> str:
    """The stages in order."""
    return ", ".join(dict.fromkeys(f"{entry.axis}: {entry.name}" for entry in recipe.entries)) or "rounding to nearest"


def figures(recipe: Recipe, rows: Iterable[Mapping[str, Any]], pipeline: str) -> str:
    """What was measured with this very recipe, with as many clips as there are."""
    own = [row for row in rows if row.get("pipeline") == pipeline and f"-{recipe.digest()}" in str(row.get("digest", ""))]
    usual = f"trust as usual: {recipe.name}"
    found = [row for row in own if row.get("psnr") and (row["name"] == usual or not row["name"].startswith(OTHER))]
    if not found:
        return "-"
    best = max(found, key=lambda row: row["clips"])
    return f"{best['psnr_mean']:.1f} ({min(best['psnr']):.1f}), {best['clips']}"


def page(recipes: Iterable[Recipe], rows: list[Mapping[str, Any]]) -> str:
    """The whole page."""
    recipes = list(recipes)
    shown = [name for name in PIPELINES if any(figures(recipe, rows, name) != "-" for recipe in recipes)]
    lines = [[f"[`{one.name}`](#{_anchor(one.name)})", numbers(one), *(figures(one, rows, name) for name in shown)] for one in recipes]
    tables = [BITS, *map(_divided, PIPELINES), WORK, *_table_of(LEFT_OUT), ""]
    parts = [START, markdown(["recipe", "weights / inputs", *shown], lines), "", *tables, *map(_section, recipes)]
    return "\n".join(parts).rstrip() + "\n"


def _divided(pipeline: str) -> str:
    """What methods that divide bits do on a pipeline, as ``benchmarks.sensitivity_rows`` wrote it; nothing if it did not."""
    file = DIVIDED / f"sensitivity-rows-{pipeline}.md"
    return f"### On {pipeline}\n\n{file.read_text(encoding='utf-8').partition(chr(10) * 2)[2]}" if file.is_file() else ""


def _table_of(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("|")] if file.is_file() else []


def _anchor(name: str) -> str:
    return name.replace(".", "").lower()


def _section(recipe: Recipe) -> str:
    ours = f"\n\n*Ours, not the paper's:* {recipe.ours}" if recipe.ours else ""
    paper = f"Paper: {', '.join(_link(one) for one in recipe.paper.split(', '))}. " if recipe.paper else ""
    return f"## {recipe.name}\n\n{recipe.summary}\n\n{paper}Stages: {mechanisms(recipe)}.{ours}\n"


def _link(paper: str) -> str:
    number = paper.removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{number})" if number != paper else paper


def main() -> None:
    """Write the page."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, default=PAGE)
    args = made.parse_args()
    args.output.write_text(page(map(load_recipe, names()), Records(ROWS).load()), encoding="utf-8")


if __name__ == "__main__":
    main()
