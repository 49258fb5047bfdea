"""Pipelines that training/ holds the weights of, beside the package: their folders can be built, opened and sampled."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelquant.models.pipelines import calibration_prompts, open_pipeline
from reelquant.models.sampling import sample
from tests import processes

TRAINING = Path(__file__).parents[2] / "training"
BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny_ltx
tiny_ltx.build(Path(sys.argv[2]))
"""
RESUME = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from flow import Plan, train_flow

def train(minutes, resume):
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    draw = lambda n: (torch.randn(n, 4),)
    loss = lambda part: (layer(part[0]) - part[0]).square().mean()
    train_flow(layer, [torch.optim.AdamW(layer.parameters(), lr=1e-2)], draw, loss, Plan(note=1), file, minutes, resume)
    return torch.load(file)

file = Path(sys.argv[2], "layer.pt")
first = train(0.005, False)
same = train(0.005, True)  # its time is spent
again = train(0.01, True)
assert 0 < first["step"] == same["step"] < again["step"]
assert torch.equal(first["ema"]["shadow"]["weight"], same["ema"]["shadow"]["weight"])
steps = [int(row.split(",")[1]) for row in file.with_suffix(".csv").read_text().splitlines()[1:]]
assert steps == list(range(1, again["step"] + 1))
assert again["optimizers"][0]["state"][0]["step"] == again["step"]
"""


@pytest.fixture(scope="module")
def tiny_ltx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``tiny-ltx``."""
    if not (TRAINING / "weights" / "tiny-ltx").is_dir():
        pytest.skip("training/weights/tiny-ltx is not here: it is part of the repository, not of the package")
    folder = tmp_path_factory.mktemp("tiny-ltx") / "pipeline"
    processes.run(BUILD, TRAINING, folder)
    return folder


def test_the_folder_of_tiny_ltx_makes_clips_of_its_own_size(tiny_ltx: Path) -> None:
    pipe = open_pipeline(tiny_ltx)
    (text,) = calibration_prompts(pipe, 1)
    frames = sample(pipe, [text], num_inference_steps=2)
    assert type(pipe).__name__ == "LTXPipeline" and frames.shape == (1, 13, 3, 64, 64)
    assert 0.01 < frames.std() < 0.6  # a picture, neither one colour nor noise beyond all bounds
    assert len(set(calibration_prompts(pipe, 24))) == 24  # its own captions


def test_the_latents_of_tiny_ltx_are_normalized_by_what_was_measured(tiny_ltx: Path) -> None:
    vae = open_pipeline(tiny_ltx).vae
    assert vae.latents_std.min() > 0 and not (vae.latents_std == 1).all()


@pytest.mark.skipif(not TRAINING.is_dir(), reason="training/ is part of the repository, not of the package")
def test_an_interrupted_training_goes_on(tmp_path: Path) -> None:
    processes.run(RESUME, TRAINING, tmp_path)
