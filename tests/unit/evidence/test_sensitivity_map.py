"""A sensitivity map in a report: what is read of the table, and what is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelquant._errors import RecipeError
from reelquant.allocate.table import Damage, LayerFacts, SensitivityTable
from reelquant.evidence.report.data import ReportData
from reelquant.evidence.report.sensitivity_charts import sensitivity_maps
from reelquant.evidence.sensitivity_map import read_map

NAMES, FORMATS = ("a.to_q", "b.to_q"), ("int4/group-64", "int8/channel")
REPORT = {"component": "transformer", "layers": [{"name": "a.to_q", "weight": "int8 channel"}], "skipped": {"small": ["b.to_q"]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    layers = tuple(LayerFacts("transformer", name, "Linear", "main", (8, 8), name[0]) for name in NAMES)
    rows = [
        Damage("transformer", name, "weight", fmt, "gradient", damage, damage, damage, steps)
        for name, scale in zip(NAMES, (1.0, 0.0), strict=True)
        for fmt, damage in zip(FORMATS, (1e-2 * scale, 1e-5 * scale), strict=True)
        for steps in (None, (0, 1), (2, 2))
    ]
    SensitivityTable("a-model", "w4a16", layers, tuple(rows), timesteps={"transformer": [3.0, 2.0, 1.0]}).save(
        tmp_path / "sensitivity.json"
    )
    return tmp_path


def test_the_map_says_what_every_layer_got(folder: Path) -> None:
    (found,) = read_map(folder, REPORT)
    assert found["damage"] == [[1e-2, 1e-5], [0.0, 0.0]] and found["chosen"] == ["int8/channel", None]
    assert found["steps"] == [[0, 1], [2, 2]] and found["step_format"] == "int4/group-64" and found["step_damage"][0] == [1e-2, 1e-2]


def test_a_map_of_another_model_is_refused(folder: Path) -> None:
    other = {"component": "unet", "layers": [{"name": "c.to_q", "weight": "int8 channel"}]}
    with pytest.raises(RecipeError, match=r"of 'a-model', and none of its layers \('a.to_q' ...\)"):
        read_map(folder, other)
    assert read_map(folder, None)[0]["chosen"] == [None, None]


def test_the_drawing_frames_the_format_and_shades_by_the_logarithm(folder: Path) -> None:
    data = ReportData.from_json({"sensitivity": read_map(folder, REPORT)})
    formats, steps = map(str, (chart.svg for chart in sensitivity_maps(data.sensitivity)))
    assert formats.count("<rect") == 4 and steps.count("<rect") == 4
    assert formats.count("framed") == 1 and "a.to_q, int8/channel: 0.00001" in formats.partition("framed")[2]
    assert 'fill-opacity="1.0"' in formats and 'fill-opacity="0.0"' in formats and "steps 1-2" in steps
