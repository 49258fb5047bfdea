"""Texts of random words of a pipeline's own vocabulary.

What a text changes inside a denoiser is bounded by what its words can do. Calibration texts hold few of them, so a model that was
calibrated on one subject, language or style meets values beyond its ranges on another. Random words of the tokenizer reach far more of
them in a handful of clips.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

SHORTEST, LONGEST = 3, 16  # words of a probe
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def probe_texts(pipe: Any, count: int, seed: int, texts: Sequence[str] = ()) -> list[str]:
    """Texts of random words; equal arguments give equal texts.

    Args:
        pipe: a diffusers pipeline. Tokens are drawn from the tokenizers that it has, in turn, in proportion to their letters: single
            letters are many in small vocabularies and mean nothing.
        count: how many texts.
        seed: of the choice.
        texts: where the pipeline has no tokenizer, words of these are shuffled instead.
    """
    draw = random.Random(seed)
    found = (getattr(pipe, name, None) for name in TOKENIZERS)
    sources = [words for tokenizer in found if tokenizer is not None and (words := _words(tokenizer))]
    sources = sources or [{word: 1 for text in texts for word in text.split()}]
    return [_probe(sources[number % len(sources)], draw) for number in range(count)]


def _words(tokenizer: Any) -> dict[str, int]:
    """Tokens that are text, with the number of their letters; empty for what is not a tokenizer of transformers."""
    try:
        special = set(tokenizer.all_special_ids)
        pieces = [tokenizer.decode([token]).strip() for token in range(len(tokenizer)) if token not in special]
    except (AttributeError, TypeError):
        return {}
    return {piece: len(piece) for piece in pieces if piece}


def _probe(words: Mapping[str, int], draw: random.Random) -> str:
    return " ".join(draw.choices(list(words), list(words.values()), k=draw.randint(SHORTEST, LONGEST))) if words else ""
