"""Golden folders of a released format: newer code opens them, computes the same bits, and writes the same tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reelquant.nn import quantized_layers
from tests.golden.make_checkpoints import CHECKPOINTS, hashes_of, outputs_of, quantized, with_float_layers
from tests.tiny.stock import realigned

FOLDERS = sorted(CHECKPOINTS.glob("format-*/*"))
NAMES = [f"{folder.parent.name}/{folder.name}" for folder in FOLDERS]
WEIGHTS = "diffusion_pytorch_model.safetensors"
FLAGS = {"slots", "rotate", "shift", "scale", "bias", "table", "unused", "halves", "lasting"}
OF_TENSORS = {"format", "granularity", "levels", "dynamic", "range"}
TENSORS = {"weight", "bias", "weight_scale", "weight_zero_point", "weight_levels", "input_scale", "input_zero_point", "input_levels"}
TENSORS |= {"pre_quant_shift", "pre_quant_scale", "output_table"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The stored outputs were computed by one thread; more threads add the terms of a sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=FOLDERS, ids=NAMES)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


def opened(folder: Path) -> Any:
    """The denoiser, opened by the stock class that its config names; its weights lie at aligned addresses."""
    cls = json.loads((folder / "config.json").read_text())["_class_name"]
    return realigned(getattr(diffusers, cls).from_pretrained(folder))


def groups(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values())


def expected(folder: Path, kind: str) -> list[Tensor]:
    """Stored outputs, in the order of the calls."""
    stored = load_file(folder / "expected.safetensors")
    return [stored[f"{kind}.{i}"] for i in range(sum(name.startswith(f"{kind}.") for name in stored))]


def calls(folder: Path) -> list[dict[str, Tensor]]:
    """The arguments of the stored calls."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "expected.safetensors").items():
        argument, index = name.rsplit(".", 1)
        if argument not in ("output", "float"):
            found.setdefault(int(index), {})[argument] = value
    return [found[index] for index in sorted(found)]


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The norm of the difference."""
    return float(torch.stack([(a - b).norm() for a, b in zip(found, wanted, strict=True)]).norm())


def test_the_folders_cover_the_format() -> None:
    layers = [group for folder in FOLDERS for group in groups(folder)]
    of_tensors = [group[kind] for group in layers for kind in ("weights", "input_activations") if group[kind]]
    names = {name.rpartition(".")[2] for folder in FOLDERS for name in load_file(folder / WEIGHTS)}
    assert set().union(*layers) >= FLAGS
    assert set().union(*of_tensors) >= OF_TENSORS
    assert names >= TENSORS


def test_every_tensor_and_every_weight_has_the_same_bits(folder: Path) -> None:
    assert hashes_of(opened(folder)) == json.loads((folder / "expected.json").read_text())


def test_the_reference_kernels_give_the_same_outputs(folder: Path) -> None:
    """Bit for bit where this processor sums floats as the one did that wrote the folder, which the same denoiser in float shows.

    Elsewhere sums differ in their last bits, and a value between two codes may get the other one. A code that changes costs one
    step, and rounding as such costs ``step^2 / 12`` on average: if at most one code of a thousand changes, the root of their
    sum is ``sqrt(12 / 1000) = 0.11`` of the error that rounding makes. Sums in another order cost some 1e-5 of the output.
    """
    model, arguments, wanted, unrounded = opened(folder), calls(folder), expected(folder, "output"), expected(folder, "float")
    found = outputs_of(model, arguments)
    in_float = outputs_of(with_float_layers(model), arguments)
    if all(torch.equal(a, b) for a, b in zip(in_float, unrounded, strict=True)):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    size = float(torch.stack([one.norm() for one in wanted]).norm())
    assert error(in_float, unrounded) < 1e-5 * size
    assert error(found, wanted) < 1e-5 * size + 0.11 * error(wanted, unrounded)


def test_saving_it_again_writes_the_same_tensors(folder: Path, tmp_path: Path) -> None:
    opened(folder).save_pretrained(tmp_path)
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert after.keys() == before.keys()
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in before)
    configs = [json.loads((place / "config.json").read_text())["quantization_config"] for place in (folder, tmp_path)]
    assert configs[0]["checksums"] == configs[1]["checksums"] and configs[0]["slots"] == configs[1]["slots"]
    assert len(quantized_layers(opened(tmp_path))) == len(configs[0]["checksums"])


@pytest.mark.parametrize("case", ["minmax-w8a8", "every-feature"])
def test_the_same_seed_and_recipe_give_the_same_bytes(case: str) -> None:
    first, second = (hashes_of(quantized(case).denoiser) for _ in range(2))
    assert first == second
