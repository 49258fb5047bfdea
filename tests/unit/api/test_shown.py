"""What a shell and a notebook show of results: one line, and a small table in which every text of others is escaped."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import reelquant
from reelquant._markup import table
from reelquant.checkpoint.export import Exported, Outcome
from reelquant.engine.report import Report
from reelquant.evidence.evaluation import Evaluation, Result
from reelquant.evidence.fidelity import Interval
from reelquant.evidence.gate import Failure, Verdict
from reelquant.evidence.metrics import METRICS
from reelquant.evidence.speed import Benchmark, Spread
from tests.tiny.stock import wan_pipeline

EVIL = "<script>alert(1)</script>\x1b[2J"


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def report() -> Report:
    found = Report(EVIL, "0" * 16, "Wan", "transformer", bytes_float=4000, bytes_quantized=1000, warnings=[f"odd {EVIL}"])
    found.source, found.kernel, found.skipped = f"/home/{EVIL}", {EVIL: 3}, {"entry": ["a", "b"]}
    return found


def evaluation(**more: Any) -> Evaluation:
    metrics = {
        "psnr": Result(METRICS["psnr"], Interval(42.19, 41.0, 43.0), floor={"bf16": Interval(50.0, 49.0, 51.0)}, within_floor=False),
        "ssim": Result(METRICS["ssim"], Interval(0.99, 0.98, 1.0)),
        "fvd": Result(METRICS["fvd"], missing=f"no weights {EVIL}"),
    }
    data = {"test": {"name": EVIL}, "reference": {"name": "tiny-dit"}, "clips": 2, "warnings": [f"odd {EVIL}"]}
    return Evaluation(metrics, data, **more)


def benchmark() -> Benchmark:
    sides = {"reference": Spread(2.0, 1.9, 2.1), "test": Spread(1.0, 0.9, 1.1)}
    data = {"test": {"name": EVIL}, "reference": {"name": "tiny-dit", "short": "bf16"}, "device": "cpu"}
    spread = Spread(2.0, 1.9, 2.1)
    return Benchmark(spread, None, sides, {}, {"reference": 4000, "test": 1000}, {}, {}, {}, False, None, data)


def exported() -> Exported:
    layers = [Outcome("a", "carried", "int8", "int8", 4000, 1000), Outcome("b", "float", "float", "float", 400, 400)]
    return Exported(Path(f"/tmp/x/{EVIL.replace('/', '')}"), "gguf", ("transformer",), EVIL, layers, {f"ranges {EVIL}": ["a"]})


def test_one_line_says_the_most_of_a_result() -> None:
    assert repr(report()).endswith("on transformer: 0 of 2 layers quantized, 4 kB -> 1 kB, 4.00x smaller)")
    assert repr(evaluation()).endswith("against tiny-dit, 2 clips: PSNR 42.2 dB, SSIM 0.9900; no gate)")
    missed = Verdict("strict", False, (Failure("psnr", 42.19, "at least 45", f"too low {EVIL}"),))
    assert repr(evaluation(verdict=missed)).endswith("; gate strict: missed)")
    assert repr(benchmark()).endswith("against tiny-dit in bf16 on cpu: 2.00 (1.90 to 2.10) times as fast)")
    assert repr(exported()).startswith("Exported(gguf ") and repr(exported()).endswith(": 1 carried, 1 float; 4.4 kB -> 1.4 kB)")
    assert "nothing measured" in repr(Evaluation({}, {}))


@pytest.mark.parametrize("shown", [report(), evaluation(), benchmark(), exported()], ids=lambda one: type(one).__name__)
def test_a_notebook_gets_a_table_and_no_tag_or_escape_sequence_of_others(shown: Any) -> None:
    assert "\x1b" not in repr(shown) and "\n" not in repr(shown) and len(repr(shown)) < 300
    page = Tags(shown._repr_html_())
    assert page.tags <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"} and "table" in page.tags
    assert "<script>alert(1)</script>" in page.text and "\x1b" not in page.text


def test_the_table_of_an_evaluation_has_a_row_per_metric() -> None:
    text = Tags(evaluation()._repr_html_()).text
    assert "PSNR\n42.2 dB\n41.0 to 43.0\nbf16 50.0 dB\nno\n" in text
    assert "no weights" in text and "odd" in text
    missed = Verdict("strict", False, (Failure("psnr", 42.19, "at least 45", "PSNR is too low"),))
    assert "PSNR is too low" in Tags(evaluation(verdict=missed)._repr_html_()).text


def test_results_of_real_runs_are_short() -> None:
    pipe = wan_pipeline()
    plan = reelquant.plan(pipe, "w8a16")
    count = f"{len(plan.quantized)} of {len(plan.layers)} layers quantized"
    assert repr(plan).startswith(f"Plan(w8a16 on WanTransformer3DModel: {count}, ") and len(repr(plan)) < 200
    assert "first and last layer stay float" in Tags(plan._repr_html_()).text
    made = reelquant.quantize(pipe, "w8a16")
    assert count in repr(made) and "w8a16 on WanTransformer3DModel (transformer)" in Tags(made._repr_html_()).text


def test_a_table_without_rows_is_a_caption() -> None:
    assert Tags(table("empty", [])).text.strip() == "empty"
