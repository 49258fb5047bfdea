"""Settings of torch that belong to a whole process or thread, changed by other code: the same bytes, whatever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel
from transformers import AutoModelForTextEncoding

import reelquant
from reelquant.models.pipelines import bundled_path
from tests.tiny.bundled import CALL, PROMPT, RECIPE, expected, folder, latents, quiet

NAME = "tiny-dit"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


STATES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
}


def weights(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.suffix in (".safetensors", ".json")}


@pytest.mark.parametrize("state", STATES)
def test_quantizing_and_saving_give_the_same_bytes(state: str, tmp_path: Path) -> None:
    with STATES[state]():
        pipe = reelquant.open_pipeline(NAME)
        reelquant.quantize(pipe, RECIPE, PROMPT, **CALL)
        reelquant.save(pipe, tmp_path / "q")
    assert weights(tmp_path / "q") == weights(folder(NAME))


@pytest.mark.parametrize("state", ["default dtype bfloat16", "default dtype float64", "inference mode"])
def test_a_folder_opens_and_samples_the_same(state: str) -> None:
    with STATES[state]():
        pipe = quiet(reelquant.load(folder(NAME)))
        inside = latents(pipe)
    assert torch.equal(inside, expected(NAME))
    assert torch.equal(latents(pipe), expected(NAME)), "what was prepared inside computes something else outside"


@pytest.mark.parametrize(("part", "kind"), [("transformer", AutoModel), ("text_encoder", AutoModelForTextEncoding)])
@pytest.mark.parametrize("state", ["default dtype bfloat16", "inference mode"])
def test_quantizing_while_loading_gives_the_same_bytes(state: str, part: str, kind: type) -> None:
    def load() -> dict[str, torch.Tensor]:
        config = reelquant.ReelQuantConfig("w4a16")
        model = kind.from_pretrained(str(bundled_path(NAME)), subfolder=part, quantization_config=config, dtype=torch.float32)
        return model.state_dict()

    plain = load()
    with STATES[state]():
        found = load()
    assert plain.keys() == found.keys()
    assert all(value.dtype == plain[name].dtype and torch.equal(value, plain[name]) for name, value in found.items())
