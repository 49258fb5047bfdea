"""Folders that appear complete or not at all, what config.json says, checksums, and the registration with diffusers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reelquant import CheckpointError, UnsupportedError
from reelquant.checkpoint import Slots, Stored, check_target, describe, new_folder, tile_checksum, verify
from reelquant.checkpoint import folder as checkpoint_folder
from reelquant.checkpoint.stored import adopt
from reelquant.nn import LayerLayout, LayerTensors, QuantLinear, TensorLayout

INT8 = LayerLayout(TensorLayout("int8", "channel"))


def layer(rows: int = 20, layout: LayerLayout = INT8) -> QuantLinear:
    """``rows`` x 4 codes that count up, scale 1, bias 0."""
    new = QuantLinear(4, rows, True, layout, device="cpu")
    codes = torch.arange(rows * 4).reshape(rows, 4) % 100
    new.fill(LayerTensors(codes.to(torch.int8), torch.ones(rows), torch.zeros(rows)))
    return new


# --------------------------------------------------------------------------------------------------------------------- folders


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_appears_under_its_name_with_its_parents(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
        assert folder.parent == tmp_path / "a"
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    assert left(tmp_path / "a") == ["b"]


def write(target: Path, error: BaseException) -> None:
    """Start a folder and stop."""
    with new_folder(target) as folder:
        (folder / "file").write_text("x")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_folder_whose_writing_fails(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write(tmp_path / "a" / "b", error())
    assert left(tmp_path) == []


def test_a_full_disk_is_one_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write '.*/b': .*No space left on device; nothing is left behind"):
        write(tmp_path / "b", OSError(28, "No space left on device"))
    assert left(tmp_path) == []


def test_a_parent_that_is_a_file_is_one_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot write"), new_folder(tmp_path / "file" / "b"):
        pytest.fail("the block must not run")


def test_an_existing_folder_is_refused_without_force(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"already exists; .*force=True \(--force\)"), new_folder(tmp_path):
        pytest.fail("the block must not run")


def test_force_replaces_pipelines_only(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="is not a pipeline folder"):
        check_target(tmp_path / "home", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is not a pipeline folder"):
        check_target(tmp_path / "file", force=True)
    (tmp_path / "empty").mkdir()
    assert check_target(tmp_path / "empty", force=True) == tmp_path / "empty"


def old_pipeline(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text("old")
    return folder


def test_force_removes_the_old_folder_once_the_new_one_is_complete(tmp_path: Path) -> None:
    target = old_pipeline(tmp_path / "out")
    with new_folder(target, force=True) as folder:
        (folder / "new").write_text("x")
        assert left(target) == ["model_index.json"]
    assert left(target) == ["new"]
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    target = old_pipeline(tmp_path / "out")
    with pytest.raises(error), new_folder(target, force=True):
        raise error
    assert (target / "model_index.json").read_text() == "old"
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    target, calls, rename = old_pipeline(tmp_path / "out"), [], Path.rename

    def sometimes(self: Path, other: Path) -> Any:
        calls.append(other)
        if len(calls) == failing:
            raise PermissionError(13, "Permission denied")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", sometimes)
    monkeypatch.setattr(checkpoint_folder, "exchange", lambda one, other: False)  # a disk that cannot
    with pytest.raises(CheckpointError, match="Permission denied"), new_folder(target, force=True):
        pass
    assert (target / "model_index.json").read_text() == "old"
    assert left(tmp_path) == ["out"]


# ----------------------------------------------------------------------------------------------------------- config and checksums


def test_layers_of_one_layout_share_a_group() -> None:
    four = LayerLayout(TensorLayout("int4", "group-64"), TensorLayout("uint8", "tensor"), shift=True)
    layers, checksums = {"a": INT8, "b": four, "c": INT8}, {"a": "1", "b": "2", "c": "3"}
    stored = Stored(layers, checksums, ("d",), Slots((999.0, 0.5), "t"), {"name": "x"}, "77", "0.1")
    data = stored.to_json()
    assert data["config_groups"] == {
        "group_0": {"targets": ["a", "c"], "weights": {"format": "int8", "granularity": "channel"}, "input_activations": None},
        "group_1": {
            "targets": ["b"], "weights": {"format": "int4", "granularity": "group-64"},
            "input_activations": {"format": "uint8", "granularity": "tensor"}, "shift": True,
        },
    }  # fmt: skip
    assert data["quant_method"] == "reelquant"
    assert Stored.from_json(data) == stored


def test_the_checksum_sees_codes_and_scales_but_not_the_bias() -> None:
    first = tile_checksum(layer())
    assert tile_checksum(layer()) == first
    changed = layer()
    changed.bias.data += 1
    assert tile_checksum(changed) == first
    changed.weight.data[0, 0] += 1
    assert tile_checksum(changed) != first
    changed = layer()
    changed.weight_scale[7] *= 1 + 2**-20
    assert tile_checksum(changed) != first


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_small_layers_have_checksums_too(rows: int) -> None:
    changed = layer(rows)
    changed.weight.data[-1, -1] += 1
    assert tile_checksum(changed) != tile_checksum(layer(rows))


def test_verification_names_the_layer(tmp_path: Path) -> None:
    model = nn.Sequential(layer(), nn.Sequential(layer()))
    checksums = {"0": tile_checksum(model[0]), "1.0": tile_checksum(model[0])}
    assert verify(model, checksums) == 2
    with pytest.raises(CheckpointError, match=r"layer '1\.0' has checksum"):
        verify(model, checksums | {"1.0": "0"})
    model[0].bias.data[3] = torch.inf
    with pytest.raises(CheckpointError, match=r"'0\.bias' holds NaN or inf"):
        verify(model, checksums)


def test_layers_offloaded_to_meta_are_passed_over() -> None:
    model = nn.Sequential(layer(), layer().to("meta"))
    assert verify(model, {"0": tile_checksum(model[0]), "1": "unknown"}) == 1


def test_a_description_lists_what_stays_float() -> None:
    stored = describe(nn.Sequential(layer(), nn.Linear(20, 2), nn.ReLU()), {"name": "x"}, "77")
    assert (list(stored.layers), stored.ignore, stored.slots) == (["0"], ("1",), None)


def test_models_that_are_not_of_diffusers_cannot_be_described() -> None:
    with pytest.raises(UnsupportedError, match="Sequential is not a model of diffusers or transformers"):
        adopt(nn.Sequential(layer()))


# ------------------------------------------------------------------------------------------------------------------ registration


AUTO = """
import time
time.sleep(0.05)  # long enough for other threads to meet it half imported
AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING = {}, {}
"""
PLUGIN = """
import sys, types
plugin = types.SimpleNamespace(METHOD="reelquant", ReelQuantConfig="config", ReelQuantizer="quantizer")
sys.modules["reelquant.integrations.diffusers"] = plugin
"""
SHOW = """
from diffusers.quantizers import auto
print(auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
"""
REGISTERED = "{'reelquant': 'quantizer'} {'reelquant': 'config'}"


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[str], str]:
    """Runs code in a new interpreter, whose diffusers is a stand-in that imports at once; gives what it prints."""
    for package in ("diffusers", "diffusers/quantizers"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "diffusers/quantizers/auto.py").write_text(AUTO)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3] / "src")])

    def run(code: str) -> str:
        command = [sys.executable, "-W", "error", "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": paths}).stdout.strip()

    return run


def test_importing_reelquant_loads_neither_torch_nor_diffusers(fresh: Callable[[str], str]) -> None:
    code = "import sys, reelquant; print(sorted({name.split('.')[0] for name in sys.modules} & {'diffusers', 'torch', 'triton'}))"
    assert fresh(code) == "[]"


@pytest.mark.parametrize("imports", ["import reelquant, diffusers", "import diffusers.quantizers.auto, reelquant"])
def test_diffusers_knows_reelquant_in_whatever_order_they_are_imported(fresh: Callable[[str], str], imports: str) -> None:
    assert fresh(PLUGIN + imports + SHOW) == REGISTERED


def test_registration_stands_a_reload_and_many_threads(fresh: Callable[[str], str]) -> None:
    code = """
import importlib, threading, reelquant
from reelquant.integrations.register import _Watcher, install
importlib.reload(reelquant)
threads = [threading.Thread(target=job) for job in [lambda: importlib.import_module("diffusers.quantizers.auto"), install] * 8]
[t.start() for t in threads]; [t.join() for t in threads]
print(sum(isinstance(finder, _Watcher) for finder in sys.meta_path))
"""
    assert fresh(PLUGIN + code + SHOW) == "1\n" + REGISTERED


def test_an_import_of_diffusers_survives_a_registration_that_fails(fresh: Callable[[str], str]) -> None:
    code = "import sys, logging, reelquant; sys.modules['reelquant.integrations.diffusers'] = None; logging.disable()"
    assert fresh(code + SHOW) == "{} {}"


def test_registering_again_is_harmless() -> None:
    from diffusers.quantizers import auto

    from reelquant.integrations.register import install

    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    threads = [threading.Thread(target=install) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == auto.AUTO_QUANTIZER_MAPPING
