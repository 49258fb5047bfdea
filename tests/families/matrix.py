"""The published matrix: every check on every family, with figures, and the sweep over all other denoisers of diffusers.

``python -m tests.families.matrix --output docs/families.md`` runs what the tests run. ``--only wan-2.1 sd`` prints a part of it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")  # before diffusers is imported: nothing is downloaded

from tests.families.checks import CHECKS, Case, UpstreamError
from tests.families.models import FAMILIES
from tests.families.sweep import sweep

FIGURES = {
    "num_parameters": "parameters", "memory_footprint": "bytes of bf16 over bytes of w8a16", "inference": "output error, signal over noise",
    "lora_inference": "what the adapter changes, against the same adapter on float", "quantized_layers": "quantized of all",
    "training": "gradients of the adapters, against those on float", "features": "mechanisms for which the family has layers",
    "step_bits": "a step of W4A6 beside one of W8A8, signal over noise",
    "reuse": "what is kept of a stretch of blocks: the change that a chain makes, or the output of each block; and places of attention",
}  # fmt: skip
"""Checks whose figures are published in a table of their own, and what they mean."""


def run(names: list[str]) -> dict[str, dict[str, str]]:
    """Family -> check -> its figure; ``FAILED`` or ``diffusers`` and the reason where it is not green."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(name, Path(folder))
            found[name] = {check: _cell(case, check) for check in CHECKS}
        red = [f"{check}: {cell}" for check, cell in found[name].items() if cell.startswith(("FAILED", "diffusers"))]
        sys.stderr.write("\n  ".join([f"{name}: {len(CHECKS) - len(red)} of {len(CHECKS)}", *red]) + "\n")
    return found


def _cell(case: Case, check: str) -> str:
    try:
        return CHECKS[check](case) or "yes"
    except UpstreamError as reason:
        return f"diffusers: {reason}"
    except Exception as error:  # published as red, with what was said
        return f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def page(found: dict[str, dict[str, str]], swept: list[list[str]]) -> str:
    """The whole document."""
    titles = {name: FAMILIES[name].title for name in found}
    reasons = sorted({cell for cells in found.values() for cell in cells.values() if cell.startswith(("diffusers", "FAILED"))})
    notes = {reason: str(number) for number, reason in enumerate(reasons, 1)}
    marks = [[titles[name], *(f"[{notes[cell]}]" if cell in notes else "+" for cell in cells.values())] for name, cells in found.items()]
    figures = [[titles[name], *(cells[check] if cells[check] not in notes else "-" for check in FIGURES)] for name, cells in found.items()]
    green = sum(cell not in notes for cells in found.values() for cell in cells.values())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "peft", "accelerate"))
    return TEXT.format(
        versions=versions, green=green, total=len(found) * len(CHECKS),
        checks="\n".join(f"* `{name}`: {(check.__doc__ or '').splitlines()[0]}" for name, check in CHECKS.items()),
        marks=table(["family", *(f"`{check}`" for check in CHECKS)], marks),
        notes="\n".join(f"{number}. {reason}" for reason, number in notes.items()),
        figures=table(["family", *FIGURES], figures), meanings="; ".join(f"*{name}*: {meaning}" for name, meaning in FIGURES.items()),
        swept=table(["class", "layers quantized", "roles", "output error"], swept),
        swept_count=len(swept), swept_roles=sum(row[2] == "probed" for row in swept), swept_run=sum("dB" in row[3] for row in swept),
    )  # fmt: skip


TEXT = """# Which denoisers work

Written by `python -m tests.families.matrix --output docs/families.md`, which runs the functions that the tests run; {versions}, CPU.

## The matrix

diffusers tests its own quantization methods with a set of checks. These are those checks, in our words, on one tiny model with random
weights for every family: {green} of {total} cells are green. A model is saved as a float checkpoint and opened by stock `from_pretrained`
with `quantization_config=ReelQuantConfig("w8a16")`; the inputs are those of one call of the family's own pipeline. `features` and `reuse`
are ours.

{checks}

{marks}

`+` passes. A number is a cell in which the float model of diffusers fails in the same way, and how; the check makes it prove that:

{notes}

## Figures

{figures}

{meanings}. The models are 16 to 64 channels wide, random, and their first and last layers stay float: real ones shrink more (a scale per
row of 1,536 weights instead of 16) and lose less. The UNets are worst because they are deepest: about 170 layers in a row.

Two experts: a pipeline of Wan 2.2 A14B has two such models; `tests/families/test_experts.py` quantizes both through
`PipelineQuantizationConfig(quant_mapping=...)` and samples over their boundary.

## Every other denoiser of diffusers

{swept_count} classes take a latent and a timestep and are not in the matrix. Each was built in a tiny random configuration and opened with
`ReelQuantConfig("w8a16")`. *roles* says how first, last, temporal and prompt layers were told apart: `probed`, by running the model on
made-up inputs ({swept_roles} classes); `outline`, by the structure alone, because no inputs could be made up for it (recipes that calibrate
need `inputs=` there). *output error* is there where the model ran on those inputs ({swept_run} classes).

{swept}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="Markdown file; without it the page is printed")
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="families")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    text = page(run(options.only), sweep())
    if options.output:
        options.output.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
