"""Which texts calibrate and which are held out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from reelquant.engine import calibration
from reelquant.engine.texts import divided
from reelquant.formats import parse_granularity
from reelquant.models.pipelines import open_pipeline
from reelquant.models.probes import OwnSize, own_size, probe_texts
from reelquant.recipes.recipe import Calibrate

PROMPTS = [f"a thing that moves {number}" for number in range(30)]
BARE: Any = SimpleNamespace()  # a pipeline without a tokenizer


@pytest.fixture(scope="module")
def pipe() -> Any:
    return open_pipeline("tiny-dit")


def test_a_probe_comes_to_every_four_prompts(pipe: Any) -> None:
    texts, held_out = divided(pipe, PROMPTS, Calibrate(prompts=16), 4)
    assert texts.written == PROMPTS[:16] and len(texts.probes) == 4 and not set(texts.probes) & set(PROMPTS)
    assert held_out[:2] == PROMPTS[16:18] and len(held_out) == 4
    assert not set(held_out) & {*texts.written, *texts.probes}


def test_probes_are_words_of_the_tokenizer(pipe: Any) -> None:
    words = set(" ".join(probe_texts(pipe, 40, 3)).split())
    known = {pipe.tokenizer.decode([token]).strip() for token in range(len(pipe.tokenizer))}
    assert len(words) > 30 and words <= known and not words & set(pipe.tokenizer.all_special_tokens)


def test_probes_fit_the_tokenizer_and_hold_none_of_its_marks() -> None:
    """CLIP's tokenizer cuts texts off, and decodes numbers without a token to its end mark."""
    clip = open_pipeline("tiny-unet")
    probes, tokenizer = probe_texts(clip, 40, 3), clip.tokenizer
    assert max(len(tokenizer(text).input_ids) for text in probes) == tokenizer.model_max_length
    assert all(probes) and not any(mark in text for text in probes for mark in tokenizer.all_special_tokens)


def test_equal_seeds_give_equal_probes(pipe: Any) -> None:
    assert probe_texts(pipe, 4, 3) == probe_texts(pipe, 4, 3) != probe_texts(pipe, 4, 4)


def test_without_a_tokenizer_the_words_of_the_prompts_are_shuffled() -> None:
    words = set(" ".join(probe_texts(BARE, 20, 0, ["red circle", "blue star"])).split())
    assert words == {"red", "circle", "blue", "star"}


@pytest.mark.parametrize(("prompts", "count", "written"), [(PROMPTS[:1], 4, 1), (PROMPTS[:3], 2, 2), (PROMPTS, 5, 5), (PROMPTS, 1, 1)])
def test_few_prompts(prompts: list[str], count: int, written: int) -> None:
    texts, held_out = divided(BARE, prompts, Calibrate(prompts=count), 4)
    assert texts.written == prompts[:written] and len(texts.probes) == count // 4
    assert held_out and all(held_out)


def test_no_prompts_give_no_texts() -> None:
    assert divided(BARE, [], Calibrate(), 4) == (([], []), [])


def test_without_probes_everything_is_written() -> None:
    texts, held_out = divided(BARE, PROMPTS, Calibrate(prompts=16, probes=0), 4)
    assert texts == (PROMPTS[:16], []) and set(held_out) <= set(PROMPTS[16:])


@pytest.mark.parametrize(
    ("call", "own", "of_four"),
    [
        ({}, None, None),  # its own size already
        ({"num_frames": 13, "num_inference_steps": 3}, None, None),
        ({"num_frames": 9}, {"num_frames": 13}, 2),
        ({"num_frames": 5, "height": 96}, {"num_frames": 13, "height": 64}, 2),
        ({"height": 128, "width": 128}, {"height": 64, "width": 64}, 4),  # cheaper than calibration's
        ({"height": 32, "width": 32}, {"height": 64, "width": 64}, 1),
        ({"num_frames": 1}, None, None),  # thirteen times the memory
    ],
)
def test_the_size_that_probes_take(pipe: Any, call: dict[str, Any], own: dict[str, int] | None, of_four: int | None) -> None:
    found = own_size(pipe, call)
    assert (found and found.call) == own and (found and found.count(4)) == of_four


def test_pictures_and_unknown_sizes_leave_probes_as_they_are() -> None:
    class Pipe:
        config: ClassVar = {}

        def __call__(self, prompt: str, image: Any = None, height: int | None = None, num_frames: int = 8) -> None: ...

    assert own_size(Pipe(), {"num_frames": 4}) == OwnSize({"num_frames": 8}, 2.0)
    assert own_size(Pipe(), {"num_frames": 4, "height": 64}) is None  # what it makes without a height is not known
    assert own_size(Pipe(), {"num_frames": 4, "image": object()}) is None


@pytest.mark.parametrize(("granularity", "sizes"), [("tensor", [9, 9, 13]), ("frame-5", [9, 9])])
def test_calibration_makes_some_probes_in_the_own_size(
    monkeypatch: pytest.MonkeyPatch, pipe: Any, granularity: str, sizes: list[int]
) -> None:
    made: list[tuple[int, int, int]] = []
    monkeypatch.setattr(calibration, "sample", lambda pipe, texts, **how: made.append((len(texts), how["first"], how["num_frames"])))
    monkeypatch.setattr(calibration, "_observed", lambda part, course, run: run())
    row = SimpleNamespace(specs=SimpleNamespace(input=SimpleNamespace(granularity=parse_granularity(granularity))))
    recipe = SimpleNamespace(calibrate=Calibrate(prompts=16))
    part = calibration.Part(torch.nn.Identity(), SimpleNamespace(recipe=recipe, quantized=[row]))  # type: ignore[arg-type]
    texts, _ = divided(pipe, PROMPTS, recipe.calibrate, 4)
    calibration.calibrate_together(pipe, [part], texts, seed=1, arguments={"num_frames": 9}, on_step=lambda: None)
    assert [frames for _, _, frames in made] == sizes
    assert sorted(first + i for count, first, _ in made for i in range(count)) == list(range(20))  # every clip once, by its number
