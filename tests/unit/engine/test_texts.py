"""Which texts calibrate and which are held out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from reelquant.engine.texts import divided
from reelquant.models.pipelines import open_pipeline
from reelquant.models.probes import probe_texts
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
