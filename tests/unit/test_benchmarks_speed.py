"""The speed benchmarks: how times become figures, what the shapes are, what a row says. Nothing is timed here."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernels, step
from benchmarks import memory as denoiser_memory
from benchmarks.common import Records
from benchmarks.speed import denoisers, machine, memory, tables, variants, work
from benchmarks.speed.shapes import BUDGET, KINDS, LEAST_ROWS, Attention, Conv, Gemm, halved, shapes
from benchmarks.speed.timing import Samples, Spread, interleaved, speedup

LIMITS = {
    "cpu": {"name": "a CPU", "flags": ["avx2"], "cores": 2},
    "versions": {"torch": "2", "onednn": "3", "python": "3"},
    "threads": 1,
    "registers": {"fp32": 1e11, "bf16": 2e11, "int8": 4e11},
    "gemm": {"fp32": 9e10, "bf16": 1.9e11, "int8": 3.9e11},
    "bandwidth": {"read": 2e10, "copy": 2e10},
}


class Time:
    """A clock that only moves when work is done."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """A function that takes these times in turn, the last one for ever."""
        left = list(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


# --- timing ---------------------------------------------------------------------------------------------------------------------------


def test_variants_take_turns_and_every_other_round_runs_backwards() -> None:
    clock = Time()
    found = interleaved({"a": clock.work("a", 2.0), "b": clock.work("b", 1.0)}, rounds=2, clock=clock)
    assert clock.log == ["a", "b", "a", "b", "b", "a"]  # warm-up, forwards, backwards
    assert found["a"].seconds == (2.0, 2.0) and found["b"].median == 1.0


def test_fast_functions_are_repeated_within_a_sample() -> None:
    clock = Time()
    found = interleaved({"a": clock.work("a", 0.25)}, rounds=1, clock=clock, least=1.0)
    assert len(clock.log) == 1 + 4 and found["a"].seconds == (0.25,)


def test_the_warm_up_that_compiles_does_not_decide_the_repeats() -> None:
    clock = Time()
    interleaved({"a": clock.work("a", 100.0, 0.5)}, rounds=1, warmup=2, clock=clock, least=1.0)
    assert len(clock.log) == 2 + 2


def test_a_ratio_is_of_the_same_round() -> None:
    base, other = Samples((2.0, 20.0, 4.0)), Samples((1.0, 10.0, 2.0))  # the machine was ten times slower in the second round
    assert speedup(base, other) == Spread(2.0, 2.0, 2.0)


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([3.0, 1.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([1.0]).text() == "1.00 (1.00 to 1.00)"


def test_peaks_are_of_the_work_not_of_building_it() -> None:
    if not memory.reset_high_water():
        pytest.skip("this system cannot reset the high-water mark")

    def build() -> Callable[[], int]:
        torch.ones(50_000_000)  # 200 MB, gone before the work starts
        return lambda: torch.ones(10_000_000).numel()

    found = memory.peaks(build)
    assert found["rss_mb"] <= found["rss_build_mb"] - 100


# --- shapes ---------------------------------------------------------------------------------------------------------------------------


def test_names_are_unique_and_every_kind_is_there() -> None:
    found = shapes()
    assert len({(type(shape), shape.model, shape.name) for shape in found}) == len(found)
    assert {type(shape) for shape in found} == set(KINDS.values())


@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: f"{shape.model} {shape.name}")
def test_shapes_are_sane(shape: Gemm | Conv | Attention) -> None:
    assert shape.operations > 0 and all(count > 0 for count in shape.numbers)
    widths = {Gemm: ("k", "n"), Conv: ("outputs",), Attention: ("dim",)}[type(shape)]
    assert all(getattr(shape, width) % 8 == 0 for width in widths)
    if isinstance(shape, Gemm):
        assert shape.operations <= BUDGET or shape.m < 2 * LEAST_ROWS
        assert shape.m % 16 == 0
    else:
        assert shape.operations <= 1.1 * BUDGET


def test_operations_count_what_torch_counts() -> None:
    conv = Conv("m", "n", 8, 16, (3, 3), (2, 10, 6))
    x, weight = torch.zeros(conv.input_shape), torch.zeros(conv.outputs, conv.channels, *conv.kernel)
    result, found = work.counted(lambda: torch.nn.functional.conv2d(x, weight, padding=conv.padding))
    assert result.numel() == conv.positions * conv.outputs
    assert found == {"layers_gop": pytest.approx(conv.operations / 1e9), "attention_gop": 0}


def test_attention_is_counted_apart() -> None:
    query, key = torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 32, 16)
    with torch.no_grad():
        found = work.counted(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, key))[1]
    assert found == {"layers_gop": 0, "attention_gop": pytest.approx(Attention("m", "n", 1, 2, 8, 32, 16).operations / 1e9)}


def test_rows_are_halved_until_they_fit() -> None:
    assert halved(4096, BUDGET / 1024, least=16) == 1024
    assert halved(4096, BUDGET, least=2048) == 2048
    assert halved(77, 1.0) == 80


# --- layers of this library -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", kernels.LAYOUTS)
@pytest.mark.parametrize(
    "shape", [Gemm("m", "n", 16, 128, 64), Conv("m", "n", 64, 32, (3, 3), (2, 8, 8)), Conv("m", "n", 64, 32, (3, 1, 1), (4, 4, 4))]
)
@torch.no_grad()
def test_layers_of_random_codes_compute_what_the_reference_computes(shape: Gemm | Conv, layout: str) -> None:
    case = kernels.ours(kernels.LAYOUTS[layout])(shape)
    result, expected = case.run().float(), case.expected()
    assert 0.3 < float(expected.std()) < 3
    assert float((result - expected).abs().max()) <= 2**-7 * float(expected.abs().max())  # bf16 keeps 8 bits


NAMES = list(dict.fromkeys((kernels.BASE, "fp32", "ours w8a16")))


def test_kernel_rows_hold_ratio_share_and_error(tmp_path: Path) -> None:
    shape, ways = Gemm("m", "n", 16, 64, 32), {name: kernels.VARIANTS["gemm"][name] for name in NAMES}
    rows = kernels.measure(shape, ways, LIMITS, rounds=2, threads=1)
    assert [row["status"] for row in rows] == ["measured"] * len(NAMES)
    exact = rows[NAMES.index("fp32")]
    assert rows[0]["ratio"] == 1 and exact["error"] < 1e-6 and rows[-1]["error"] < 0.01 and rows[-1]["share"] > 0
    text = tables.write(tmp_path, "kernels-gemm", "title", kernels.HEADINGS, rows, list(map(kernels.line, rows)))
    assert "n 16x64x32" in text
    with (tmp_path / "kernels-gemm.csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == NAMES


def test_a_variant_that_fails_is_a_row() -> None:
    def broken(shape: Gemm) -> Any:
        raise RuntimeError("no such\ninstruction")

    ways = {kernels.BASE: kernels.VARIANTS["gemm"][kernels.BASE], "new": kernels.Variant(broken, (1, 1, 1), "int8")}
    rows = kernels.measure(Gemm("m", "n", 16, 64, 32), ways, LIMITS, rounds=1, threads=1)
    assert rows[1]["status"] == "failed" and rows[1]["reason"] == "RuntimeError: no such instruction"
    assert kernels.line(rows[1])[-1] == "RuntimeError: no such instruction"


# --- one step -------------------------------------------------------------------------------------------------------------------------


def test_a_missing_peer_is_a_row_that_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = variants.Variant(lambda subject: pytest.fail("made although it is missing"), "8/8", "no-such-package-of-anybody")
    monkeypatch.setitem(variants.VARIANTS, "absent", absent)
    row, made = step.prepare("absent", denoisers.Subject("wan-1.3b", tmp_path), None)
    assert made is None and row["status"] == "not installed"
    assert step.line(row)[-1] == "pip install --no-deps no-such-package-of-anybody"


def test_a_variant_that_raises_is_a_row_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(subject: Any) -> Any:
        raise ValueError("wrong | shape")

    monkeypatch.setitem(variants.VARIANTS, "broken", variants.Variant(make, "8/8"))
    row, made = step.prepare("broken", denoisers.Subject("wan-1.3b", tmp_path), None)
    assert made is None and (row["status"], row["reason"]) == ("failed", "ValueError: wrong | shape")


def test_variants_that_fill_memory_are_timed_in_sets_with_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = variants.Variant(lambda subject: variants.Work(lambda: torch.ones(2)), "8/8")
    monkeypatch.setattr(step, "VARIANTS", dict.fromkeys((step.BASE, "a", "b"), made))
    subject = denoisers.Subject("wan-1.3b", tmp_path)
    small = [list(works) for _, works in step.batches(["a", "b"], subject, torch.ones(2), limit=0.0)]
    large = [list(works) for _, works in step.batches(["a", "b"], subject, torch.ones(2), limit=1e15)]
    assert small == [[step.BASE, "a"], [step.BASE, "b"]] and large == [[step.BASE, "a", "b"]]


def test_a_variant_that_takes_minutes_is_a_row_and_delays_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "PATIENCE", -1.0)
    monkeypatch.setitem(variants.VARIANTS, "slow", variants.Variant(lambda subject: variants.Work(lambda: torch.ones(2)), "8/8"))
    row, made = step.prepare("slow", denoisers.Subject("wan-1.3b", tmp_path), None)
    assert made is None and row["reason"] == "TimeoutError: one step takes 0 s"


def test_tables_and_charts_are_written(tmp_path: Path) -> None:
    args = step.options().parse_args(["--output", str(tmp_path), "--model", "wan-1.3b"])
    records = Records(tmp_path / "step.jsonl")
    common = {"bits": "8/8", "note": "", "digest": step.digest(args), "layers_gop": 400.0, "attention_gop": 200.0, "error": 0.01}
    measured = {"status": "measured", "ms": 4000.0, "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0}
    records.add(common | measured | {"name": step.BASE})
    records.add(
        common
        | measured
        | {"name": "ours qvd-w8a8", "ms": 2000.0, "ratio": 2.0, "ratio_low": 1.9, "ratio_high": 2.1, "kernels": {"fast": 3}}
    )
    records.add(common | {"name": "quanto w8", "status": "not installed", "reason": "pip install --no-deps optimum-quanto"})
    text = step.write(records, args, LIMITS)
    assert "2.00 (1.90 to 2.10)" in text and "3 x fast" in text and "pip install" in text
    limit = 4 / (400 / 400 + 200e9 / LIMITS["registers"][machine.FLOAT])  # 4 s, and 400 G and 200 G at their peaks
    assert f"{limit:.2f} times as fast as eager {step.BASE}" in text
    assert (tmp_path / "step-wan-1.3b.png").stat().st_size > 1000
    assert len((tmp_path / "step-wan-1.3b.csv").read_text().splitlines()) == 4


def test_patterns_choose_variants() -> None:
    other = next(name for name in ("bf16", "fp32") if name != step.BASE)
    assert step.selected(f"{other}; ours w8*") == [other, "ours w8a16"]
    with pytest.raises(SystemExit, match="no variant matches 'nonsense'"):
        step.selected("nonsense")


def test_error_is_relative_root_mean_square() -> None:
    assert step.error_to(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])) == pytest.approx(0.1)


# --- denoisers and the machine --------------------------------------------------------------------------------------------------------


def test_the_row_of_bf16_is_computed_from_a_shallower_model(tmp_path: Path) -> None:
    """1000 MB bare, 200 of activations, and the checkpoint of the deep model instead of the shallow one's 300."""
    folder = tmp_path / "wan-14b-deep" / "float-bf16"
    folder.mkdir(parents=True)
    (folder / "one.safetensors").write_bytes(bytes(4_000_000))
    shallow = {"name": "bf16", "rss_bare_mb": 1000, "rss_build_mb": 1020, "rss_mb": 1500, "stored_mb": 300}
    base = denoiser_memory.computed(denoisers.Subject("wan-14b-deep", tmp_path), shallow)
    assert base["rss_mb"] == 1204 and base["stored_mb"] == 4
    ours = {"name": "ours", "rss_bare_mb": 1000, "rss_build_mb": 1010, "rss_mb": 1102, "stored_mb": 2}
    assert denoiser_memory.line(ours, base) == ["ours", "1102", "0.92", "102", "0.50", "2", "10"]


@pytest.mark.parametrize("name", denoisers.DENOISERS)
def test_denoisers_exist_and_take_their_inputs(name: str) -> None:
    import diffusers

    spec = denoisers.DENOISERS[name]
    with torch.device("meta"):
        denoiser = getattr(diffusers, spec.cls)(**spec.config)
    inputs = spec.inputs(denoiser, torch.bfloat16)
    floating = [
        value.dtype for key, value in inputs.items() if isinstance(value, torch.Tensor) and value.is_floating_point() and key != "timestep"
    ]
    assert set(floating) == {torch.bfloat16}
    assert 1e8 < denoisers.size(denoiser) < (4e9 if name.endswith("-deep") else 2e9)  # the memory of one machine


@pytest.mark.parametrize("recipe", variants.RECIPES)
def test_quick_recipes_keep_the_form_of_their_layers(recipe: str) -> None:
    full, quick = denoisers.load_recipe(recipe), denoisers.for_speed(recipe)
    assert quick.defaults == full.defaults and quick.rules == full.rules
    rewrites = [[step.mechanism for step in recipe.steps if step.axis == "transform"] for recipe in (quick, full)]
    assert rewrites[0] == rewrites[1]
    assert {step.mechanism for step in quick.steps if step.axis == "solve"} <= {"nearest"}


def test_peaks_come_from_registers_or_else_from_products(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.peak(LIMITS, "int8") == 4e11
    assert machine.peak(LIMITS | {"registers": {"reason": "no C compiler"}}, "int8") == 3.9e11
    assert "no C compiler" in machine.table(LIMITS | {"registers": {"reason": "no C compiler"}})
    for name, seconds in (("bf16", 2.0), ("fp32", 3.0)):
        monkeypatch.setattr(machine, "FLOAT", name)
        assert math.isclose(work.least_seconds({"layers_gop": 400, "attention_gop": 200}, LIMITS), seconds)


def test_commands_explain_themselves() -> None:
    assert isinstance(step.options(), argparse.ArgumentParser)
    assert "--model" in step.options().format_help()
