"""What reports say of parts that are reused, in the unit of their reuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from reelquant.cli.tables import reused
from reelquant.evidence.report import plots, sentences
from reelquant.evidence.report.data import ReportData, ReuseData
from reelquant.evidence.reused import ReusedSteps
from reelquant.reuse import AttentionReuse
from reelquant.reuse.reuse import put
from tests.unit.reuse.test_attention import Denoiser, outputs, work

BLOCKS = ReusedSteps(("blocks.1", "blocks.2"), {0: (2, 0), 1: (0, 2)})
CELLS = {"a.attn": {0: (20, 0), 1: (0, 20)}, "b.attn": {0: (20, 0), 1: (10, 10)}}
SITES = ReusedSteps(("a.attn", "b.attn"), {0: (40, 0), 1: (10, 30)}, CELLS, "multiplications", "attention sites")


@pytest.mark.parametrize(
    ("found", "sentence", "row"),
    [
        (
            BLOCKS,
            "50.0 % of the calls of 2 blocks (blocks.1 to blocks.2) were computed",
            "2 blocks, 50% of their calls computed: in steps 1",
        ),
        (
            SITES,
            "62.5 % of the multiplications of 2 attention sites (a.attn to b.attn) were computed",
            "2 attention sites, 62% of their multiplications computed",
        ),
    ],
)
def test_reports_name_what_was_counted(found: ReusedSteps, sentence: str, row: str) -> None:
    facts: Any = found.facts()
    data = ReportData(reuse=ReuseData(**facts))
    said = sentences.reuse(data)
    assert said is not None and said.startswith(sentence)
    assert reused(facts) == [("reuse", row)]
    chart = plots.reuse_chart(ReuseData(**facts))
    assert chart.title == f"{found.things.capitalize()} computed, step by step" and f"share of {found.unit}" in str(chart.svg)


@pytest.mark.parametrize("found", [BLOCKS, SITES])
def test_counts_come_back_from_disk_and_add_up(found: ReusedSteps) -> None:
    assert ReusedSteps.from_json(found.to_json()) == found and ("unit" in found.to_json()) == (found is SITES)
    both = ReusedSteps().plus(found).plus(found)
    assert both.unit == found.unit and both.since(found) == found
    assert both.cells == {part: {step: (2 * a, 2 * b) for step, (a, b) in steps.items()} for part, steps in found.cells.items()}


def test_the_map_shades_every_part_and_step_by_what_was_computed() -> None:
    facts: Any = SITES.facts()
    chart = plots.reuse_map(ReuseData(**facts))
    svg = str(chart.svg)
    shades = [float(one.split('"')[0]) for one in svg.split('fill-opacity="')[1:]]
    assert shades == [1, 0, 1, 0.5]
    assert "b.attn, step 2: 50% of its multiplications" in svg


def test_a_part_that_was_not_counted_at_a_step_was_computed_there() -> None:
    found = replace(SITES, cells={"b.attn": {1: (0, 20)}})
    facts: Any = found.facts()
    svg = str(plots.reuse_map(ReuseData(**facts)).svg)
    assert [float(one.split('"')[0]) for one in svg.split('fill-opacity="')[1:]] == [1, 1, 1, 0]


def test_without_counts_of_single_parts_there_is_no_map() -> None:
    facts: Any = BLOCKS.facts()
    assert plots.reuse_map(ReuseData(**facts)).svg is None


def test_multiplications_of_attention_are_counted_on_a_model() -> None:
    model: nn.Module = Denoiser()
    stage = AttentionReuse()
    put(model, "attention", stage, stage.facts(work(model)))
    outputs(model)
    found = ReusedSteps.of(model)
    assert found.parts == ("places.0", "places.1", "places.2") and found.unit == "multiplications"
    assert found.steps[0][0] > 0 and found.steps[1] == (0, found.steps[0][0])
    assert set(found.cells) == set(found.parts) and found.cells["places.1"][1][0] == 0
    assert sum(steps[0][0] for steps in found.cells.values()) == found.steps[0][0]
