"""``reelquant benchmark`` on a bundled pipeline at few steps: what is measured, printed and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import reelquant
from reelquant import CheckpointError, UnsupportedError
from reelquant.cli import app
from reelquant.cli.benchmark import _slower
from reelquant.evidence import speed
from reelquant.evidence.speed import Benchmark, Spread
from reelquant.kernels import native_float

CALL = {"num_inference_steps": 3, "num_frames": 5}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> str:
    """``tiny-dit`` with int8 weights, in a folder."""
    pipe = reelquant.open_pipeline("tiny-dit")
    report = reelquant.quantize(pipe, "w8a16")
    return str(reelquant.save(pipe, tmp_path_factory.mktemp("speed") / "out", report))


def test_times_memory_and_kernels_are_measured(quantized: str) -> None:
    found = reelquant.benchmark(quantized, "tiny-dit", rounds=2, **CALL)
    assert found.speedup.low <= found.speedup.median <= found.speedup.high
    assert found.step_speedup is not None
    for variant in ("reference", "test"):
        assert 0 < found.step_seconds[variant].median < found.seconds[variant].median
    kind = native_float()
    assert 0.8 < found.weight_bytes["test"] / found.weight_bytes["reference"] * kind.itemsize < 1.4  # int8 and a few floats
    assert found.peak_bytes["reference"] > found.weight_bytes["reference"]
    assert found.kernels == {"float products": 63} and not found.simulated
    data = found.to_json()
    assert data[f"speedup_vs_{speed.SHORT[kind]}"] == found.speedup.median and data["peak_memory_ratio"] > 0
    assert data["data"]["call"]["num_inference_steps"] == 3 and json.dumps(data)


def test_the_verb_prints_a_table_or_one_document(quantized: str) -> None:
    call = ["--steps", "2", "--frames", "5", "-n", "1", "--no-memory", "--dtype", "float32"]
    command = ["benchmark", quantized, "--reference", "tiny-dit", *call]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    for words in ("whole clip", "one step", "x as fast", "weights of the denoiser", "float products (63)", "nothing is simulated"):
        assert words in shown.stdout
    assert "peak memory" not in shown.stdout
    document = json.loads(CliRunner().invoke(app, [*command, "--json", "--threads", str(torch.get_num_threads())]).stdout)
    assert document["speedup_vs_fp32"] == document["speedup"]["median"] and document["peak_memory_bytes"] is None


@pytest.mark.full
def test_the_quantized_pipeline_may_run_as_a_graph(quantized: str) -> None:
    pytest.importorskip("openvino", reason="pip install openvino", exc_type=ImportError)
    found = reelquant.benchmark(quantized, "tiny-dit", rounds=1, runtime="openvino", **CALL)
    assert found.kernels == {"openvino float products": 63} and found.data["runtime"] == "openvino"
    assert found.peak_bytes["test"] > 0  # a graph was made in the fresh process as well


def test_times_are_not_lost_when_memory_cannot_be_measured(quantized: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "__name__", "reelquant.no_such_module")
    found = reelquant.benchmark(quantized, "tiny-dit", rounds=1, **CALL)
    assert found.speedup.median > 0 and found.peak_bytes == {} and found.to_json()["peak_memory_ratio"] is None
    assert "No module named 'reelquant.no_such_module'" in found.data["peak_memory_failed"]


def test_what_cannot_be_measured_is_refused(quantized: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'tiny-dit' holds no quantized layer"):
        reelquant.benchmark("tiny-dit", "tiny-dit", rounds=1, memory=False, **CALL)
    with pytest.raises(CheckpointError, match="no pipeline at"):
        reelquant.benchmark(quantized, tmp_path / "nothing", rounds=1)


@pytest.mark.parametrize(("values", "expected"), [([2.0], (2, 2, 2)), ([3.0, 1.0, 2.0], (2, 1, 3)), ([1.0, 2.0, 3.0, 4.0, 5.0], (3, 2, 4))])
def test_medians_and_quartiles(values: list[float], expected: tuple[float, float, float]) -> None:
    found = Spread.of(values)
    assert (found.median, found.low, found.high) == expected


@pytest.mark.parametrize(
    ("ratio", "runtime", "device", "told"),
    [(0.8, "torch", "cpu", True), (1.1, "torch", "cpu", False), (0.8, "openvino", "cpu", False), (0.8, "torch", "cuda", False)],
)
def test_what_would_help_is_said_where_a_quantized_denoiser_lost(ratio: float, runtime: str, device: str, told: bool) -> None:
    spread = Spread.of([ratio])
    made = Benchmark(spread, spread, {}, {}, {}, {}, {}, {}, False, None, {"runtime": runtime, "device": device})
    assert bool(_slower(made)) == told and ("--runtime openvino" in str(_slower(made))) == told
