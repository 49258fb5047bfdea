"""Quantizing from disk to disk: the bits of a run in memory, whatever stops it in between."""

from __future__ import annotations

import fcntl
import importlib.metadata
import itertools
import json
import math
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import reelquant
from reelquant import CalibrationError, CheckpointError, RecipeError, UnsupportedError
from reelquant.checkpoint import Shards, Spec, new_folder, workspace, write_tensors
from reelquant.cli import app
from reelquant.discover import discover, stand_in
from reelquant.discover.lineage import extremes
from reelquant.engine.build import shared_rewrites
from reelquant.models.manifest import CARD, MANIFEST
from reelquant.models.pipelines import bundled_path
from reelquant.observe import Call, Geometry, InputStatistics, Watched
from reelquant.recipes.recipe import load_recipe
from reelquant.streaming import Job, Source, disk_store, estimate, pieces, pipeline, quantize_folder, run, write
from reelquant.streaming import job as job_
from reelquant.streaming.estimate import parse_bytes
from reelquant.streaming.journal import Journal
from reelquant.streaming.offload import OnDisk, hollow
from tests import processes
from tests.tiny.conditioned import made
from tests.tiny.configs import TINY
from tests.tiny.stock import MIXED, contents, frames, quantized_in_memory, realigned, room, stored_pipeline, wan_pipeline

SHORT = {"calibrate.prompts": 4, "search.prompts": 1, "search.steps": 2}
GPTQ = {
    "name": "gptq",
    "defaults": {"weight": {"format": "int4", "granularity": "group-16"}, "input": {"format": "int8", "slots": "per_step"}},
    "rules": [{"on": "role:entry | role:exit", "keep": True}],
    "calibrate": {"prompts": 4, "steps": 3, "ranges": "unseen"},
    "search": {"prompts": 1, "steps": 2},
    "steps": [
        {"transform": "rotate", "on": "*.net.2"},
        {"transform": "range_integrate", "power": [0.5, 1.0], "on": "role:main & !*.net.2"},
        {"solve": "gptq", "correct_bias": True, "on": "role:main | role:temporal | role:prompt"},
    ],
}
"""Everything that calibration can ask for: moments, rotated ranges, a search, folded norms, scales per step."""
LOWRANK = GPTQ | {
    "name": "lowrank",
    "steps": [
        {"transform": "shift", "on": "role:main"},
        {"branch": "lowrank", "rank": [4, 2], "share": 0.5, "on": "role:main"},
        {"solve": "gptq", "correct_bias": True, "on": "role:main | role:temporal | role:prompt"},
    ],
}
FORMS = LOWRANK | {
    "name": "forms",
    "defaults": {
        "weight": {"format": "int4", "granularity": "group-16"},
        "input": {"format": "int4", "granularity": "group-16", "dynamic": True},
    },
    "steps": [
        {"transform": "scale_search", "grid": 3, "lone": True, "rank": 2, "on": "role:main"},
        {"transform": "permute", "clusters": [1, 4], "on": "role:main"},
        {"transform": "rotate", "always": True, "signs": True, "block": 4, "on": "role:main"},
        {"branch": "lowrank", "rank": 2, "on": "role:main"},
        {"solve": "gptq", "correct_bias": True, "on": "role:main | role:temporal | role:prompt"},
    ],
}
"""Chains of operations on channels, planned from samples, a choice among them."""
LEARNED = LOWRANK | {
    "name": "learned",
    "guidance": "separate",
    "defaults": {"weight": {"format": "int3", "granularity": "group-16"}, "input": {"format": "uint8", "slots": "per_step"}},
    "steps": [
        {"branch": "lowrank", "rank": 2, "share": 0.5, "on": "role:main"},
        {"reconstruct": "adaround", "calls": 8, "iterations": 30, "rate": 0.2, "weight": 10.0, "on": "role:main"},
    ],
}
"""Codes that are learned beside branches, on calls of which each is one half of a guidance pair."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random pipeline on disk that says how it likes to be called."""
    return stored_pipeline(tmp_path_factory.mktemp("model") / "wan", max_shard_size="30KB")


def facts(report: Any) -> dict[str, Any]:
    """Everything but timings."""
    data = report.to_json() | {"parts": {name: facts(part) for name, part in report.parts.items()}}
    return {name: value for name, value in data.items() if name != "seconds"}


# ------------------------------------------------------------------------------------------------------------------ the same bits


SAME_BYTES: list[Any] = [  # both experts of a pipeline are calibrated in float32 with GPTQ below
    ("w4a16", torch.float32),
    ("nvfp4-w4a4", torch.bfloat16),
    (MIXED, torch.float32),
    (GPTQ, torch.bfloat16),
    (LOWRANK, torch.bfloat16),
    (FORMS, torch.float32),
    (LEARNED, torch.float32),
]
IN_THE_OTHER_DTYPE = [
    ("w4a16", torch.bfloat16),
    (MIXED, torch.bfloat16),
    (GPTQ, torch.float32),
    (LOWRANK, torch.float32),
    (FORMS, torch.bfloat16),
    (LEARNED, torch.bfloat16),
]
SAME_BYTES += [pytest.param(*case, marks=pytest.mark.full) for case in IN_THE_OTHER_DTYPE]


@pytest.mark.parametrize(("recipe", "dtype"), SAME_BYTES, ids=lambda one: one["name"] if isinstance(one, dict) else str(one))
def test_the_denoiser_is_that_of_a_run_in_memory_byte_for_byte(model: Path, recipe: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = quantized_in_memory(model, recipe, tmp_path / "memory", dtype)
    report = reelquant.quantize_folder(model, tmp_path / "disk", recipe, dtype=dtype)
    assert contents(tmp_path / "disk" / "transformer") == contents(tmp_path / "memory" / "transformer")
    assert facts(report) == facts(expected)
    assert not list(tmp_path.glob("*.partial"))
    assert bool(branches_in(recipe)) == any(key.endswith("svd_up") for key in Shards.of(tmp_path / "disk" / "transformer").specs)


def branches_in(recipe: Any) -> list[Any]:
    return [entry for entry in load_recipe(recipe).entries if entry.axis == "branch"]


def test_what_measures_the_whole_denoiser_is_refused_and_nothing_is_written(model: Path, tmp_path: Path) -> None:
    recipe = GPTQ | {"steps": [{"allocate": "milp", "bits": 6, "formats": ["int4/channel", "int8/channel"]}]}
    with pytest.raises(UnsupportedError, match="needs the model in memory, because 'allocate: milp' calls the whole denoiser"):
        reelquant.quantize_folder(model, tmp_path / "out", recipe)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tiny-dit", pytest.param("tiny-unet", marks=pytest.mark.full)])
@pytest.mark.full
def test_bundled_pipelines_too(name: str, tmp_path: Path) -> None:
    quick = {"calibrate.prompts": 2, "calibrate.steps": 2, "search.prompts": 1, "search.steps": 1}
    quantized_in_memory(bundled_path(name), "qvd-w4a8", tmp_path / "memory", **quick)
    reelquant.quantize_folder(name, tmp_path / "disk", "qvd-w4a8", overrides=quick)
    part = "transformer" if name == "tiny-dit" else "unet"
    assert contents(tmp_path / "disk" / part) == contents(tmp_path / "memory" / part)


def test_the_result_opens_and_other_components_are_copies(model: Path, tmp_path: Path) -> None:
    reelquant.quantize_folder(model, tmp_path / "out", "w8a16")
    made, source = contents(tmp_path / "out"), contents(model)
    for name, content in source.items():
        assert name.startswith("transformer/") or made[name] == content
    pipe = wan_pipeline()
    reelquant.quantize(pipe, "w8a16")
    assert torch.equal(frames(reelquant.load(tmp_path / "out")), frames(pipe))


def test_a_result_in_shards_is_that_of_diffusers(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "SHARD", 10_000)
    reelquant.quantize_folder(model, tmp_path / "disk", "w8a16")
    pipe = reelquant.open_pipeline(model)
    reelquant.quantize(pipe, "w8a16")
    reelquant.save(pipe, tmp_path / "memory", max_shard_size=10_000)
    assert contents(tmp_path / "disk" / "transformer") == contents(tmp_path / "memory" / "transformer")


def test_large_text_encoders_stay_on_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reelquant.quantize_folder(model, tmp_path / "resident", MIXED)
    opened: list[nn.Module] = []
    real = pipeline._text_encoder
    monkeypatch.setattr(job_, "LARGE", 1e12)
    monkeypatch.setattr(pipeline, "_text_encoder", lambda *words: opened.append(real(*words)) or opened[-1])
    reelquant.quantize_folder(model, tmp_path / "disk", MIXED)
    assert all(parameter.is_meta for parameter in opened[0].parameters())
    assert contents(tmp_path / "disk") == contents(tmp_path / "resident")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of two experts."""
    pipe = wan_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        second = type(pipe.transformer).from_config(pipe.transformer.config)
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=0.5)
    return stored_pipeline(tmp_path_factory.mktemp("experts") / "two", pipe)


EXPERTS = ("transformer", "transformer_2")


@pytest.mark.parametrize("recipe", ["w8a16", GPTQ, {"transformer": MIXED, "transformer_2": "w8a16"}], ids=["data-free", "together", "each"])
def test_both_experts_of_a_pipeline(two: Path, recipe: Any, tmp_path: Path) -> None:
    expected = quantized_in_memory(two, recipe, tmp_path / "memory")
    report = reelquant.quantize_folder(two, tmp_path / "disk", recipe)
    assert facts(report) == facts(expected)
    for name in EXPERTS:
        assert contents(tmp_path / "disk" / name) == contents(tmp_path / "memory" / name)


def test_one_of_two_experts(two: Path, tmp_path: Path) -> None:
    report = reelquant.quantize_folder(two, tmp_path / "out", "w8a16", components=["transformer_2"])
    assert report.component == "transformer_2"
    assert contents(tmp_path / "out" / "transformer") == contents(two / "transformer")


STEP_BITS = [{"inputs": [4, 8, 6], "weights": [3, 8, 8]}, {"on": "blocks.0", "inputs": [8, 5, 5]}]


@pytest.mark.parametrize(
    "change", [{"protect_steps": "auto"}, {"protect_steps": [0, -1]}, {"guidance": "apart"}, {"step_bits": STEP_BITS}], ids=str
)
def test_steps_and_halves_that_differ(model: Path, change: dict[str, Any], tmp_path: Path) -> None:
    recipe = MIXED | change
    expected = quantized_in_memory(model, recipe, tmp_path / "memory")
    report = reelquant.quantize_folder(model, tmp_path / "disk", recipe)
    assert contents(tmp_path / "disk" / "transformer") == contents(tmp_path / "memory" / "transformer")
    assert facts(report) == facts(expected)


def adapter(folder: Path, parts: tuple[str, ...] = ("transformer",)) -> Path:
    """An adapter of the second feed-forward layers of these denoisers; it moves the biggest weight of each by more than a step."""
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    for name, module in wan_pipeline().transformer.named_modules():
        if name.endswith("net.2"):
            out, ins = module.weight.shape
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, ins, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, 4, generator=generator)
    save_file({f"{part}.{name}": value for part in parts for name, value in tensors.items()}, folder / "style.safetensors")
    return folder / "style.safetensors"


@pytest.mark.parametrize("recipe", ["w8a16", MIXED], ids=["data-free", "calibrated"])
def test_adapters_are_merged_first(model: Path, recipe: Any, tmp_path: Path) -> None:
    lora = {str(adapter(tmp_path)): 0.5}
    expected = quantized_in_memory(model, recipe, tmp_path / "memory", lora=lora)
    report = reelquant.quantize_folder(model, tmp_path / "disk", recipe, lora=lora)
    assert contents(tmp_path / "disk" / "transformer") == contents(tmp_path / "memory" / "transformer")
    assert facts(report) == facts(expected) and report.adapters == {"style.safetensors": 0.5}


def test_adapters_of_what_is_only_copied_are_refused(two: Path, tmp_path: Path) -> None:
    lora = {str(adapter(tmp_path)): 1.0}
    with pytest.raises(UnsupportedError, match=r"the adapters change 'transformer', which is copied .* quantize 'transformer', too, or"):
        reelquant.quantize_folder(two, tmp_path / "out", "w8a16", components=["transformer_2"], lora=lora)
    with pytest.raises(CheckpointError, match=r"no adapter at 'gone\.safetensors'"):
        reelquant.quantize_folder(two, tmp_path / "new", "w8a16", lora={"gone.safetensors": 1.0})
    assert not list(tmp_path.glob("new*"))


def test_what_needs_memory_is_refused_where_it_would_be_streamed(model: Path, tmp_path: Path) -> None:
    def run(*more: str) -> Any:
        words = ["quantize", str(model), "-o", str(tmp_path / "out"), "--json", *more]
        return CliRunner().invoke(app, words)

    both = ["-r", "w8a16", "--components", "transformer,vae"]
    assert "'vae' is not a denoiser" in run(*both, "--max-memory", "8GB").stderr
    table = ["-r", "qvd-w8a8", "--set", "temporal=table", "--set", "calibrate.prompts=2", "--set", "calibrate.steps=2"]
    assert "needs the model in memory" in run(*table, "--resume").stderr
    assert not list(tmp_path.iterdir())
    report = json.loads(run(*both).stdout)
    assert list(report["parts"]) == ["transformer", "vae"]


@pytest.mark.parametrize("name", TINY)
def test_discovery_needs_no_values(name: str) -> None:
    model = TINY[name]()
    expected = discover(model)
    for module in model.modules():
        for key, value in module._parameters.items():
            module._parameters[key] = None if value is None else nn.Parameter(value.to("meta"))
    assert discover(stand_in(model)) == expected
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_stand_in_is_as_small_as_its_longest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = nn.Linear(1, 8)
    narrow.weight = nn.Parameter(torch.empty(8, 0))
    model = nn.Sequential(*[nn.Linear(256, 64) for _ in range(30)], narrow)
    model.register_parameter("positions", nn.Parameter(torch.empty(1, 5000, 10)))
    made: list[int] = []
    real = torch.randn
    monkeypatch.setattr(torch, "randn", lambda count, **named: made.append(count) or real(count, **named))
    monkeypatch.setattr(Tensor, "roll", None)
    twin = stand_in(model.to("meta"))
    assert made == [1 + 5000 * 10]
    first, second, *_, last = twin.children()
    assert last(torch.zeros(2, 0)).shape == (2, 8)
    assert not torch.equal(first(torch.ones(1, 256)), second(torch.ones(1, 256)))


def test_empty_tensors_have_no_extremes() -> None:
    low, high = extremes(torch.zeros(0, 3), -1)
    assert low.shape == high.shape == (3,) and bool(low.isnan().all())


def test_a_model_on_disk_holds_one_block_at_a_time(model: Path) -> None:
    disk = OnDisk(hollow(model / "transformer", torch.float32), Shards.of(model / "transformer"))
    blocks = ("blocks.0", "blocks.1")
    held: list[list[bool]] = []

    def look(*_: Any) -> None:
        held.append([all(not p.is_meta for p in disk.model.get_submodule(block).parameters()) for block in blocks])

    for block in blocks:
        disk.model.get_submodule(block).attn1.register_forward_pre_hook(look)
    arguments = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
    }
    with disk.running(blocks), torch.no_grad():
        found = disk.model(**arguments, return_dict=False)[0]
    assert held == [[True, False], [False, True]]
    assert all(parameter.is_meta for parameter in disk.model.parameters())
    with torch.no_grad():
        assert torch.equal(found, realigned(reelquant.open_pipeline(model).transformer)(**arguments, return_dict=False)[0])


# ----------------------------------------------------------------------------------------------------------------- killed, resumed


def killed_when(process: BaseProcess, reached: Callable[[], bool], errors: Path) -> bool:
    """Kill -9 at a moment of the work; False if it came to its end before that was seen, as on a machine with much other work."""
    until = time.monotonic() + 120
    while not reached():
        if not process.is_alive():
            assert process.exitcode == 0, errors.read_text()
            return False
        assert time.monotonic() < until, "the moment never came"
        time.sleep(0.004)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return True


def test_killed_at_every_stage_and_resumed_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "gptq.yaml"
    recipe.write_text(json.dumps(GPTQ))
    reelquant.quantize_folder(model, tmp_path / "whole", recipe)
    work = tmp_path / "out.partial" / "work" / "transformer"
    moments: dict[str, Callable[[], bool]] = {
        "planned": lambda: (tmp_path / "out.partial" / "work.json").is_file(),
        "sampling": lambda: len(list(work.glob("journal/calls/calibrate-transformer-*/*.safetensors"))) >= 5,
        "searching": lambda: len(list(work.glob("trials/*.json"))) >= 1,
        "building": lambda: len(list(work.glob("final/*/*.safetensors"))) >= 3,
    }
    words, errors = ("quantize", model, "-r", recipe, "-o", tmp_path / "out", "--resume"), tmp_path / "errors.txt"
    for reached in moments.values():
        for _ in range(5):
            if killed_when(processes.reelquant(words, errors), reached, errors):
                break
            shutil.rmtree(tmp_path / "out")  # missed: once more, from the start
        assert not (tmp_path / "out").exists()
    last = processes.reelquant(words, errors)
    last.join()
    assert last.exitcode == 0, errors.read_text()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def stopped(model: Path, target: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch, after: int = 3) -> None:
    """A run that dies while it stores the layer after so many."""
    real, count = disk_store.write_piece, [0]

    def store(*words: Any) -> None:
        count[0] += 1
        if count[0] > after:
            raise KeyboardInterrupt
        real(*words)

    monkeypatch.setattr(disk_store, "write_piece", store)
    with pytest.raises(KeyboardInterrupt):
        reelquant.quantize_folder(model, target, recipe)
    monkeypatch.setattr(disk_store, "write_piece", real)


def test_work_that_is_done_is_not_done_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(model, tmp_path / "out", MIXED, monkeypatch)
    made, called = list[str](), list[str]()
    build, remember = disk_store.build_layer, Journal._remember
    monkeypatch.setattr(
        disk_store, "build_layer", lambda context, shared, row, choice: made.append(row) or build(context, shared, row, choice)
    )
    monkeypatch.setattr(
        Journal, "_remember", lambda self, record, output: called.append(record.parent.name) or remember(self, record, output)
    )
    report = reelquant.quantize_folder(model, tmp_path / "out", MIXED, resume=True)
    assert len(made) == len(report.layers) - 3
    assert len(set(called)) == 1  # neither calibration nor the float clips: only the check of the quantized model


def test_resuming_other_work_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(model, tmp_path / "out", "w8a16", monkeypatch)
    with pytest.raises(CheckpointError, match="begun with another recipe"):
        reelquant.quantize_folder(model, tmp_path / "out", "w4a16", resume=True)
    with pytest.raises(CheckpointError, match="begun with another dtype"):
        reelquant.quantize_folder(model, tmp_path / "out", "w8a16", dtype=torch.bfloat16, resume=True)
    with monkeypatch.context() as other:
        other.setattr(importlib.metadata, "version", lambda name, real=importlib.metadata.version: real(name) + "x" * (name == "diffusers"))
        with pytest.raises(CheckpointError, match="begun with another diffusers"):
            reelquant.quantize_folder(model, tmp_path / "out", "w8a16", resume=True)
    with pytest.raises(CheckpointError, match=r"begun with another layers"):
        reelquant.quantize_folder(model, tmp_path / "out", "w8a16", skip=["blocks.0"], resume=True)
    os.utime(model / "transformer" / "config.json", (1, 1))
    with pytest.raises(CheckpointError, match="begun with another source"):
        reelquant.quantize_folder(model, tmp_path / "out", "w8a16", resume=True)
    with pytest.raises(CheckpointError, match=r"holds an interrupted run; go on with resume=True"):
        reelquant.quantize_folder(model, tmp_path / "out", "w8a16")
    reelquant.quantize_folder(model, tmp_path / "out", "w4a16", resume=True, force=True)
    assert (tmp_path / "out" / "model_index.json").is_file()


def statistics_of(name: str, geometry: Geometry, generator: torch.Generator, *wanted: str) -> InputStatistics:
    """Empty statistics of a linear layer's input."""
    return InputStatistics.for_input(Watched(name, geometry, -1, 1, "main", 1, generator, frozenset(wanted), 1, 1))


@pytest.mark.parametrize("added_up", [False, True])
def test_what_was_logged_comes_back_on_the_device_of_the_model(added_up: bool, tmp_path: Path) -> None:
    geometry, generator = Geometry(4), torch.Generator()

    def empty() -> InputStatistics:
        return statistics_of("layer", geometry, generator, "gram")

    written, own = Journal(tmp_path), empty()
    x = torch.randn(16, 4)
    written.write(0, own, own.look(x, Call(0)), Call(0))
    if added_up:
        written._call = 1
        written._compact(0, "gram", empty().gram)
    written._remember(tmp_path / "call", {"sample": x})
    found = Journal(tmp_path, "meta").read(0, empty())
    assert {value.device.type for value in (*found.range.envelope(), found.gram.mean, found.gram.covariance)} == {"meta"}
    assert found.rows.rows.device.type == "cpu"
    assert Journal(tmp_path, "meta")._recall(tmp_path / "call").sample.is_meta


def test_statistics_are_laid_out_once(tmp_path: Path) -> None:
    geometry, generator, made = Geometry(4), torch.Generator(), list[str]()

    def make() -> Any:
        made.append("table")
        table = {name: statistics_of(name, geometry, generator) for name in ("a", "b")}
        return table, table

    journal = Journal(tmp_path)
    logged, known = journal.keep(make, generator)
    for name in ("a", "b"):
        logged[name].update(torch.randn(16, 4), Call(0))
    first = known["a"].rows.rows
    assert known["b"].range.seen == [0]
    assert torch.equal(known["a"].rows.rows, first) and len(made) == 1


# -------------------------------------------------------------------------------------------------------------------- what goes wrong


def test_a_second_process_is_refused(model: Path, tmp_path: Path) -> None:
    held = tmp_path / "out.partial"
    held.mkdir()
    with (held / "lock").open("w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="process 4711 is writing"):
            reelquant.quantize_folder(model, tmp_path / "out", "w8a16", resume=True)


def small_files() -> None:
    """From now on this process writes no longer files, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_is_one_error_and_the_work_is_kept(model: Path, tmp_path: Path) -> None:
    words, errors = ("quantize", model, "-r", "w8a16", "-o", tmp_path / "out", "--resume"), tmp_path / "errors.txt"
    process = processes.reelquant(words, errors, small_files)
    process.join()
    error = errors.read_text()
    assert process.exitcode == 1
    assert len(error.splitlines()) == 1 and "--resume" in error, error
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.partial").rglob("final/*/*.safetensors"))
    again = processes.reelquant(words, errors)
    again.join()
    assert again.exitcode == 0, errors.read_text()
    reelquant.quantize_folder(model, tmp_path / "whole", "w8a16")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_interrupted_run_says_where_its_work_is(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*words: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(disk_store, "write_piece", interrupted)
    result = CliRunner().invoke(app, ["quantize", str(model), "-r", "w8a16", "-o", str(tmp_path / "out"), "--resume", "--json"])
    assert f"finished work is in '{tmp_path / 'out'}.partial': continue with --resume" in result.stderr


def test_a_gate_on_what_does_not_fit_is_refused_before_the_work(model: Path, tmp_path: Path) -> None:
    words = ["quantize", str(model), "-r", "w8a16", "-o", str(tmp_path / "out"), "--max-memory", "1MB", "--gate", "default"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "on a bigger machine" in " ".join(result.stderr.replace("│", " ").split())


def test_too_little_room_is_found_before_the_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"has 0.001 MB free, the work takes"):
        reelquant.quantize_folder(model, tmp_path / "out", "w8a16")


def test_too_little_room_for_what_has_to_be_remembered_is_found_at_the_first_call(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job.of(Source.open(model), {"transformer": load_recipe(MIXED)}, None, (), {}, 10**10)
    free = job.estimate().disk + 1000
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free})())
    with pytest.raises(CheckpointError, match=r"the work takes .* calibrate with shorter, smaller clips"):
        quantize_folder(job, tmp_path / "out")
    assert len(list((tmp_path / "out.partial").rglob("calls/*/*.safetensors"))) == 1


def test_a_search_keeps_no_more_on_disk_than_was_estimated(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"search.scope": "family", "search.steps": 1, "calibrate.prompts": 2, "calibrate.steps": 2}
    job = Job.of(Source.open(model), {"transformer": load_recipe(GPTQ, changes)}, None, (), {}, 10**10)
    rooms: list[int] = []
    most = [0]
    forget = Journal.forget

    def watched(journal: Journal, phase: str) -> None:
        work = tmp_path / "out.partial"
        most[0] = max(most[0], sum(file.stat().st_size for file in work.rglob("*") if file.is_file()))
        forget(journal, phase)

    monkeypatch.setattr(Journal, "forget", watched)
    monkeypatch.setattr(run, "check_room", lambda work, expected, output=0: rooms.append(output))
    monkeypatch.setattr(run, "copy_others", lambda job, work: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        quantize_folder(job, tmp_path / "out")
    expected = job.estimate()
    phases = list((tmp_path / "out.partial").glob("work/*/journal/calls/*"))
    assert len(phases) == 4  # calibration, the float clips of the check and of the trials, the check
    assert len(rooms) == 2 and rooms[1] > 0
    assert 0.1 < most[0] / (expected.disk + expected.outputs * rooms[1]) <= 1


def test_components_beside_the_denoiser_count_where_they_are_held(model: Path) -> None:
    def job(recipe: Any, budget: int) -> Job:
        return Job.of(Source.open(model), {"transformer": load_recipe(recipe)}, None, (), {}, budget)

    pipe = wan_pipeline()
    text, vae = (sum(4 * value.numel() for value in part.state_dict().values()) for part in (pipe.text_encoder, pipe.vae))
    assert job(MIXED, 10**10).resident == pytest.approx(text + vae, rel=0.05)
    assert job(MIXED, 1000).offloaded == ["text_encoder"] and job(MIXED, 1000).resident == pytest.approx(vae, rel=0.05)
    assert not job("w8a16", 10**10).opens


def test_layers_whose_shared_input_is_transformed_are_counted_together(model: Path) -> None:
    plan = Job.of(Source.open(model), {"transformer": load_recipe(GPTQ)}, None, (), {}, 10**10).plans["transformer"]
    groups = [[plan.layers[name] for name in group.layers if plan.layers[name].skipped is None] for group in plan.map.groups]
    weights = [sum(math.prod(row.layer.shape) for row in rows) for rows in groups if shared_rewrites(rows)]
    assert max(estimate._transforming(plan).values()) == 8 * max(weights)


def test_free_memory_is_what_the_control_group_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "CGROUP", tmp_path)
    machine = estimate.free_memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert estimate.free_memory() == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200000\nactive_file 7\n")
    assert estimate.free_memory() == 500_000


def test_no_layer_is_built_that_does_not_fit(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_, "build_layer", None)
    for more in (["--dry-run"], ["-o", str(tmp_path / "out")]):
        result = CliRunner().invoke(app, ["quantize", str(model), "-r", "w8a16", "--max-memory", "1MB", *more])
        assert "--max-memory 1 MB is too little" in result.stderr and "Error" not in result.stderr


def test_too_little_memory_is_found_before_the_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--max-memory 1 MB is too little: .* take .* allow that much"):
        reelquant.quantize_folder(model, tmp_path / "out", "w8a16", max_memory="1MB")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_the_work_takes(model: Path) -> None:
    budget = room()
    result = CliRunner().invoke(app, ["quantize", str(model), "-r", "qvd-w8a8", "--dry-run", "--json", "--max-memory", budget])
    told = json.loads(result.stdout)["estimate"]
    assert told["budget"] == int(budget) and not told["streams"]
    assert told["calls"] > 0 and told["seconds"] > 0
    assert 0 < told["result"] < told["source"] < told["disk"]
    assert "What it takes" in CliRunner().invoke(app, ["quantize", str(model), "-r", "w8a16", "--dry-run"]).stdout


def test_the_estimated_result_is_near_the_real_one(model: Path, tmp_path: Path) -> None:
    job = Job.of(Source.open(model), {"transformer": load_recipe("w4a16")}, None, (), {}, 10**10)
    quantize_folder(job, tmp_path / "out")
    made = sum(len(content) for content in contents(tmp_path / "out" / "transformer").values())
    others = sum(len(content) for name, content in contents(tmp_path / "out").items() if not name.startswith("transformer"))
    assert job.estimate().result == pytest.approx(made + others, rel=0.2)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    pipe = wan_pipeline()
    with torch.no_grad():
        pipe.transformer.blocks[1].ffn.net[2].weight[0, 0] = torch.nan
    pipe.save_pretrained(tmp_path / "bad")
    with pytest.raises(CalibrationError, match=r"the weight of layer 'blocks\.1\.ffn\.net\.2' holds NaN or inf"):
        reelquant.quantize_folder(tmp_path / "bad", tmp_path / "out", "w8a16")
    assert not (tmp_path / "out").exists()


def test_quantized_folders_and_unknown_components_are_refused(model: Path, tmp_path: Path) -> None:
    reelquant.quantize_folder(model, tmp_path / "out", "w8a16")
    with pytest.raises(UnsupportedError, match="is quantized; give the folder of the float pipeline"):
        reelquant.quantize_folder(tmp_path / "out", tmp_path / "twice", "w8a16")
    with pytest.raises(UnsupportedError, match="'vae' is not a denoiser"):
        reelquant.quantize_folder(model, tmp_path / "twice", "w8a16", components=["vae"])


def test_a_folder_that_is_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not a working folder"), workspace(tmp_path / "out", {}, force=True):
        pass
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_a_folder_that_appears_during_the_work_stays(tmp_path: Path) -> None:
    def work(**options: Any) -> None:
        with workspace(tmp_path / "out", {}, **options) as made:
            (made.result / "model_index.json").touch()
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "thesis.txt").write_text("mine")

    with pytest.raises(CheckpointError, match="already exists"):
        work()
    with pytest.raises(CheckpointError, match="is not a pipeline folder"):
        work(force=True)
    with pytest.raises(CheckpointError, match="already exists"), new_folder(tmp_path / "new"):
        (tmp_path / "new").mkdir()
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """Inside, the disk takes so many bytes a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_error_whoever_writes(tmp_path: Path) -> None:
    told = r"cannot write '.*out': .* go on with resume=True"
    with pytest.raises(CheckpointError, match=told), workspace(tmp_path / "out", {}), files_of_at_most(1000):
        pieces.write_piece(tmp_path / "layer.safetensors", {"weight": torch.zeros(1000)}, {})


class Killed(BaseException):
    """Ends the work where it is."""


@contextmanager
def killed_before(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the change of the disk with this number does not come."""
    changes = itertools.count()

    def fatal(real: Any) -> Any:
        def change(*words: Any, **named: Any) -> Any:
            if next(changes) >= number:
                raise Killed
            return real(*words, **named)

        return change

    with monkeypatch.context() as patched, suppress(Killed):
        for name in ("mkdir", "unlink", "replace", "rename", "write_text"):
            patched.setattr(Path, name, fatal(getattr(Path, name)))
        patched.setattr(shutil, "rmtree", fatal(shutil.rmtree))
        yield


def test_work_can_go_on_wherever_beginning_and_ending_it_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(out: Path, what: str, **options: Any) -> None:
        with workspace(out, {"what": what}, **options) as made:
            made.result.joinpath("model_index.json").touch()
            assert not (made.folder / "old").exists()

    for number in itertools.count():  # until the work ends before the change that would have killed it
        out = tmp_path / f"out{number}"
        with suppress(Killed), workspace(out, {"what": "old"}) as made:
            (made.folder / "old").touch()
            raise Killed
        ended = False
        with killed_before(number, monkeypatch):
            work(out, "new", force=True)
            ended = True
        work(out, "new", resume=True, force=True)
        assert (out / "model_index.json").is_file() and not out.with_name(f"{out.name}.partial").exists(), number
        if ended:
            break
    assert number > 10


# --------------------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(("text", "count"), [("8GB", 8 * 10**9), ("500 mb", 500 * 10**6), ("1.5GiB", 3 * 2**29), (1000, 1000), ("12", 12)])
def test_sizes(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "8 bananas", "-1GB", "0", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match="is not an amount of memory"):
        parse_bytes(text)


def test_files_are_those_of_safetensors_byte_for_byte(tmp_path: Path) -> None:
    kinds = [torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.int64]
    tensors = {f"t{i}": torch.arange(6).reshape(2, 3).to(kind) for i, kind in enumerate(kinds)}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "ähnlich": torch.ones(5)}
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    write_tensors(
        tmp_path / "ours.safetensors", {name: Spec(value.dtype, tuple(value.shape)) for name, value in tensors.items()}, tensors.__getitem__
    )
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline, to break."""
    shutil.copytree(model, tmp_path / "wan")
    return tmp_path / "wan"


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Source.open(folder)


def test_missing_shards_and_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        Shards.of(tmp_path)
    first = sorted((folder / "transformer").glob("*.safetensors"))[0]
    content = first.read_bytes()
    first.unlink()
    refused(folder, f"names '{first.name}', which is not there")
    first.write_bytes(content[:100])
    refused(folder, "truncated or corrupt")


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_component_without_its_weights_is_an_interrupted_download(folder: Path, part: str) -> None:
    for file in (folder / part).glob("*.safetensors*"):
        file.unlink()
    refused(folder, f"{part}' holds no weights")
    shutil.rmtree(folder / part)
    refused(folder, f"lacks its component '{part}'")


def test_a_lost_shard_of_a_part_that_is_only_copied_is_named(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    refused(folder, r"names 'gone\.safetensors', which is not there")
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    refused(folder, "has no weight_map")


def test_links_to_nothing_are_named(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer" / "tokenizer.json").symlink_to(folder / "gone")
    refused(folder, r"tokenizer\.json' is a link to nothing")


def test_configs_that_are_no_json_are_named(folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text("{")
    refused(folder, r"transformer/config\.json' is not JSON")
    (folder / "transformer" / "config.json").unlink()
    refused(folder, r"cannot read '.*transformer/config\.json' \(No such file")
    (folder / "model_index.json").write_text("[]")
    refused(folder, r"model_index\.json' must hold a JSON object")


def test_components_behind_links_are_copied_and_remembered(folder: Path, tmp_path: Path) -> None:
    (folder / "vae").rename(folder / "shared")
    (folder / "vae").symlink_to(folder / "shared")
    (folder / "vae" / "up").symlink_to(folder / "vae")
    reelquant.quantize_folder(folder, tmp_path / "out", "w8a16")
    assert contents(tmp_path / "out" / "vae") == contents(folder / "shared")
    assert {"vae/config.json", "model_index.json"} <= set(Source.open(folder).files())
    for file in (folder / "vae").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    refused(folder, r"vae/diffusion_pytorch_model.*\.bin' is a pickle file")


def test_an_output_may_lie_in_the_folder_of_its_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(folder, folder / "out", "w8a16", monkeypatch)
    reelquant.quantize_folder(folder, folder / "out", "w8a16", resume=True)
    expected = {path.name for path in folder.iterdir()} - {"out"} | {"report.json", MANIFEST, CARD}
    assert {path.name for path in (folder / "out").iterdir()} == expected


def test_what_the_libraries_cannot_open_is_told_as_such(folder: Path, tmp_path: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot open pipeline '.*wan': "):
        reelquant.quantize_folder(folder, tmp_path / "out", MIXED)


@pytest.mark.parametrize("skip", [[], ["transformer_blocks.*.norm1.*"]])
def test_a_part_of_a_block_that_is_called_from_outside_stays_in_memory(skip: list[str], tmp_path: Path) -> None:
    """DiT asks the norm of its first block for the embedding that all blocks share."""
    made("dit").save_pretrained(tmp_path / "float")
    settings: dict[str, Any] = {"overrides": {"calibrate.prompts": 1, "search.prompts": 1, "rules": []}, "skip": skip}
    call: dict[str, Any] = {"class_labels": 3, "num_inference_steps": 2}
    reelquant.quantize_folder(tmp_path / "float", tmp_path / "disk", "minmax-w8a8", max_memory="64GB", **settings, **call)
    pipe = reelquant.open_pipeline(tmp_path / "float")
    realigned(pipe.transformer), realigned(pipe.vae)
    plan = reelquant.plan(pipe, "minmax-w8a8")
    assert plan.map.apart == ("transformer_blocks.0.norm1.emb",)
    reelquant.save(pipe, tmp_path / "memory", reelquant.quantize(pipe, "minmax-w8a8", **settings, **call))
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "disk" / weights).read_bytes() == (tmp_path / "memory" / weights).read_bytes()
