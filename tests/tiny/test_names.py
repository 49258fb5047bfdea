"""Nothing is written that cannot be read: names of tensors are those of the class, or one sentence says so before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import reelquant
from reelquant import UnsupportedError
from reelquant.models.blank import check_names
from reelquant.nn import quantized_layers
from tests.families.models import FAMILIES
from tests.tiny.bundled import NAMES, PIPELINES, denoiser, opened

REFUSED = "that its class does not have with its config"


@pytest.mark.parametrize("name", PIPELINES)
def test_fused_projections_are_refused_before_quantizing_and_before_writing(name: str, tmp_path: Path) -> None:
    pipe = reelquant.open_pipeline(name)
    model: Any = denoiser(pipe)
    model.fuse_qkv_projections()
    with pytest.raises(UnsupportedError, match=REFUSED):
        reelquant.quantize(pipe, "w8a16")
    assert not quantized_layers(model)
    with pytest.raises(UnsupportedError, match=REFUSED):
        reelquant.save(pipe, tmp_path / "q")
    assert not list(tmp_path.iterdir())
    model.unfuse_qkv_projections()
    reelquant.quantize(pipe, "w8a16")
    assert not [key for key in model.state_dict() if "to_qkv" in key or "to_kv" in key]
    reelquant.save(pipe, tmp_path / "q")
    reelquant.load(tmp_path / "q")


@pytest.mark.parametrize("name", NAMES[:1])
def test_layers_that_were_added_later_are_refused_by_stock_saving_too(name: str, tmp_path: Path) -> None:
    """An image adapter of diffusers is such a module in the processors of attention."""
    pipe = opened(name)
    denoiser(pipe).add_module("adapter", nn.Linear(4, 4))
    for number, write in enumerate((pipe.save_pretrained, lambda folder: reelquant.save(pipe, folder))):
        with pytest.raises(UnsupportedError, match=rf"has 2 tensors {REFUSED} \('adapter.bias', 'adapter.weight'\)"):
            write(tmp_path / str(number))


def test_a_tensor_that_is_gone_is_refused(tmp_path: Path) -> None:
    pipe = reelquant.open_pipeline(NAMES[0])
    del denoiser(pipe).proj_out.bias
    denoiser(pipe).proj_out.bias = None
    with pytest.raises(UnsupportedError, match=r"lacks 1 tensors of its class with its config \('proj_out.bias'\)"):
        reelquant.save(pipe, tmp_path / "q")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_models_of_all_families_are_what_their_config_says(name: str) -> None:
    check_names("transformer", FAMILIES[name].make())
