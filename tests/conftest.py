"""What holds for every test: no network, one thread a worker, the same random numbers every time."""

from __future__ import annotations

import os

# Before diffusers, transformers and rich are imported: they read these once. COLUMNS: tables look the same in every terminal.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    COLUMNS="120",
)

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.grids import ALL

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which diffusers does; see tests/unit/kernels/cuda

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)  # workers share the cores

# derandomize: CI and every developer see the same examples; deadline: timings on a shared machine say nothing about the code
settings.register_profile("reelquant", derandomize=True, deadline=None, database=None, max_examples=20 if ALL else 8)
settings.load_profile("reelquant")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from seed 0 and cannot leave another default dtype, grad mode or attention behind."""
    from reelquant.nn.around import attention

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32, "a test left another default dtype behind"
    assert torch.is_grad_enabled(), "a test left gradients switched off"
    assert not attention.running(), "a test left a denoiser's attention switched on"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not ALL:
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def material() -> Path:
    """Real weights, clips and prompts that stand beside a developer's checkout; tests that want them are skipped elsewhere."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "material"
    if not folder.is_dir():
        pytest.skip(f"needs real weights and clips in {folder.name}/ beside the checkout")
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random CLIP that transformers loads."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", "a", "red", "circle", "moving"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**common, "vocab_size": 7, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 3, "pad_token_id": 0},
            vision_config={**common, "image_size": 16, "patch_size": 8},
            projection_dim=12,
        )
    )
    path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>").save_pretrained(path)
    return path
