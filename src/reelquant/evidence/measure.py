"""Measuring clips against reference clips, one pair in memory at a time; every row is written to disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from reelquant._errors import CheckpointError, UnsupportedError
from reelquant._progress import Progress, Silent
from reelquant.evidence.clips import Clip
from reelquant.evidence.mechanisms import MECHANISMS, Pair, Tools, curves
from reelquant.evidence.store import Store

LATENTS = "latents"

logger = logging.getLogger(__name__)


@dataclass
class Measuring:
    """One evaluation's measuring: where, with what, and which sources of figures turned out to be impossible.

    Attributes:
        store: where rows and features are kept.
        tools: networks.
        sources: mechanisms that are wanted; those that cannot look at these clips leave the list.
        missing: why they left, by source.
        prompts: texts by clip name.
        progress: receives the progress.
    """

    store: Store
    tools: Tools
    sources: list[str]
    prompts: Mapping[str, str] = field(default_factory=dict)
    progress: Progress = field(default_factory=Silent)
    missing: dict[str, str] = field(default_factory=dict)

    def drop_unavailable(self) -> None:
        """Leave out what lacks weights, packages or texts."""
        texts = list(self.prompts.values()) or None
        for source in list(self.sources):
            reason = MECHANISMS[source].missing(self.tools, texts)
            if reason is not None:
                self._drop(source, reason)

    def pairs(self, variant: str, reference: Mapping[str, Clip], test: Mapping[str, Clip]) -> None:
        """Measure clips of one variant against the clips of the same names."""
        names = [name for name in test if name in reference]
        self._measure(variant, names, lambda name: self._pair(name, reference[name], test[name]), self.sources)

    def alone(self, variant: str, clips: Mapping[str, Clip], sources: Iterable[str] | None = None) -> None:
        """Measure clips without a reference: the reference itself, or a set of real clips."""

        def single(name: str) -> Pair:
            clip = clips[name].read()
            return Pair(clip, clip, self.prompts.get(name), (len(clip), len(clip)))

        wanted = [source for source in self.sources if MECHANISMS[source].alone and (sources is None or source in set(sources))]
        self._measure(variant, list(clips), single, wanted)

    def latents(self, variant: str, names: Iterable[str]) -> None:
        """Where in the trajectory clips part: relative distance of the latents to the reference's, after every step."""
        rows = self.store.rows(variant)
        for name in names:
            kept = all(self.store.has("latents", one, name) for one in ("reference", variant))
            if kept and LATENTS not in rows.get(name, {"sources": []})["sources"]:
                curve = relative_error(*(self.store.get("latents", one, name) for one in ("reference", variant)))
                row = {
                    "name": name,
                    "sources": [LATENTS],
                    "figures": {"latent_error": curve[-1]},
                    "curves": {"latent_error": curve},
                }
                self.store.add(variant, row)

    def _pair(self, name: str, reference: Clip, test: Clip) -> Pair:
        first, second = reference.read(), test.read()
        if first.shape[1:] != second.shape[1:]:
            sizes = [f"{clip.shape[-1]}x{clip.shape[-2]}" for clip in (first, second)]
            raise CheckpointError(
                f"clip '{name}' is {sizes[1]} pixels and its reference {sizes[0]} ('{test.files[0]}', '{reference.files[0]}'); "
                "clips are compared at equal size: render or scale both alike"
            )
        count = min(len(first), len(second))
        return Pair(first[:count], second[:count], self.prompts.get(name), (len(first), len(second)))

    def _measure(self, variant: str, names: Sequence[str], read: Any, sources: Sequence[str]) -> None:
        rows = self.store.rows(variant)
        self.progress.phase(f"measure {variant}", len(names))
        for name in names:
            left = [source for source in sources if source in self.sources and not self._done(variant, name, source, rows)]
            if left:
                self._look(variant, name, read(name), left, "psnr" not in rows.get(name, {"curves": {}})["curves"])
            self.progress.advance()

    def _done(self, variant: str, name: str, source: str, rows: Mapping[str, Any]) -> bool:
        features = MECHANISMS[source].features
        return self.store.has(features[0], variant, name) if features else source in rows.get(name, {"sources": []})["sources"]

    def _look(self, variant: str, name: str, pair: Pair, sources: Sequence[str], first: bool) -> None:
        figures: dict[str, float] = {}
        looked = []
        for source in sources:
            mechanism = MECHANISMS[source]
            try:
                if mechanism.figures is not None:
                    figures |= mechanism.figures(self.tools, pair)
                    looked.append(source)
                elif mechanism.features is not None and not self.store.has(mechanism.features[0], variant, name):
                    self.store.put(mechanism.features[0], variant, name, mechanism.features[1](self.tools, pair.test))
            except UnsupportedError as error:
                self._drop(source, f"cannot look at clip '{name}': {error}")
        if looked or first:
            row = {"name": name, "sources": looked, "figures": figures, "curves": curves(pair) if first else {}}
            self.store.add(variant, row)

    def _drop(self, source: str, reason: str) -> None:
        logger.info("%s: %s", source, reason)
        self.missing[source] = reason
        if source in self.sources:
            self.sources.remove(source)


def relative_error(reference: Tensor, test: Tensor) -> list[float]:
    """``|test - reference| / |reference|`` of every row of two ``[steps, ...]``."""
    first, second = reference.double().flatten(1), test.double().flatten(1)
    return ((second - first).norm(dim=1) / first.norm(dim=1).clamp(min=1e-12)).tolist()
