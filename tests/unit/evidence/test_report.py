import base64
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from torch import Tensor

from reelquant import CheckpointError, MeasurementError, kernels
from reelquant._numbers import figure, ranges
from reelquant.evidence.report import Panel, glossary, render, summary, write
from reelquant.evidence.report.cell_charts import interval_plot
from reelquant.evidence.report.charts import Dot, Line, decades, line_chart, scatter_chart, steps, strip_chart
from reelquant.evidence.report.clip_cards import clips_note, order_words
from reelquant.evidence.report.data import QuantizationData, ReportData
from reelquant.evidence.report.metric_table import gate_rows, tiles
from reelquant.evidence.report.panels import best_gain, embed_within, encode, shown_size, strips, worst_first
from reelquant.evidence.report.proof import cost_note, cost_rows, facts
from reelquant.evidence.report.sentences import few_clips, near_lossless, verdict
from reelquant.evidence.report.several import render as render_several
from reelquant.evidence.report.several import size_chart
from reelquant.evidence.report.several_table import SeveralData, markdown, summary_rows
from tests.unit.evidence.report import HOSTILE, counted, panels, sample, several, side_by_side


def decode(video: bytes) -> list[Tensor]:
    with av.open(io.BytesIO(video)) as container:
        return [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


# --------------------------------------------------------------------------------------------------------------------- clips


def test_small_clips_grow_by_whole_pixels_and_large_ones_shrink() -> None:
    assert shown_size(64, 64) == (192, 192)
    assert shown_size(32, 48) == (192, 288)
    assert shown_size(480, 832) == (276, 480)
    assert shown_size(240, 320) == (240, 320)
    assert shown_size(40, 100) == (160, 400)  # by 5 it would be too wide


def test_strip_holds_float_quantized_and_amplified_difference_without_bleeding() -> None:
    panel = Panel("a", "", None, {}, torch.full((1, 3, 40, 100), 0.2), torch.full((1, 3, 40, 100), 0.25))
    (strip,) = strips(panel, gain=4)
    stride = strip.shape[1] // 3
    assert stride % 16 == 0 and strip.shape[0] == 160
    (read,) = decode(encode([strip], 8))
    for k, level in enumerate([0.2, 0.25, 0.5 + 4 * 0.05]):
        part = read[:, k * stride : k * stride + 400].float() / 255
        assert (part - level).abs().max() < 0.02, k  # two levels of limited-range luma


def test_gain_is_the_largest_that_keeps_a_typical_difference_in_range() -> None:
    def gain(gap: float) -> int:
        return best_gain([Panel("a", "", None, {}, torch.full((2, 3, 8, 8), 0.2), torch.full((2, 3, 8, 8), 0.2 + gap))])

    assert [gain(0.0), gain(0.06), gain(0.13), gain(0.6)] == [32, 8, 2, 1]
    assert best_gain([]) == 32


def test_clips_of_different_shape_are_refused_by_name() -> None:
    with pytest.raises(MeasurementError, match=r"clip '0007' .* reference is \(8, 3, 32, 32\), the test \(7, 3, 32, 32\)"):
        Panel("0007", "", None, {}, counted(8), counted(7))
    with pytest.raises(MeasurementError, match=r"'x' must be \[frames, 3, height, width\]"):
        Panel("x", "", None, {}, torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))


def test_worst_come_first_by_the_first_metric_that_all_clips_have() -> None:
    metrics = ReportData.from_json({"metrics": {"lpips": dict(better="lower"), "psnr": dict(better="higher")}}).metrics
    ordered, by = worst_first(panels(), metrics)
    assert (by, [panel.name for panel in ordered]) == ("psnr", ["0002", "0001", "0000"])
    assert worst_first(panels(), {})[1] is None


def test_size_bound_keeps_the_worst_and_at_least_one() -> None:
    ordered = panels()[::-1]
    sizes = [made.size for made in embed_within(ordered, 1, 8, 1e9)]
    assert [made.name for made in embed_within(ordered, 1, 8, sizes[0] + sizes[1])] == ["0002", "0001"]
    assert [made.name for made in embed_within(ordered, 1, 8, 0)] == ["0002"]


def test_note_says_which_clips_are_shown_and_why() -> None:
    data = ReportData.from_json({"clips": 64, "metrics": {"psnr": dict(title="PSNR")}})
    assert clips_note(data, 64, 12, 40) == "12 clips of 64; more would make this file larger than 40 MB."
    assert clips_note(data, 8, 8, 40) == "8 clips of 64; the others were not handed to the report."
    assert (order_words(data, "psnr", 12), order_words(data, "psnr", 1), order_words(data, None, 12)) == (", worst PSNR first", "", "")
    assert clips_note(ReportData(), 0, 0, 40) == "No clip is shown: none was handed to the report."


# ---------------------------------------------------------------------------------------------------------------------- page


def test_page_is_one_file_that_refers_to_nothing_outside() -> None:
    page = render(sample(), panels())
    assert not re.findall(r"https?://|//[a-z]+\.[a-z]+/|@import|url\(", page)
    assert not re.findall(r"\son[a-z]+=|\sstyle=", page), "the content security policy would block these"
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src &#39;none&#39;" in policy and "unsafe" not in policy
    for element in ("script", "style"):
        (content,) = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy.replace("&#43;", "+")


def test_equal_input_gives_the_same_page() -> None:
    assert render(sample(), panels()) == render(sample(), panels())


def test_prompts_are_text_wherever_they_stand() -> None:
    data = sample() | {"created": HOSTILE, "command": HOSTILE, "warnings": [HOSTILE]}
    data["quantization"]["layers"][0]["name"] = data["metrics"]["psnr"]["title"] = data["reference"]["name"] = HOSTILE
    page = render(data, panels())
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0])["prompts"][1] == HOSTILE


def test_page_says_verdict_missing_metrics_and_simulated_arithmetic() -> None:
    page = render(sample(), panels())
    for words in (
        "Fails the gate &#39;default&#39;: slowed motion.",
        "Not near-lossless: PSNR outside of the noise floor, which is float run differently",
        "float arithmetic stood in for few-bit products (simulated)",
        "<code>reelquant weights i3d</code>",
        ", worst PSNR first</span>",
        "All 3 clips.",
        "difference \u00d7",
        "first and last layer stay float",
        "reelquant evaluate out --reference tiny-dit",
    ):
        assert words in page, words


def test_metrics_stand_in_the_order_of_the_library_whatever_the_file_says() -> None:
    page = render(sample())
    assert page.index(">PSNR") < page.index(">Motion <")


def test_page_stays_right_without_any_one_field() -> None:
    lacking = [{key: value for key, value in sample().items() if key != name} for name in sample()]
    emptied = [sample() | {name: None} for name in sample()]
    for data in ({}, *lacking, *emptied):
        page, missing = render(data), sample().keys() - {key for key, value in data.items() if value is not None}
        assert "</html>" in page, missing
        assert "None" not in re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL), missing
        assert summary(data).startswith("### "), missing


def test_fields_may_be_empty_inside() -> None:
    data = sample() | dict(
        trajectory={}, grain=dict(steps=[]), bias={}, gate={}, near_lossless={}, quantization={"layers": []}, per_clip=[{}]
    )
    data["metrics"] = {"psnr": {}, "ssim": {"value": float("nan")}, "new": {"value": 1.0, "floor": {"bf16": None}}}
    page = render(data)
    assert "latents were not recorded" in page and "NaN" not in page
    assert "no value was recorded and no reason given" in page


def test_page_keeps_within_its_limit() -> None:
    noise = torch.rand(6, 8, 3, 64, 64)
    clips = [Panel(str(i), "", None, {"psnr": float(i)}, clip, clip.flip(0)) for i, clip in enumerate(noise)]
    page = render(sample(clips=6), clips, limit_mb=3)
    assert len(page) < 3e6
    assert 1 <= page.count('class="card clip"') < 6 and "larger than 3 MB" in page


def test_clips_need_different_names() -> None:
    with pytest.raises(MeasurementError, match=r"different names.* 0000"):
        render({}, [panels()[0], panels()[0]])


def test_write_leaves_a_whole_page_or_nothing(tmp_path: Path) -> None:
    path = write(sample(), panels(1), tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8").endswith("</html>\n") or path.read_text(encoding="utf-8").endswith("</html>")
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write({}, [], tmp_path / "taken" / "report.html")


# -------------------------------------------------------------------------------------------------------------------- charts


def test_ticks_are_round() -> None:
    assert steps(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert steps(-0.04, 0.045) == [-0.04, -0.02, 0, 0.02, 0.04]
    assert decades(0.001, 1.0) == pytest.approx([0.001, 0.01, 0.1, 1])
    assert decades(2.0, 80.0) == pytest.approx([3, 10, 30])


def test_charts_without_numbers_say_so() -> None:
    assert line_chart("t", "a", [Line("x", "s", [1], [None])], "x", "y").missing
    assert scatter_chart("t", "a", [Dot(1, float("nan"), "s", "")], "x", "y").missing
    assert strip_chart("t", "a", []).missing


def test_marks_and_names_are_escaped() -> None:
    svg = scatter_chart(HOSTILE, HOSTILE, [Dot(1, 2, 'a" onload="x', HOSTILE)], HOSTILE, HOSTILE).svg
    assert svg is not None and "<script" not in svg and 'onload="' not in svg


def test_one_point_is_a_chart_too() -> None:
    assert line_chart("t", "a", [Line("x", "s", [1], [2.0])], "x", "y").svg
    assert strip_chart("t", "a", [(3.0, "x", "0000")]).svg


def test_far_floors_are_marked_at_the_edge_instead_of_squeezing_the_rest() -> None:
    near, far = ("bf16", (51.0, 50.0, 52.0)), ("reseed", (5.0, 4.0, 6.0))
    assert "beyond" not in interval_plot((50.0, 49.0, 51.0), [near])
    plot = interval_plot((50.0, 49.0, 51.0), [near, far])
    assert plot.count("<circle") == 2 and "\u2039" in plot


# ---------------------------------------------------------------------------------------------------------- gate, size, speed


def test_every_limit_of_the_gate_stands_beside_value_and_margin_the_missed_ones_first() -> None:
    rows = [(row.title, row.value, row.limit, row.margin, row.result) for row in gate_rows(ReportData.from_json(sample()))]
    assert rows == [
        ("Motion", "\u22120.480", "from -0.1 to 0.1", "\u22120.380", "failed"),
        ("Clips with one and the same defect", "33.3 %", "at most 2% of the clips", "\u221231.3 %", "failed"),
        ("PSNR", "49.0 dB", "at least 25", "+24.0", "passed"),
        ("LPIPS (alex)", "\u2013", "at most 0.15", "\u2013", "not measured"),
    ]
    assert 'id="gate"' in render(sample()) and 'id="gate"' not in render(sample() | {"gate": None})
    assert gate_rows(ReportData.from_json({"gate": dict(preset="strict", passed=True)})) == []  # of an older version


def test_a_limit_stands_beside_the_pill_and_in_the_tile() -> None:
    page = render(sample())
    assert '<span class="pill bad">outside</span><small>at least 54.0</small>' in page
    assert "outside of the noise floor (at least 54.0)" in page


def test_distances_of_few_clips_are_no_headline() -> None:
    data = sample()
    data["metrics"]["fvd"] |= dict(value=12.0, missing=None)
    few, many = (ReportData.from_json(data | {"clips": clips}) for clips in (8, 256))
    assert "FVD" not in [tile.label for tile in tiles(few)] and "FVD" in [tile.label for tile in tiles(many)]
    assert few_clips(few) == "FVD of 8 clips stand in the table only: distances of sets are a headline from 256 clips on."
    assert few_clips(many) == ""


def test_bytes_and_times_stand_beside_those_of_float() -> None:
    data = ReportData.from_json(sample())
    rows = {name: row for name, *row in cost_rows(data)}
    assert rows["All weights of the folder"] == ["2 kB", "900 bytes", "2.22\u00d7 smaller"]
    assert rows["Whole clip"] == ["3.00 s", "2.00 s", "1.50\u00d7 as fast (1.40 to 1.60)"]
    assert rows["Peak memory"] == ["4 kB", "3 kB", "1.33\u00d7 smaller"]
    assert "3 rounds, in bf16 on cpu with 2 threads" in cost_note(data)
    assert "evaluate --speed" in cost_note(ReportData())


def test_every_kernel_has_plain_words() -> None:
    named = {kernel.name for kernel in (*kernels.KERNELS["cpu"](), kernels.REFERENCE)}
    assert named <= glossary.KERNELS.keys()
    assert (
        "int16 pairs (few-bit integers, widened to 16 bits"
        in dict(facts(ReportData.from_json({"quantization": dict(kernel={"int16 pairs": 3})}).quantization or QuantizationData()))[
            "Computed by"
        ]
    )


# ------------------------------------------------------------------------------------------------------------- several tests


def test_a_row_for_each_test_has_size_quality_worst_clip_motion_speed_and_gate() -> None:
    rows = summary_rows(several())
    assert rows[0] == [
        "w8a8", "900 kB (2.22\u00d7 smaller)", "49.0 dB (48.0 to 50.0)", "45.0 dB (clip 0002)", "\u221248.0 %",
        "1.50\u00d7 (1.40 to 1.60)", "passed",
    ]  # fmt: skip
    assert rows[2][-1] == "failed (slowed motion)"
    assert "| w4a4 | 500 kB" in markdown(several())


def test_the_page_of_several_tests_is_one_file_with_a_bubble_for_each() -> None:
    page = render_several(several(), side_by_side(), {})
    assert not re.findall(r"https?://|//[a-z]+\.[a-z]+/|@import|url\(|\son[a-z]+=|\sstyle=", page)
    assert page.count('class="dot t-') == 3 and "2.50\u00d7 as fast as float" in page
    assert page.count('<figure class="view test">') == 9 and "difference \u00d7" not in page
    assert page.count('<figure class="view floor">') == 3
    assert "<script>alert" not in page
    for empty in ("metrics", "gate", "bytes", "speed", "quantization", "per_clip", "worst_clip"):
        tests = [test | {empty: None} for test in several()["tests"]]
        assert "</html>" in render_several(several() | {"tests": tests}, side_by_side(), {}), empty


def test_speed_that_was_not_measured_gives_bubbles_of_one_size() -> None:
    tests = [test | {"speed": None} for test in several()["tests"]]
    chart = size_chart(SeveralData.model_validate(several() | {"tests": tests}))
    assert len(set(re.findall(r' r="([\d.]+)"', str(chart.svg)))) == 1 and "--speed" in chart.about


# --------------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("value", "text"),
    [(52.134, "52.1"), (0.99312, "0.993"), (-0.48, "\u22120.480"), (12345, "12,345"), (0, "0"), (None, "\u2013"), (True, "\u2013")],
)
def test_figures_have_three_digits(value: Any, text: str) -> None:
    assert figure(value) == text


def test_a_rounded_zero_has_no_sign() -> None:
    assert figure(-0.001, digits=2) == "0.00"


def test_seeds_are_shortened_to_ranges() -> None:
    assert ranges([3, 1, 2, 9, 2]) == "1\u20133, 9"


def test_verdict_is_about_the_gate_and_never_claims_what_was_not_measured() -> None:
    assert verdict(ReportData()) == ("unknown", ["No gate was applied."])
    assert verdict(ReportData.from_json({"gate": dict(preset="strict", passed=True)})) == ("good", ["Passes the gate 'strict'."])
    assert near_lossless(ReportData()) is None
    undecided = ReportData.from_json({"near_lossless": dict(holds=None, why="no bf16 floor")})
    assert near_lossless(undecided) == "Near-lossless was not decided (no bf16 floor)"
    real = ReportData.from_json({"quantization": dict(simulated=False, kernel=dict(int8=2))})
    assert verdict(real)[1][1] == "Every quantized layer was computed as the recipe says; nothing stood in for it."


def test_summary_has_table_failures_and_what_is_missing() -> None:
    text = summary(sample())
    assert "| PSNR \u2191 | \u2013 | 49.0 dB (48.0 to 50.0) | 55.0 (54.0 to 56.0) | 12.0 (11.0 to 13.0) | outside |" in text
    assert "- Motion: It drags." in text and "- FVD: needs the weights 'i3d': reelquant weights i3d" in text
    assert "3 layers quantized, 2 skipped; 1 kB \u2192 250 bytes (4.00x smaller)" in text


def test_reports_of_older_versions_call_skipped_layers_kept() -> None:
    old = sample()
    new = sample()
    new["quantization"]["skipped"] = new["quantization"].pop("kept")
    assert "kept" in old["quantization"] and ReportData.from_json(new) == ReportData.from_json(old)
    assert summary(new) == summary(old) and "2 skipped" in summary(new)


def test_data_of_another_shape_are_refused_by_field() -> None:
    with pytest.raises(MeasurementError, match=r"quantization\.layers: Input should be a valid tuple, got 3; docs/report.md"):
        render({"quantization": {"layers": 3}})


def test_data_are_typed_and_numbers_keep_their_kind() -> None:
    data = ReportData.from_json(sample())
    assert data.quantization is not None and data.quantization.layers[0].bytes_after == 100
    assert isinstance(data.quantization.layers[0].bytes_after, int), "the page shows 100, not 100.0"
    assert [clip.figures["psnr"] for clip in data.per_clip] == [50.0, 49.0, 48.0]
    assert ReportData.from_json({"clips": True, "fps": float("nan")}).clips is None


def test_summary_shows_markup_as_text() -> None:
    assert "&lt;img&gt;" in summary({"test": {"name": "<img>"}}) and "a\\|b" in summary({"warnings": ["a|b"]})


# ---------------------------------------------------------------------------------------------------------------- clipping


def test_clipped_inputs_are_a_table_and_a_curve() -> None:
    page = render(sample(), panels())
    card = page[page.index('id="clipping"') : page.index("All layers")]
    assert "0.0200 % of the rounded inputs were clipped, at 0.0800 times the noise of rounding." in card
    assert card.count("<tr><td>") == 1 and "blocks.1.ffn.net.2" in card and "blocks.0.attn1.to_q" not in card
    assert "Clipping, step by step" in card and "<svg" in card
    assert "0.0200 % of the rounded inputs" in summary(sample())


def test_nothing_is_said_of_clipping_that_was_not_counted() -> None:
    data = sample() | {"saturation": None}
    assert 'id="clipping"' not in render(data, panels()) and "clipped" not in summary(data)
    assert "No input left the calibrated ranges." in summary(sample() | {"saturation": dict(share=0.0, excess=0.0, layers=[])})
