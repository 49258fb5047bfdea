"""Other ways in: single files, models that were compiled before, models with a cache. The same layers, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoModel, FirstBlockCacheConfig, WanTransformer3DModel

import reelquant
from reelquant import ReelQuantConfig, UnsupportedError
from reelquant.models.pipelines import bundled_path
from reelquant.nn import quantized_layers
from tests.tiny.bundled import CALL, PROMPT, RECIPE, denoiser, quantized, quiet

NAME = "tiny-dit"


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(value.dtype == b[key].dtype and torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize(("recipe", "dtype"), [("w8a16", torch.float32), ("w4a16", torch.bfloat16)])
def test_a_single_file_is_quantized_while_it_loads_as_a_folder_is(recipe: str, dtype: torch.dtype) -> None:
    folder = bundled_path(NAME)
    wish: dict[str, Any] = dict(quantization_config=ReelQuantConfig(recipe), torch_dtype=dtype)
    file = next((folder / "transformer").glob("*.safetensors"))
    single = WanTransformer3DModel.from_single_file(str(file), config=str(folder), subfolder="transformer", **wish)
    wish["quantization_config"] = ReelQuantConfig(recipe)
    assert quantized_layers(single)
    assert same(single, AutoModel.from_pretrained(str(folder), subfolder="transformer", **wish))


def compiled(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


BEFORE: dict[str, Callable[[Any], None]] = {
    "compiled": compiled,
    "compiled in place": lambda pipe: pipe.transformer.compile(backend="eager"),
    "cached": lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2)),
}


@pytest.mark.parametrize("before", BEFORE)
def test_what_is_switched_on_before_quantizing_changes_nothing(before: str) -> None:
    pipe = quiet(reelquant.open_pipeline(NAME))
    BEFORE[before](pipe)
    reelquant.quantize(pipe, RECIPE, PROMPT, **CALL)
    model = getattr(pipe.transformer, "_orig_mod", pipe.transformer)
    assert same(model, denoiser(quantized(NAME)))
    assert before != "cached" or model.is_cache_enabled


def test_a_compiled_model_keeps_in_float32_what_it_wants_there() -> None:
    pipe = reelquant.open_pipeline(NAME)
    compiled(pipe)
    reelquant.quantize(pipe, "w8a16")
    plain = reelquant.open_pipeline(NAME)
    reelquant.quantize(plain, "w8a16")
    assert quantized_layers(pipe.transformer._orig_mod).keys() == quantized_layers(plain.transformer).keys()


@pytest.mark.parametrize("recipe", ["w8a16", RECIPE])
def test_a_keyword_that_nothing_takes_is_an_error(recipe: Any, tmp_path: Any) -> None:
    pipe = reelquant.open_pipeline(NAME)
    message = r"WanPipeline takes no argument 'num_frame'; .*'num_frames'"
    with pytest.raises(UnsupportedError, match=message):
        reelquant.quantize(pipe, recipe, PROMPT, num_frame=5)
    with pytest.raises(UnsupportedError, match=message):
        reelquant.quantize_folder(NAME, tmp_path / "out", recipe, PROMPT, num_frame=5)
    assert not quantized_layers(pipe.transformer) and not list(tmp_path.iterdir())
