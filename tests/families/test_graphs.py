"""Families as one OpenVINO graph: the answer of their layers, or a sentence that says no."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reelquant import UnsupportedError
from tests.families.checks import DYNAMIC, Case, output, snr

pytest.importorskip("openvino", reason="pip install openvino", exc_type=ImportError)

from reelquant.graphs import set_runtime

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi asks for it in float32
EXACT = 100.0  # dB: float sums in another order
TOKENWISE = copy.deepcopy(DYNAMIC)
TOKENWISE["defaults"]["input"]["granularity"] = "token"


def graph(model: nn.Module) -> nn.Module:
    set_runtime(model, "openvino")
    return model


LARGE = [pytest.param(name, marks=pytest.mark.full) for name in ("hunyuanvideo", "svd", "modelscope")]  # take longest to compile


@pytest.mark.parametrize("name", ["cogvideox", "ltx", "mochi", "cosmos", "sd", "sana", *LARGE])
def test_the_graph_answers_as_the_layers_do(name: str, tmp_path: Path) -> None:
    case = Case(name, tmp_path)
    assert snr(case.answer, output(graph(case.copy()), case.inputs())) > EXACT


@pytest.mark.parametrize("name", ["sd", "mochi"])
def test_inputs_with_a_scale_per_token_are_those_of_the_layers(name: str, tmp_path: Path) -> None:
    """Unless convolutions took another axis for their channels. Codes that turn make 30 to 40 dB where they do, so inputs that are a little
    off show how near an answer can be."""
    case = Case(name, tmp_path)
    model = case.quantized(TOKENWISE)
    expected = output(model, case.inputs())
    nearest = min(snr(expected, output(model, a_little_off(case.inputs(), seed))) for seed in range(3))
    assert nearest > 25 and snr(expected, output(graph(model), case.inputs())) > min(EXACT, nearest - 6)


def a_little_off(inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same arguments, every float off by a millionth of itself."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value * (1 + 1e-6 * torch.randn(value.shape, generator=generator))
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def test_a_family_that_cannot_be_one_graph_is_refused(tmp_path: Path) -> None:
    case = Case("allegro", tmp_path)
    with pytest.raises(UnsupportedError, match=r"cannot be made an OpenVINO graph: .*; use runtime='torch'"):
        output(graph(case.copy()), case.inputs())
