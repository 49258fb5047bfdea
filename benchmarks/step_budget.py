r"""A budget of bits over denoising steps and layers, against the same number of bits everywhere.

Run it from the repository root::

    python -m benchmarks.step_budget --pipeline tiny-dit --clips 16 --set num_inference_steps=8 --output runs/step-budget
    python -m benchmarks.step_budget --pipeline tiny-dit --set num_inference_steps=8 --final --output benchmarks/results

Which steps and layers get which bits is measured by ``reelquant sensitivity`` on other texts than the clips that plans are judged on, and
plans are tried on further texts before one is chosen. They run in the quantized pipeline: static ranges per tensor, weights stored once as
int8 per channel and read in fewer bits, integer products where the machine has them. What is measured is kept in ``runs/step-budget``; the
result is ``step-budget-PIPELINE.md``, with ``--final`` only of the plans that were chosen; ``--as-stored`` writes
``step-budget-stored-PIPELINE.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import reelquant
from benchmarks.common import SAMPLING_SEED, Clips, denoiser, markdown, parser
from reelquant.allocate import LayerBits, LayerFacts, SensitivityTable, StepPlan, allocate_steps
from reelquant.allocate.steps import OVER, plans_over
from reelquant.allocate.table import EVERY, Measure, Part
from reelquant.clock import OWN, Apart, Widths
from reelquant.damage import Wanted, measure
from reelquant.damage.kept import Kept
from reelquant.damage.run import EVERY_STEP, INPUT_BITS
from reelquant.evidence import bootstrap, psnr
from reelquant.models.sampling import sample
from reelquant.nn import change_bits

KEPT = Path("runs/step-budget")
BITS, MAP_CLIPS, CHUNK = 6, 4, 8
MSE = {"name": "mse", "p": 2.0}
STORED: dict[str, Any] = {
    "extends": "minmax-w8a8",
    "name": "stored",
    "defaults": {"weight": {"range": MSE}, "input": {"format": "uint6"}},
    "calibrate": {"prompts": 8},
}
DEDICATED: dict[str, Any] = STORED | {
    "extends": "minmax-w6a6",
    "name": "dedicated",
    "defaults": {"weight": {"range": MSE, "format": "int6"}, "input": {"format": "uint6"}},
}
FOUR: dict[str, Any] = STORED | {"name": "four", "defaults": {"weight": {"range": MSE, "format": "int4"}, "input": {"format": "uint8"}}}


Plans = Mapping[Part, StepPlan]


@dataclass
class Bench:
    """One pipeline.

    Attributes:
        clips: those that plans are judged on.
        way: how damages of single steps are measured.
        trials: clips that plans are tried on; 0 to choose by predictions.
    """

    recipes: ClassVar[Mapping[str, dict[str, Any]]] = {"stored": STORED, "dedicated": DEDICATED, "four": FOUR}
    clips: Clips
    way: Measure = "gradient"
    trials: int = 8

    @cached_property
    def table(self) -> SensitivityTable:
        """The map of layers and steps; goes on where it was stopped."""
        wanted = Wanted(
            recipe=STORED,
            formats=tuple(f"int{bits}/channel" for bits in INPUT_BITS),
            clips=MAP_CLIPS,
            ranges=EVERY_STEP,
            steps=self.way == "trajectory",
            budgets={"input": BITS, "weight": BITS} if self.trials else {},
            trials=max(self.trials, 1),
        )
        folder = KEPT / f"map-{self.clips.name}"
        return measure(self.clips.open(), self.clips.pipeline, folder, wanted, call=self.clips.call).table

    @cached_property
    def layers(self) -> Sequence[LayerFacts]:
        """Those of the map."""
        return self.table.layers

    @property
    def folder(self) -> Path:
        """What was judged with these weights and this call."""
        return KEPT / f"{self.clips.name}-{replace(self.clips, count=CHUNK).digest}"

    @cached_property
    def kept(self) -> Kept:
        """PSNR of clips by what was judged, :data:`CHUNK` clips at a time: more clips go on from fewer."""
        return Kept(self.folder, self.folder.name)

    def frames(self, pipe: Any, first: int) -> Tensor:
        """Some clips, from the first one on."""
        prompts = self.clips.prompts[first : first + CHUNK]
        return sample(pipe, prompts, seed=SAMPLING_SEED + first, batch=self.clips.batch, **self.clips.call).float()

    def reference(self, first: int) -> Tensor:
        """The same in float."""
        file = self.folder / f"float-{first}-{min(self.clips.count, first + CHUNK)}.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"frames": self.frames(self.clips.open(), first).contiguous()}, file)
        return load_file(file)["frames"]

    @cached_property
    def _quantized(self) -> dict[str, Any]:
        return {}

    def pipe(self, recipe: str) -> Any:
        """The quantized pipeline."""
        if recipe not in self._quantized:
            folder = self.folder / recipe
            if not folder.is_dir():
                pipe = self.clips.open()
                reelquant.save(pipe, folder, reelquant.quantize(pipe, self.recipes[recipe], **self.clips.call))
            self._quantized[recipe] = reelquant.load(folder)
        return self._quantized[recipe]

    def judged(self, recipe: str, plans: Plans | None = None) -> list[float]:
        """PSNR of every clip to the float one, dB, with the bits of these plans; those that are stored by default."""
        names = sorted(f"{part}s {plan.content}" for part, plan in (plans or {}).items())

        def made(first: int) -> list[float]:
            print(f"clips from {first}: {recipe}, {', '.join(names)[:200]}", flush=True)
            reference, pipe = self.reference(first), self.pipe(recipe)
            change_bits(denoiser(pipe)[1], *_widths(plans or {}, self.layers))
            return psnr(reference, self.frames(pipe, first).nan_to_num(0.0)).tolist()

        several = range(0, self.clips.count, CHUNK)
        return [
            one
            for first in several
            for one in self.kept.of(f"{recipe}, {names}, {first} to {min(first + CHUNK, self.clips.count)}", partial(made, first))
        ]

    def plan(self, part: Part) -> StepPlan:
        """The plan of a budget of :data:`BITS` that is chosen."""
        return allocate_steps(self.table, BITS, part=part)

    def plans(self, part: Part) -> Mapping[str, StepPlan]:
        """All that were to choose among."""
        return plans_over(self.table, BITS, self.table.components[0], part=part)

    @cached_property
    def steps(self) -> int:
        """Of the sampler."""
        return len(self.table.timesteps[self.table.components[0]])

    def flat(self, part: Part, bits: int) -> StepPlan:
        """The same number of bits everywhere."""
        group = LayerBits((EVERY,), 1.0, (bits,) * self.steps)
        return StepPlan(self.table.components[0], part, "nothing", (group,), math.nan, (bits, math.nan))


def _widths(plans: Plans, layers: Sequence[LayerFacts]) -> tuple[tuple[Widths, ...], list[Apart]]:
    """The bits of plans as the clock takes them: those of layers that no group names, and those of groups."""
    if not plans:
        return (), []
    steps = len(next(iter(plans.values())).groups[0].bits)
    members: dict[tuple[Widths, ...], list[str]] = {}
    for layer in layers:
        pair = [_bits_of(plans.get(part), layer.name) or (OWN,) * steps for part in ("input", "weight")]
        members.setdefault(tuple(Widths(*one) for one in zip(*pair, strict=True)), []).append(layer.name)
    most = max(members, key=lambda one: len(members[one]))
    return most, [Apart(tuple(names), widths) for widths, names in members.items() if widths != most]


def _bits_of(plan: StepPlan | None, layer: str) -> tuple[int, ...]:
    return () if plan is None else next(one.bits for one in plan.groups if one.layers == (EVERY,) or layer in one.layers)


def figure(values: Sequence[float]) -> str:
    found = bootstrap(list(values))
    return f"{found.mean:.1f} ({found.low:.1f} to {found.high:.1f}), {min(values):.1f}"


def gain(values: Sequence[float], other: Sequence[float]) -> str:
    return figure([a - b for a, b in zip(values, other, strict=True)])


def means(plan: StepPlan, layers: Sequence[LayerFacts]) -> str:
    """Bits, mean over steps and layers: layers by multiplications, by weights, all alike."""
    found = []
    for count in (lambda layer: layer.products, lambda layer: layer.weights, lambda layer: 1):
        sizes = [count(layer) for layer in layers]
        bits = [sum(_bits_of(plan, layer.name)) / len(plan.groups[0].bits) for layer in layers]
        found.append(sum(a * b for a, b in zip(sizes, bits, strict=True)) / sum(sizes))
    return ", ".join(f"{one:.2f}" for one in found)


def report(bench: Bench, *, final: bool) -> str:
    """The whole result."""
    inputs, weights = (bench.plans(part) for part in ("input", "weight"))
    chosen: Plans = {part: bench.plan(part) for part in ("input", "weight")}
    others = [one for one in OVER if one in inputs and one != "nothing"]
    pairs = [chosen] if final else [{"input": inputs[one], "weight": weights[one]} for one in others]
    alone = bench.judged("stored", {"input": bench.flat("input", BITS)})
    both = bench.judged("stored", {part: bench.flat(part, BITS) for part in ("input", "weight")})
    rows = [[f"inputs {BITS}", figure(alone), "-", f"{BITS}"]]
    for plan in [pair["input"] for pair in pairs]:
        now = bench.judged("stored", {"input": plan})
        rows.append([f"inputs over {plan.over}", figure(now), gain(now, alone), means(plan, bench.layers)])
    rows.append([f"inputs {BITS}, weights {BITS}", figure(both), "-", f"{BITS}"])
    for pair in pairs:
        now, words = bench.judged("stored", pair), ", ".join(f"{part}s over {plan.over}" for part, plan in pair.items())
        rows.append([words, figure(now), gain(now, both), means(pair["weight"], bench.layers)])
    trials = f"plans tried on {bench.trials} further ones" if bench.trials else "plans chosen by what is predicted"
    plans = [row for part in chosen for row in _plans(bench, part, chosen[part])]
    parts = [
        f"# {BITS} bits a step on average, {bench.clips.name}\n",
        f"{bench.steps} steps, {bench.clips.count} clips of evaluation captions to judge on; maps by {bench.way} on {MAP_CLIPS} other "
        f"clips, {trials}. Weights are stored in 8 bits. dB with 95 % intervals over clips, then the "
        "worst clip. Gains are clip by clip, over the row before that has a dash. Means of bits (of the last named part) are over steps "
        "and layers: layers by multiplications (the budget), by weights, all alike.\n",
        markdown(("bits", "PSNR, dB", "gain, dB", "means of bits"), rows),
        "\n## Plans\n",
        markdown(("", "over", "predicted", "tried", "chosen", "bits"), plans),
    ]
    return "\n".join(parts) + "\n"


def as_stored(bench: Bench) -> str:
    """Weights of 8 bits that are read in fewer, beside weights that are stored in these."""
    both = bench.judged("stored", {part: bench.flat(part, BITS) for part in ("input", "weight")})
    read = bench.judged("stored", {"input": bench.flat("input", 8), "weight": bench.flat("weight", 4)})
    rows = [
        [f"inputs {BITS}, weights {BITS}, read of the stored 8", figure(both), "-"],
        [f"inputs {BITS}, weights {BITS}, stored as such", figure(own := bench.judged("dedicated")), gain(own, both)],
        ["inputs 8, weights 4, read of the stored 8", figure(read), "-"],
        ["inputs 8, weights 4, stored as such", figure(own := bench.judged("four")), gain(own, read)],
    ]
    head = (
        f"# Weights read in fewer bits, {bench.clips.name}\n\n{bench.steps} steps, {bench.clips.count} clips of evaluation captions. "
        "dB with 95 % intervals over clips, then the worst clip. Gains are clip by clip, over the row before.\n\n"
    )
    return head + markdown(("bits", "PSNR, dB", "gain, dB"), rows)


def _plans(bench: Bench, part: Part, chosen: StepPlan) -> list[list[str]]:
    tried = {one.groups: one.damage for one in bench.table.tried if one.part == part}
    rows = []
    for over, plan in bench.plans(part).items():
        damage = tried.get(plan.content)
        bits = "; ".join(f"{group.share:.0%} of products: {' '.join(map(str, group.bits))}" for group in plan.groups)
        mark = "yes" if plan.content == chosen.content else ""
        rows.append([f"{part}s", over, f"{plan.damage:.3g}", "-" if damage is None else f"{damage:.3g}", mark, bits])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the result."""
    made = parser(__doc__ or "")
    made.add_argument("--measure", default="gradient", choices=("gradient", "trajectory"), help="how single steps are measured")
    made.add_argument("--trials", type=int, default=8, help="clips that plans are tried on; 0 to choose by predictions")
    made.add_argument("--final", action="store_true", help="only uniform bits and the plans that are chosen")
    made.add_argument("--as-stored", action="store_true", help="instead, weights read in fewer bits beside weights stored in these")
    args = made.parse_args(arguments)
    torch.set_num_threads(args.threads)
    bench = Bench(Clips(args.pipeline, args.clips, dict(args.set), args.batch), args.measure, args.trials)
    text = as_stored(bench) if args.as_stored else report(bench, final=args.final)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"step-budget-{'stored-' * args.as_stored}{bench.clips.name}.md"
    file.write_text(text)
    print(file)


if __name__ == "__main__":
    main()
