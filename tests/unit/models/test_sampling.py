from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reelquant._errors import CalibrationError, UnsupportedError
from reelquant.models.sampling import call_arguments, notes, sample, write_notes


class Pipe:
    """Answers every prompt with the noise of its generator plus the length of its text."""

    def __init__(self, name: str = "") -> None:
        self.config = {"_name_or_path": name}
        self.quiet: list[Any] = []
        self.seen: list[dict[str, Any]] = []
        self._progress_bar_config = {"desc": "mine"}

    def set_progress_bar_config(self, **config: Any) -> None:
        self._progress_bar_config = config

    def __call__(
        self,
        prompt: list[str],
        generator: list[torch.Generator],
        output_type: str,
        num_inference_steps: int = 2,
        callback_on_step_end: Any = None,
    ) -> Any:
        self.quiet.append(self._progress_bar_config)
        self.seen.append({"prompt": prompt, "output_type": output_type, "steps": num_inference_steps})
        for step in range(num_inference_steps):
            if callback_on_step_end:
                assert callback_on_step_end(self, step, 0, {"latents": 1}) == {"latents": 1}
        return SimpleNamespace(frames=[torch.randn(3, generator=g) + len(p) for p, g in zip(prompt, generator, strict=True)])


PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_a_clip_depends_on_its_seed_and_not_on_the_batch(batch: int) -> None:
    expected = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(7 + i)) + len(p) for i, p in enumerate(PROMPTS)])
    pipe = Pipe()
    assert torch.equal(sample(pipe, PROMPTS, seed=7, batch=batch), expected)
    assert [len(call["prompt"]) for call in pipe.seen] == [min(batch, 5 - start) for start in range(0, 5, batch)]


def test_arguments_output_and_progress() -> None:
    pipe, heard = Pipe(), []
    sample(pipe, PROMPTS[:2], output="latent", on_step=lambda: heard.append(1), num_inference_steps=3, height=None)
    assert pipe.seen == [{"prompt": ["a", "bb"], "output_type": "latent", "steps": 3}] and len(heard) == 3
    assert pipe.quiet == [{"disable": True}] and pipe._progress_bar_config == {"desc": "mine"}
    sample(pipe, ["a"])
    assert pipe.seen[-1]["output_type"] == "pt"


def test_an_argument_that_the_pipeline_does_not_take_is_an_error() -> None:
    pipe = Pipe()
    with pytest.raises(UnsupportedError, match=r"^Pipe takes no argument 'num_infrence_steps'; .*'num_inference_steps'"):
        sample(pipe, PROMPTS, num_infrence_steps=3)
    assert not pipe.seen


def test_sizes_that_the_pipeline_rounds_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    class Rounding(Pipe):
        def __call__(self, prompt: list[str], generator: Any, output_type: str, num_frames: int = 9, height: int = 8) -> Any:
            return SimpleNamespace(frames=torch.zeros(len(prompt), num_frames // 4 * 4 + 1, 3, height, 8))

    for _ in range(2):
        sample(Rounding(), PROMPTS, num_frames=14, height=8)
    sample(Rounding(), PROMPTS, num_frames=13)
    (record,) = caplog.records
    assert record.getMessage() == "Rounding was asked for num_frames=14 and made 13: its VAE takes certain sizes only"


@pytest.mark.parametrize(("call", "words"), [({"num_frames": 3}, "num_frames=3"), ({}, "its own defaults")])
def test_a_pipeline_that_fails_names_the_call(call: dict[str, int], words: str) -> None:
    class Failing(Pipe):
        def __call__(self, prompt: list[str], generator: Any, output_type: str, num_frames: int = 9) -> Any:
            return torch.zeros(num_frames).view(7, -1)

    with pytest.raises(CalibrationError, match=rf"^Failing fails when it is called with {words}: shape .* is invalid"):
        sample(Failing(), ["a"], **call)


def test_the_progress_bar_comes_back_after_a_failure() -> None:
    pipe = Pipe()
    with pytest.raises(TypeError):
        sample(pipe, ["a"], num_inference_steps="many")
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_no_prompts_are_an_error() -> None:
    with pytest.raises(CalibrationError, match="no prompts"):
        sample(Pipe(), [])


def test_one_text_is_one_prompt_and_not_its_letters() -> None:
    pipe = Pipe()
    assert sample(pipe, "a red circle").shape == (1, 3)
    assert pipe.seen[-1]["prompt"] == ["a red circle"]


def test_a_folder_recommends_arguments_that_overrides_beat(tmp_path: Any) -> None:
    assert notes(Pipe()) == {} and call_arguments(Pipe()) == {}
    write_notes(tmp_path, {"num_inference_steps": 9, "gone": 1}, ["a", "b"])
    pipe = Pipe(str(tmp_path))
    assert notes(pipe)["prompts"] == ["a", "b"]
    assert call_arguments(pipe) == {"num_inference_steps": 9}
    assert call_arguments(pipe, num_inference_steps=4) == {"num_inference_steps": 4}
    assert call_arguments(pipe, num_inference_steps=None) == {"num_inference_steps": 9}
    assert call_arguments(pipe, gone=1) == {"num_inference_steps": 9}, "evaluations hand the recommendations on"


def test_latents_are_told_after_every_step_in_the_way_that_the_pipeline_knows() -> None:
    told: list[tuple[int, Any]] = []
    sample(Pipe(), PROMPTS[:3], batch=2, on_latents=lambda step, latents: told.append((step, latents)))
    assert told == [(0, 1), (1, 1)] * 2

    class Old(Pipe):
        def __call__(self, prompt: Any, generator: Any, output_type: str, callback: Any = None) -> Any:  # type: ignore[override]
            for step in range(2):
                callback(step, 0, "latents")
            return SimpleNamespace(frames=[torch.zeros(3) for _ in prompt])

    told.clear()
    sample(Old(), ["a"], on_latents=lambda step, latents: told.append((step, latents)))
    assert told == [(0, "latents"), (1, "latents")]


def test_seeds_can_be_given_clip_by_clip() -> None:
    clips = sample(Pipe(), ["a", "a", "a"], seeds=[5, 9, 5], batch=2)
    assert torch.equal(clips[0], clips[2]) and not torch.equal(clips[0], clips[1])
