"""Texts of random words of a pipeline's own vocabulary.

What a text changes inside a denoiser is bounded by what its words can do. Calibration texts hold few of them, so a model that was
calibrated on one subject, language or style meets values beyond its ranges on another. Random words of the tokenizer reach far more of
them in a handful of clips.

The same holds for sizes: values grow with the number of tokens and at places that a short clip does not have. So where calibration makes
clips of another size than the pipeline's own, probes are made in the pipeline's own.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

from reelquant.models.conditions import CONDITIONS
from reelquant.models.sampling import call_arguments, notes

SIZES = ("num_frames", "height", "width")  # arguments of a pipeline call
LARGER = 4.0  # times the numbers of calibration's clips: beyond that a clip of the pipeline's own size may not fit into memory
SHORTEST, LONGEST = 3, 16  # words of a probe; with 8 at most, tiny-ltx lost 2.2 dB on other texts instead of 0.9
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
    found = [tokenizer for name in TOKENIZERS if (tokenizer := getattr(pipe, name, None)) is not None]
    sources = [(words, tokenizer) for tokenizer in found if (words := _words(tokenizer))]
    sources = sources or [({word: 1 for text in texts for word in text.split()}, None)]
    drawn = [(_draw(words, draw), tokenizer) for words, tokenizer in islice(cycle(sources), count)]
    return [" ".join(words if tokenizer is None else _fitting(words, tokenizer)) for words, tokenizer in drawn]


def _words(tokenizer: Any) -> dict[str, int]:
    """Tokens that are text, with the number of their letters; empty for what is not a tokenizer of transformers.

    Numbers without a token of their own decode to a special one in some tokenizers, so those are told by their text, too.
    """
    try:
        special, marks = set(tokenizer.all_special_ids), set(tokenizer.all_special_tokens)
        pieces = {tokenizer.decode([token]).strip() for token in range(len(tokenizer)) if token not in special}
    except (AttributeError, TypeError):
        return {}
    return {piece: len(piece) for piece in sorted(pieces - marks) if piece}


def _draw(words: Mapping[str, int], draw: random.Random) -> list[str]:
    return draw.choices(list(words), list(words.values()), k=draw.randint(SHORTEST, LONGEST)) if words else []


def _fitting(words: list[str], tokenizer: Any) -> list[str]:
    """The first words that the tokenizer does not cut off; one at least."""
    most = getattr(tokenizer, "model_max_length", math.inf)
    while len(words) > 1 and len(tokenizer(" ".join(words), verbose=False).input_ids) > most:
        words = words[:-1]
    return words


class OwnSize(NamedTuple):
    """Sizes of a pipeline's own clips.

    Attributes:
        call: arguments of the pipeline call.
        cost: numbers of such a clip over those of the clips that calibrate.
    """

    call: dict[str, int]
    cost: float

    def count(self, probes: int) -> int:
        """How many probes take this size: together they cost no more than all would in the size of calibration, and one is taken anyway."""
        return min(probes, max(1, int(probes / self.cost)))


def own_size(pipe: Any, arguments: Mapping[str, Any]) -> OwnSize | None:
    """The size of a pipeline's own clips: that of its notes, or the default of its call.

    Args:
        pipe: a diffusers pipeline.
        arguments: of the calls that calibrate.

    Returns:
        None if calibration makes clips of that size; if it is not known; if it is :data:`LARGER` than theirs; or if pictures or frames
        are given for all clips, which have a size already.
    """
    given = call_arguments(pipe, **arguments)
    if any(name in CONDITIONS for name in given):
        return None
    taken, own = inspect.signature(type(pipe).__call__).parameters, notes(pipe).get("call", {})
    usual = {name: own.get(name, taken[name].default) for name in SIZES if name in taken}
    changed = [name for name, size in usual.items() if given.get(name, size) != size]
    if not changed or not all(isinstance(usual[name], int) for name in changed):
        return None
    cost = math.prod(usual[name] / given[name] for name in changed)
    return OwnSize({name: usual[name] for name in changed}, cost) if cost <= LARGER else None
