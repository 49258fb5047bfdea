"""A saved folder with one file damaged: it must be refused."""

from __future__ import annotations

import random
from pathlib import Path

import reelquant
from reelquant import CheckpointError
from reelquant.models.manifest import CARD, MANIFEST, REPORT
from tests.attack.damage import DAMAGES, files_of
from tests.attack.outcomes import SilentError


def refused_when_damaged(folder: Path, seed: int) -> None:
    """Damage one file of a folder, verify it and open it.

    Raises:
        SilentError: if the damage was accepted.
    """
    dice = random.Random(seed)
    file = dice.choice([file for file in files_of(folder) if file.name != CARD])  # a text for people to edit: nothing reads it
    damage = DAMAGES[seed % len(DAMAGES)]
    damage(file, dice)
    gone = file.name in (MANIFEST, REPORT) and not file.exists()  # a folder without them is as folders of older versions are
    ways = ([] if gone else [reelquant.verify]) + ([] if file.name in (MANIFEST, REPORT) else [reelquant.load])
    for way in ways:
        try:
            way(folder)
        except CheckpointError:
            continue
        raise SilentError(f"{way.__name__} after {damage.__name__} of {file.relative_to(folder)}")
