r"""A budget of bits over the denoising steps, against the same number of bits at every step.

Run it from the repository root::

    python -m benchmarks.step_budget --pipeline tiny-dit --clips 16 --set num_inference_steps=8 --output benchmarks/results

Which steps get which bits is measured by ``reelquant sensitivity`` on other texts than the clips that plans are judged on. The plans run in
the quantized pipeline: static ranges per tensor, weights stored once as int8 per channel and read in fewer bits, integer products where
the machine has them. What is measured is kept in ``runs/step-budget``; the result is ``step-budget-PIPELINE.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import reelquant
from benchmarks.common import Clips, denoiser, markdown, parser
from reelquant.allocate import SensitivityTable, StepPlan, allocate_steps
from reelquant.allocate.table import Measure
from reelquant.clock import NAME, Widths
from reelquant.damage import Wanted, measure
from reelquant.damage.kept import Kept
from reelquant.damage.rounding import own_inputs, own_weights
from reelquant.damage.run import INPUT_BITS, STEP_BITS, scene_of
from reelquant.damage.trajectory import steps_by_trajectory
from reelquant.evidence import bootstrap, psnr

KEPT = Path("runs/step-budget")
BITS, MAP_CLIPS = 6, 4
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


@dataclass
class Bench:
    """One pipeline.

    Attributes:
        clips: those that plans are judged on.
        way: how single steps are measured.
    """

    recipes: ClassVar[Mapping[str, dict[str, Any]]] = {"stored": STORED, "dedicated": DEDICATED, "four": FOUR}
    clips: Clips
    way: Measure = "trajectory"

    @property
    def folder(self) -> Path:
        return KEPT / f"{self.clips.name}-{self.way}-{self.clips.digest}"

    @cached_property
    def table(self) -> SensitivityTable:
        """The map of single steps; goes on where it was stopped."""
        formats = tuple(f"int{bits}/channel" for bits in INPUT_BITS)
        wanted = Wanted(recipe=STORED, formats=formats, clips=MAP_CLIPS, ranges=1)
        if self.way == "gradient":
            return measure(self.clips.open(), self.clips.pipeline, self.folder / "map", wanted, call=self.clips.call).table
        scene = scene_of(self.clips.open(), wanted, None, call=self.clips.call)
        scene.record()
        kept, target = Kept(self.folder / "map", MAP_CLIPS), scene.targets[0]
        rows, together = [], {}
        for part, formats in (("input", own_inputs(target, STEP_BITS)), ("weight", own_weights(target, STEP_BITS))):
            mine, cosines = steps_by_trajectory(scene, target, part, formats, kept)  # type: ignore[arg-type]
            rows += mine
            together[target.component, part, "trajectory"] = cosines
        times = {target.component: tuple(target.timesteps)}
        return SensitivityTable(self.clips.name, "stored", target.layers, tuple(rows), timesteps=times, together=together)

    @cached_property
    def kept(self) -> Kept:
        """PSNR of clips by what was judged."""
        return Kept(self.folder, [self.clips.digest, self.clips.count])

    @cached_property
    def reference(self) -> Tensor:
        """The clips in float."""
        return self.clips.float_frames(KEPT)

    @cached_property
    def _quantized(self) -> dict[str, Any]:
        return {}

    def pipe(self, recipe: str) -> Any:
        """The quantized pipeline."""
        if recipe not in self._quantized:
            self._quantized[recipe] = self.clips.open()
            reelquant.quantize(self._quantized[recipe], self.recipes[recipe], **self.clips.call)
        return self._quantized[recipe]

    def judged(self, recipe: str, inputs: Sequence[int] = (), weights: Sequence[int] = ()) -> list[float]:
        """PSNR of every clip to the float one, dB, with these bits at every step; those that are stored by default."""

        def made() -> list[float]:
            print(f"clips: {recipe}, inputs {inputs}, weights {weights}", flush=True)
            pipe = self.pipe(recipe)
            clock = denoiser(pipe)[1].get_submodule(NAME)
            steps = len(clock.timesteps)
            clock.change_bits([Widths(*pair) for pair in zip(inputs or [0] * steps, weights or [0] * steps, strict=True)])  # type: ignore[operator]
            return psnr(self.reference, self.clips.frames(pipe).nan_to_num(0.0)).tolist()

        return self.kept.of(f"{recipe}, inputs {tuple(inputs)}, weights {tuple(weights)}", made)

    def plan(self, part: Any, method: str = "milp") -> StepPlan:
        """The plan of a budget of :data:`BITS`."""
        return allocate_steps(self.table, BITS, part=part, measure=self.way, method=method)


def figure(values: Sequence[float]) -> str:
    found = bootstrap(list(values))
    return f"{found.mean:.1f} ({found.low:.1f} to {found.high:.1f}), {min(values):.1f}"


def gain(values: Sequence[float], other: Sequence[float]) -> str:
    return figure([a - b for a, b in zip(values, other, strict=True)])


def words(bits: Sequence[int]) -> str:
    return " ".join(map(str, bits))


def report(bench: Bench) -> str:
    """The whole result."""
    steps = len(bench.table.timesteps[bench.table.components[0]])
    flat, plans = [BITS] * steps, {part: bench.plan(part) for part in ("input", "weight")}
    inputs, weights = (plans[part].bits for part in ("input", "weight"))
    uniform, both = bench.judged("stored", flat), bench.judged("stored", flat, flat)
    rows = [
        [f"inputs {BITS}, weights 8", figure(uniform), "-"],
        [f"inputs {words(inputs)}, weights 8", figure(moved := bench.judged("stored", inputs)), gain(moved, uniform)],
        [f"inputs {BITS}, weights {BITS}, read of the stored 8", figure(both), "-"],
        [
            f"inputs {words(inputs)}, weights {words(weights)}, read of the stored 8",
            figure(moved := bench.judged("stored", inputs, weights)),
            gain(moved, both),
        ],
        [f"inputs {BITS}, weights {BITS}, stored as such", figure(own := bench.judged("dedicated")), gain(own, both)],
    ]
    read, own = bench.judged("stored", [8] * steps, [4] * steps), bench.judged("four")
    rows.append(["inputs 8, weights 4, read of the stored 8", figure(read), "-"])
    rows.append(["inputs 8, weights 4, stored as such", figure(own), gain(own, read)])
    parts = [
        f"# {BITS} bits a step on average, {bench.clips.name}\n",
        f"{steps} steps, {bench.clips.count} clips of evaluation captions to judge on; maps by {bench.way} on {MAP_CLIPS} other clips. "
        "dB with 95 % intervals over clips, then the worst clip. Gains are clip by clip, over the row before that has a dash.\n",
        markdown(("bits by step", "PSNR, dB", "gain, dB"), rows),
        "\n## Predicted damage\n",
        markdown(("", "bits", "plan", "uniform", "gain, dB", "greedy start"), [_predicted(bench, one) for one in plans.values()]),
    ]
    return "\n".join(parts) + "\n"


def _predicted(bench: Bench, plan: StepPlan) -> list[str]:
    import math

    other = bench.plan(plan.part, "greedy")
    saved = 10 * math.log10(plan.uniform[1] / plan.damage)
    return [f"{plan.part}s", words(plan.bits), f"{plan.damage:.3g}", f"{plan.uniform[1]:.3g}", f"{saved:.1f}", f"{other.damage:.3g}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the result."""
    made = parser(__doc__ or "")
    made.add_argument("--measure", default="trajectory", choices=("gradient", "trajectory"), help="how single steps are measured")
    args = made.parse_args(arguments)
    torch.set_num_threads(args.threads)
    bench = Bench(Clips(args.pipeline, args.clips, dict(args.set), args.batch), args.measure)
    text = report(bench)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"step-budget-{bench.clips.name}.md"
    file.write_text(text)
    print(file)


if __name__ == "__main__":
    main()
