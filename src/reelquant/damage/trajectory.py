"""One change at a time, and the whole trajectory with it: the damage itself, at the price of a sampling for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from reelquant.allocate.table import EVERY, Configuration, Damage, Part
from reelquant.damage.kept import Kept
from reelquant.damage.rounding import Steps, inputs_rounded, rounded_weight, weights_rounded
from reelquant.damage.scene import Scene, Target, following, typical
from reelquant.evidence import bootstrap

SAMPLES = 512  # numbers of an error by which errors of two steps are compared: their cosine is then known to about 0.04
Change = tuple[str, str, str, Steps]  # layer, part, format, steps


def by_trajectory(scene: Scene, target: Target, changes: Sequence[Change], kept: Kept) -> list[Damage]:
    """Sample the clips once for every change; all other layers are float.

    The damage is that of a typical clip, the geometric mean; the interval is over clips.
    """
    scene.progress.phase(f"{target.component}: layers one at a time", len(changes))
    found = []
    for layer, part, written, steps in changes:
        name = f"trajectory, {target.component}, {layer}, {part}, {written}, {steps}"
        found.append(_row(target, (layer, part, written, steps), kept.of(name, _measuring(scene, target, (layer, part, written, steps)))))
        scene.progress.advance()
    return found


def steps_by_trajectory(
    scene: Scene, target: Target, part: Part, formats: Sequence[str], kept: Kept
) -> tuple[list[Damage], np.ndarray | None]:
    """Sample the clips once for every step and format, with all weights or all inputs rounded at that step alone.

    Beside the damages there are the cosines ``[steps, steps]`` between the errors of the final latents, mean over clips and formats, from
    at most :data:`SAMPLES` numbers of each clip; None without formats.
    """
    steps, clips = range(len(target.timesteps)), len(scene.prompts)
    scene.progress.phase(f"{target.component}: steps one at a time", len(formats) * len(steps))
    rows, cosines = [], []
    for written in formats:
        samples = []
        for step in steps:
            change = (EVERY, part, written, (step, step))

            def measured(change: Change = change) -> list[float]:
                with following(scene.targets), _changed(target, change):
                    return [*scene.damages(), *_sampled(scene)]

            name = f"trajectory, {target.component}, {EVERY}, {part}, {written}, {(step, step)}, with samples"
            values = kept.of(name, measured)
            rows.append(_row(target, change, values[:clips]))
            samples.append(np.array(values[clips:]).reshape(clips, -1))
            scene.progress.advance()
        errors = np.stack(samples, 1)  # [clips, steps, samples]
        errors = errors / np.maximum(np.linalg.norm(errors, axis=2, keepdims=True), 1e-30)
        cosines.append(np.einsum("csn,ctn->st", errors, errors) / clips)
    return rows, np.mean(cosines, 0).clip(-1, 1) if cosines else None


def _sampled(scene: Scene) -> list[float]:
    """Some numbers of every clip's error of the final latents, evenly spread, three digits each."""
    errors = (scene.found - scene.reference).flatten(1)
    places = torch.linspace(0, errors.shape[1] - 1, min(SAMPLES, errors.shape[1])).long()
    return [float(f"{one:.3g}") for one in errors[:, places.to(errors.device)].flatten().tolist()]


def _measuring(scene: Scene, target: Target, change: Change) -> Callable[[], list[float]]:
    def measured() -> list[float]:
        with following(scene.targets), _changed(target, change):
            return scene.damages()

    return measured


def _changed(target: Target, change: Change) -> AbstractContextManager[None]:
    layer, part, written, steps = change
    names = [one.name for one in target.layers] if layer == EVERY else [layer]
    if part == "input":
        return inputs_rounded(target, dict.fromkeys(names, written), steps)
    return weights_rounded(target, {name: rounded_weight(target, name, written) for name in names}, steps)


def _row(target: Target, change: Change, damages: Sequence[float]) -> Damage:
    layer, part, written, steps = change
    low, high = interval(damages)
    return Damage(target.component, layer, part, written, "trajectory", typical(damages), low, high, steps)  # type: ignore[arg-type]


def interval(damages: Sequence[float]) -> tuple[float, float]:
    """95 % interval of :func:`reelquant.damage.scene.typical`, over clips."""
    found = bootstrap(np.log(damages).tolist(), resamples=500)
    return float(np.exp(found.low)), float(np.exp(found.high))


def try_configurations(scene: Scene, target: Target, configurations: Sequence[Mapping[str, str]], kept: Kept) -> list[Configuration]:
    """Sample the clips with a format for every layer at once."""
    scene.progress.phase(f"{target.component}: whole configurations", len(configurations))
    known: dict[tuple[str, str], object] = {}
    found = []
    for formats in configurations:

        def measured(formats: Mapping[str, str] = formats) -> list[float]:
            for layer, written in formats.items():
                if (layer, written) not in known:
                    known[layer, written] = rounded_weight(target, layer, written)
            with weights_rounded(target, {pair[0]: known[pair] for pair in formats.items()}):  # type: ignore[misc]
                return scene.damages()

        name = f"configuration, {target.component}, {sorted(formats.items())}"
        found.append(Configuration(target.component, dict(formats), typical(kept.of(name, measured))))
        scene.progress.advance()
    return found
