r"""Maps of sensitivity, and what budgets divided by them are worth.

A layer at a time against gradients and noise, allocations of equal bytes against one format for all, and predicted against measured damage.
A budget over the denoising steps is in :mod:`benchmarks.step_budget`. Run it from the repository root::

    python -m benchmarks.sensitivity --pipeline tiny-dit --clips 16 --set num_inference_steps=8 --output benchmarks/results
    python -m benchmarks.sensitivity --pipeline tiny-unet --clips 8 --set num_inference_steps=4 --every 16 --plans 20 --randoms 10 \
        --noise-calls 1 --output benchmarks/results
    python -m benchmarks.sensitivity --pipeline tiny-dit --clips 64 --set num_inference_steps=8 --every 16 --plans 20 --equal-bytes \
        --output benchmarks/results

Weights are rounded to nearest in the float model, with the ranges of ``w4a16``: the numbers that are multiplied are those of the quantized
model. Inputs are rounded with a scale per token (per item for convolutions). Maps are measured on other texts than the clips that
allocations are judged on. What is measured is kept in ``runs/sensitivity``; the result is ``sensitivity-PIPELINE.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.common import Clips, markdown, parser
from reelquant.allocate import SensitivityTable, allocate
from reelquant.allocate.problem import Problem
from reelquant.allocate.sampled import random_picks
from reelquant.allocate.sizes import weight_bytes
from reelquant.allocate.surrogate import learned
from reelquant.allocate.table import Configuration, Damage
from reelquant.damage import Wanted, measure
from reelquant.damage.gradient import PROBES
from reelquant.damage.kept import Kept
from reelquant.damage.rounding import rounded_weight, weights_rounded
from reelquant.damage.run import scene_of
from reelquant.damage.scene import Scene, Target, following
from reelquant.damage.trajectory import by_trajectory, try_configurations
from reelquant.evidence import bootstrap, psnr

KEPT = Path("runs/sensitivity")
FORMATS = ("int3/group-64", "int4/group-64", "int6/channel")
INPUTS = ("int4/token", "int5/token", "int6/token", "int8/token")
WIDE = ("int3/group-64", "int3/group-32", "int4/group-64", "int4/group-32", "int5/group-64", "int6/channel", "int8/channel")
UNIFORM = "int4/group-32"  # 4.5 bits a weight with its scales
MAP_CLIPS, RANGES = 2, 4


class Told:
    """Prints what is measured now."""

    def phase(self, name: str, total: int) -> None:
        print(f"{name}: {total}", flush=True)

    def advance(self) -> None:
        """Nothing to say."""


@dataclass
class Bench:
    """One pipeline.

    Attributes:
        clips: those that allocations are judged on.
        every: one of so many layers is measured by trajectories; with 1 their damages divide budgets, else those of gradients do.
        plans: how many allocations are tried out to compare with predictions.
        randoms: how many random ones the best is taken of.
        noise_calls: recorded calls that noise is measured on.
    """

    clips: Clips
    every: int = 1
    plans: int = 50
    randoms: int = 20
    noise_calls: int = 5

    @cached_property
    def pipe(self) -> Any:
        return self.clips.open()

    @property
    def folder(self) -> Path:
        return KEPT / self.clips.name

    @property
    def wanted(self) -> Wanted:
        ways = ("trajectory", "noise") if self.every == 1 else ("gradient",)
        own = dict(formats=FORMATS, inputs=INPUTS, clips=MAP_CLIPS, ranges=RANGES, configurations=self.plans)
        return Wanted(measures=ways, noise_calls=self.noise_calls, **own)

    @cached_property
    def wide(self) -> SensitivityTable:
        """The map by gradients of more formats, the uniform one among them: a format more costs next to nothing there."""
        wanted = replace(self.wanted, measures=("gradient",), formats=WIDE, configurations=0)
        return measure(self.pipe, self.clips.pipeline, self.folder, wanted, call=self.clips.call, progress=Told()).table

    @cached_property
    def table(self) -> SensitivityTable:
        """All maps, and plans that no map has seen; goes on where it was stopped."""
        found = measure(self.pipe, self.clips.pipeline, self.folder, self.wanted, call=self.clips.call, progress=Told()).table
        known = {row.measure for row in found.rows}
        made = replace(found, rows=(*found.rows, *(row for row in self.wide.rows if row.measure not in known)))
        made.save(self.folder / "sensitivity.json")
        return made

    @cached_property
    def scene(self) -> Scene:
        """The clips of the map, sampled in float."""
        made = scene_of(self.pipe, self.wanted, None, call=self.clips.call, progress=Told())
        made.record()
        return made

    @property
    def target(self) -> Target:
        return self.scene.targets[0]

    @cached_property
    def kept(self) -> Kept:
        """What is measured beside the map."""
        return Kept(self.folder / "beside", [self.clips.digest, self.clips.count, self.table.settings["identity"]])

    @cached_property
    def alone(self) -> list[Damage]:
        """Damages by trajectories: all of the table's, or those of some layers."""
        if self.every == 1:
            return [row for row in self.table.rows if row.measure == "trajectory" and row.part == "weight"]
        names = [layer.name for layer in self.table.layers][:: self.every]
        changes = [(name, "weight", fmt, None) for name in names for fmt in FORMATS]
        return by_trajectory(self.scene, self.target, changes, self.kept)

    # --- clips ----------------------------------------------------------------------------------------------------------------

    @cached_property
    def reference(self) -> Tensor:
        """The clips in float."""
        return self.clips.float_frames(KEPT)

    def judged(self, name: str, changed: Callable[[], AbstractContextManager[Any]]) -> list[float]:
        """PSNR of every clip to the float one, dB."""

        def made() -> list[float]:
            print(f"clips: {name}", flush=True)
            with following(self.scene.targets), changed():
                return psnr(self.reference, self.clips.frames(self.pipe).nan_to_num(0.0)).tolist()

        return self.kept.of(f"clips, {name}", made)

    def weights(self, formats: Mapping[str, str]) -> AbstractContextManager[None]:
        """Inside, layers have these formats."""
        return weights_rounded(self.target, {name: rounded_weight(self.target, name, fmt) for name, fmt in formats.items()})


# --- allocations of equal bytes -----------------------------------------------------------------------------------------------


def uniform_bytes(table: SensitivityTable) -> int:
    """What 4.5 bits for all layers take."""
    return sum(weight_bytes(UNIFORM, layer.shape) for layer in table.layers)


def allocations(bench: Bench) -> dict[str, dict[str, str]]:
    """Name -> format by layer, all within the bytes of the uniform one."""
    table, budget = bench.table, uniform_bytes(bench.table)
    component = table.components[0]
    first = table.measures[0]
    found = {f"{UNIFORM} for all": {layer.name: UNIFORM for layer in table.layers}}
    for method in ("milp", "greedy", "sampled", "surrogate"):
        found[f"{method}, by {first}"] = allocate(table, nbytes=budget, method=method, formats=FORMATS).of(component)
    for way in table.measures[1:]:
        found[f"milp, by {way}"] = allocate(table, nbytes=budget, measure=way, formats=FORMATS).of(component)
    for method in ("milp", "greedy"):
        found[f"{method}, by gradient, {len(WIDE)} formats"] = allocate(bench.wide, nbytes=budget, method=method).of(component)
    best = min(randoms(bench), key=lambda one: one.damage)
    return found | {f"best of {bench.randoms} random ones": dict(best.formats)}


def randoms(bench: Bench) -> list[Configuration]:
    """Random allocations within the same bytes, tried out on the clips of the map."""
    layers = bench.table.layers
    sizes = np.array([[weight_bytes(fmt, layer.shape) for fmt in FORMATS] for layer in layers], dtype=float)
    picks = random_picks(Problem(np.zeros(sizes.shape), sizes, uniform_bytes(bench.table)), bench.randoms)
    formats = [{layer.name: FORMATS[pick] for layer, pick in zip(layers, one, strict=True)} for one in picks]
    return try_configurations(bench.scene, bench.target, formats, bench.kept)


def equal_bytes(bench: Bench) -> str:
    """PSNR of every allocation, and its gain over the uniform one, clip by clip."""
    table, rows, plain = bench.table, [], []
    shapes = {layer.name: layer.shape for layer in table.layers}
    weights = sum(layer.weights for layer in table.layers)
    for name, formats in allocations(bench).items():
        values = bench.judged(f"weights {hash_of(formats)}", lambda formats=formats: bench.weights(formats))
        plain = plain or values
        bits = 8 * sum(weight_bytes(fmt, shapes[layer]) for layer, fmt in formats.items()) / weights
        rows.append([name, f"{bits:.3f}", figure(values), "-" if plain is values else gain(values, plain)])
    return markdown(("allocation", "bits a weight", "PSNR, dB (95 %)", "over uniform, clip by clip, dB (95 %)"), rows)


def hash_of(formats: Mapping[str, str]) -> str:
    """Changes with the allocation."""
    import hashlib

    return hashlib.sha256(repr(sorted(formats.items())).encode()).hexdigest()[:10]


def figure(values: Sequence[float]) -> str:
    found = bootstrap(list(values))
    return f"{found.mean:.1f} ({found.low:.1f} to {found.high:.1f})"


def gain(values: Sequence[float], other: Sequence[float]) -> str:
    found = bootstrap([a - b for a, b in zip(values, other, strict=True)])
    return f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


# --- predictions --------------------------------------------------------------------------------------------------------------


def predicted(table: SensitivityTable, plans: Sequence[Configuration], way: str) -> list[float]:
    """The sum of damages of every plan."""
    rows = table.select(way)  # type: ignore[arg-type]
    return [sum(rows[plan.component, layer, fmt].damage for layer, fmt in plan.formats.items()) for plan in plans]


def by_surrogate(table: SensitivityTable, plans: Sequence[Configuration]) -> tuple[list[float], Sequence[Configuration]]:
    """What a surrogate predicts of every second plan, learned from the others."""
    layers, rows = table.layers, table.select()
    damage = np.array([[rows[layer.component, layer.name, fmt].damage for fmt in FORMATS] for layer in layers])
    picks = [[FORMATS.index(plan.formats[layer.name]) for layer in layers] for plan in plans]
    known = [number for number in range(len(plans)) if number % 4 < 2]  # two of four: plans at random and near the best take turns
    unseen = [number for number in range(len(plans)) if number % 4 >= 2]
    found = learned(damage, [(picks[number], plans[number].damage) for number in known])
    return [float(found[np.arange(len(layers)), picks[number]].sum()) for number in unseen], [plans[number] for number in unseen]


def by_all_plans(table: SensitivityTable, plans: Sequence[Configuration], unseen: Sequence[Configuration]) -> list[float]:
    """What a surrogate predicts of other plans, learned from all of these."""
    layers, rows = table.layers, table.select()
    damage = np.array([[rows[layer.component, layer.name, fmt].damage for fmt in FORMATS] for layer in layers])
    picks = {id(plan): [FORMATS.index(plan.formats[layer.name]) for layer in layers] for plan in (*plans, *unseen)}
    found = learned(damage, [(picks[id(plan)], plan.damage) for plan in plans])
    return [float(found[np.arange(len(layers)), picks[id(plan)]].sum()) for plan in unseen]


def clips_agree(bench: Bench, plans: Sequence[Configuration]) -> str:
    """How far two clips of the map rank plans alike: no prediction can do better for both."""
    names = [f"configuration, {plan.component}, {sorted(plan.formats.items())}" for plan in plans]
    values = [bench.kept.found[name] for name in names]
    return correlation([one[0] for one in values], [one[1] for one in values])


def predictions(bench: Bench) -> str:
    """Spearman's correlation of predicted and measured damage of whole plans."""
    table, plans, equal = bench.table, bench.table.configurations, randoms(bench)
    rows = []
    for way in table.measures:
        spread_, same = (correlation(predicted(table, some, way), [one.damage for one in some]) for some in (plans, equal))
        rows.append([f"sum of damages by {way}", f"{spread_} ({len(plans)} plans)", f"{same} ({len(equal)} plans)"])
    values, unseen = by_surrogate(table, plans)
    same = correlation(by_all_plans(table, plans, equal), [one.damage for one in equal])
    rows.append(
        [
            "surrogate, learned from the other half; from all plans of the first column",
            f"{correlation(values, [one.damage for one in unseen])} ({len(unseen)} plans)",
            f"{same} ({len(equal)} plans)",
        ]
    )
    rows.append(["measured damage to the one clip, for that to the other", "-", f"{clips_agree(bench, equal)} ({len(equal)} plans)"])
    return markdown(("prediction", "plans between 3 and 6 bits", f"random plans of {UNIFORM}'s bytes"), rows)


def correlation(one: Sequence[float], other: Sequence[float]) -> str:
    """Spearman's rank correlation."""
    return f"{float(spearmanr(one, other).statistic):.2f}"  # pyright: ignore[reportAttributeAccessIssue]


def ways(bench: Bench) -> str:
    """How far gradients and noise agree with a layer at a time, and what each costs in calls of the denoiser."""
    alone, rows = bench.alone, []
    calls, layers = len(bench.target.calls), len(bench.table.layers)  # calls of all clips of the map at once
    gains = sum(name.startswith("gain") for name in Kept(bench.folder, _settings(bench)).found)
    whole = layers * len(FORMATS) * calls * MAP_CLIPS
    costs = {
        "gradient": MAP_CLIPS * PROBES * calls * 4,  # forward, forward again, and a backward pass that counts as two
        "noise": (bench.noise_calls * (layers + 1) + gains * calls) * MAP_CLIPS,
    }
    costs = {way: cost for way, cost in costs.items() if way in bench.table.measures}
    for way, cost in costs.items():
        known = bench.table.select(way)  # type: ignore[arg-type]
        pairs = [(row, known[row.component, row.layer, row.format]) for row in alone]
        every = correlation([a.damage for a, _ in pairs], [b.damage for _, b in pairs])
        each = [correlation(*zip(*((a.damage, b.damage) for a, b in pairs if a.format == fmt), strict=True)) for fmt in FORMATS]
        rows.append([way, every, *each, f"{cost:,} of {whole:,} ({cost / whole:.1%})"])
    return markdown(("map by", "all", *FORMATS, "calls of the denoiser for a clip, of those that a layer at a time needs"), rows)


def _settings(bench: Bench) -> dict[str, Any]:
    from reelquant.damage.run import LATER

    return {key: value for key, value in bench.table.settings.items() if key not in LATER}


def allocated(bench: Bench) -> str:
    """What allocations of equal bytes are worth, and nothing else."""
    table, clips = bench.table, bench.clips
    steps = len(table.timesteps[table.components[0]])
    return "\n".join([
        f"# {UNIFORM} and allocations within its bytes, {clips.name}\n",
        f"{len(table.layers)} layers, {steps} steps, {clips.count} clips of evaluation captions; the map by gradients on {MAP_CLIPS} other "
        "clips. Weights are rounded to nearest, inputs are float. `benchmarks/sensitivity.py --equal-bytes`.\n",
        equal_bytes(bench),
    ])  # fmt: skip


def report(bench: Bench) -> str:
    """The whole result."""
    table, clips = bench.table, bench.clips
    steps = len(table.timesteps[table.components[0]])
    spent = Kept(bench.folder, _settings(bench)).seconds
    words = f"inputs {', '.join(INPUTS)}"
    units = [seconds for name, seconds in spent.items() if name.startswith("gradient") and f"weights {', '.join(WIDE)}, {words}" in name]
    some = "all layers" if bench.every == 1 else f"one of {bench.every} layers"
    parts = [
        f"# Sensitivity of {clips.name}\n",
        f"{len(table.layers)} layers, {steps} steps, {clips.count} clips of evaluation captions to judge on; maps and plans on {MAP_CLIPS} "
        f"other clips. `benchmarks/sensitivity.py` says how; few clips make few of these intervals narrow.\n",
        f"## {UNIFORM} and allocations within its bytes\n",
        equal_bytes(bench),
        "\n## Predicted and measured damage of whole plans, Spearman\n",
        predictions(bench),
        f"\n## Maps beside a layer at a time ({some}), Spearman\n",
        ways(bench),
        f"\nAllocations choose among {', '.join(FORMATS)}; the {len(WIDE)} formats are {', '.join(WIDE)}.\n"
        f"\nThe map of {len(table.layers)} layers x {len(WIDE) + len(INPUTS)} formats x {steps} steps by gradients took "
        f"{sum(units):.0f} seconds of one core.\n",
    ]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the result."""
    made = parser(__doc__ or "")
    made.add_argument("--every", type=int, default=1, help="measure one of so many layers by trajectories")
    made.add_argument("--plans", type=int, default=50, help="allocations that predictions are compared with")
    made.add_argument("--randoms", type=int, default=20, help="random allocations of equal bytes")
    made.add_argument("--noise-calls", type=int, default=5, help="recorded calls that noise is measured on")
    made.add_argument("--equal-bytes", action="store_true", help="only what allocations are worth, in a file of its own")
    args = made.parse_args(arguments)
    torch.set_num_threads(args.threads)
    clips = Clips(args.pipeline, args.clips, dict(args.set), args.batch)
    bench = Bench(clips, args.every, args.plans, args.randoms, args.noise_calls)
    name, text = ("equal-bytes", allocated(bench)) if args.equal_bytes else ("sensitivity", report(bench))
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"{name}-{bench.clips.name}.md"
    file.write_text(text)
    print(file)


if __name__ == "__main__":
    main()
