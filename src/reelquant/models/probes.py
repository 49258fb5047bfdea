"""Texts that nobody would write: random words of a pipeline's own vocabulary.

What a text changes inside a denoiser is bounded by what its words can do. Calibration texts hold few of them, so a model that was
calibrated on one subject, language or style meets values beyond its ranges on another. Random words of the tokenizer reach far more of
them in a handful of clips.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

SHORTEST, LONGEST = 3, 16  # words of a probe
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def probe_texts(pipe: Any, count: int, seed: int, texts: Sequence[str] = ()) -> list[str]:
    """Texts of random words; equal arguments give equal texts.

    Args:
        pipe: a diffusers pipeline. Words are drawn from the tokenizers that it has, in turn.
        count: how many texts.
        seed: of the choice.
        texts: where the pipeline has no tokenizer, words of these are shuffled instead.
    """
    draw = random.Random(seed)
    sources = [tokenizer for name in TOKENIZERS if (tokenizer := getattr(pipe, name, None)) is not None and _words(tokenizer)]
    return [_probe(sources[number % len(sources)], draw) if sources else _shuffled(texts, draw) for number in range(count)]


def _words(tokenizer: Any) -> list[int]:
    """Numbers of the tokens that are text: neither special nor empty."""
    try:
        special = set(tokenizer.all_special_ids)
        return [token for token in range(len(tokenizer)) if token not in special]
    except (AttributeError, TypeError):  # not a tokenizer of transformers
        return []


def _probe(tokenizer: Any, draw: random.Random) -> str:
    return tokenizer.decode(draw.choices(_words(tokenizer), k=draw.randint(SHORTEST, LONGEST)), skip_special_tokens=True).strip()


def _shuffled(texts: Sequence[str], draw: random.Random) -> str:
    words = [word for text in texts for word in text.split()]
    return " ".join(draw.choices(words, k=draw.randint(SHORTEST, LONGEST))) if words else ""
