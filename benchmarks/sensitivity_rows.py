r"""The methods of dividing bits, each held against its own claim. Run it after ``benchmarks.sensitivity``, with the same options::

    python -m benchmarks.sensitivity_rows --pipeline tiny-dit --clips 16 --set num_inference_steps=8 --output benchmarks/results
    python -m benchmarks.sensitivity_rows --pipeline tiny-unet --clips 8 --set num_inference_steps=4 --every 16 --plans 20 --randoms 10 \
        --output benchmarks/results

What is measured is kept beside the maps, in ``runs/sensitivity``; the result is ``sensitivity-rows-PIPELINE.md``. Everything is at equal
bytes, on the clips that the other sections are judged on; choices are made on the clips of the map. No figure here needs a recipe:
formats are rounded to nearest in the float model, so that only the choice of formats differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks import attention, groups
from benchmarks.common import Clips, Records, markdown, parser
from benchmarks.divergences import damages
from benchmarks.recipe_search import Trials, searched
from benchmarks.sensitivity import FORMATS, MAP_CLIPS, UNIFORM, Bench, correlation, figure, gain, hash_of, predicted
from reelquant.allocate import SensitivityTable, allocate
from reelquant.allocate.milp import solve
from reelquant.allocate.problem import Picks, Problem
from reelquant.allocate.sampled import TRIED, cross_entropy
from reelquant.allocate.sizes import weight_bytes
from reelquant.damage.gains import gains
from reelquant.damage.noise import by_noise
from reelquant.damage.trajectory import try_configurations
from reelquant.recipes.recipe import load_recipe

LOW_UNIFORM = "int3/group-32"  # 3.5 bits a weight with its scales
ATTENTION_CLIPS = 16
RATIOS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)  # of the bytes that attention over the prompt gets in the joint optimum


@dataclass
class Claims:
    """What the claims share.

    Attributes:
        bench: the pipeline and its maps.
    """

    bench: Bench

    @property
    def table(self) -> SensitivityTable:
        return self.bench.table

    def problem(self, damage: np.ndarray | None = None, uniform: str = UNIFORM, *, tries: bool = False) -> Problem:
        """The budget of a uniform format among :data:`FORMATS`, with damages of the map, or others."""
        layers, rows = self.table.layers, self.table.select()
        sizes = np.array([[weight_bytes(fmt, layer.shape) for fmt in FORMATS] for layer in layers], dtype=float)
        if damage is None:
            damage = np.array([[rows[layer.component, layer.name, fmt].damage for fmt in FORMATS] for layer in layers])
        budget = sum(weight_bytes(uniform, layer.shape) for layer in layers)
        return Problem(damage, sizes, budget, self.tried if tries else None)

    def formats(self, picks: Picks) -> dict[str, str]:
        return {layer.name: FORMATS[pick] for layer, pick in zip(self.table.layers, picks, strict=True)}

    def tried(self, picks: Sequence[int]) -> float:
        """What an allocation does to the clips of the map."""
        return try_configurations(self.bench.scene, self.bench.target, [self.formats(list(picks))], self.bench.kept)[0].damage

    def psnr(self, formats: Mapping[str, str]) -> list[float]:
        """Of the clips that are judged."""
        return self.bench.judged(f"weights {hash_of(formats)}", lambda: self.bench.weights(formats))

    def of(self, picks: Picks) -> list[float]:
        return self.psnr(self.formats(picks))

    def uniform(self, fmt: str) -> list[float]:
        return self.psnr({layer.name: fmt for layer in self.table.layers})


Row = list[str]
Claim = Callable[[Claims], list[Row]]


def _row(method: str, wanted: str, way: str, values: Sequence[float], than: str, others: Sequence[float]) -> Row:
    return [method, wanted, way, figure(values), than, gain(values, others)]


def greedy_row(claims: Claims) -> list[Row]:
    """MPTQ-ViT (arXiv 2401.14895): bits by a greedy search."""
    found = allocate(claims.table, nbytes=claims.problem().budget, method="greedy", formats=FORMATS)
    values = claims.psnr(found.of(claims.table.components[0]))
    return [_row("greedy (MPTQ-ViT)", "+0.5 dB over uniform", "`greedy`", values, UNIFORM, claims.uniform(UNIFORM))]


def sampled_row(claims: Claims) -> list[Row]:
    """FLIQS (arXiv 2308.03290): a search that draws whole allocations, and tries the last few."""
    exact, problem = solve(*_parts(claims.problem())), claims.problem(tries=True)
    values = claims.of(cross_entropy(problem))
    return [_row("sampled (FLIQS)", "-0.3 dB to milp in 200 trials", f"`sampled`, {TRIED} trials", values, "milp", claims.of(exact))]


def low_bits_row(claims: Claims) -> list[Row]:
    """Qua2SeDiMo (arXiv 2412.14628): additive sensitivities, below 3.5 bits."""
    budget = claims.problem(uniform=LOW_UNIFORM).budget
    rows, plain = [], claims.uniform(LOW_UNIFORM)
    for method in ("surrogate", "milp"):
        found = allocate(claims.table, nbytes=budget, method=method, formats=FORMATS)
        values = claims.psnr(found.of(claims.table.components[0]))
        way = f"`{method}`, {found.bits:.2f} bits"
        rows.append(_row("additive sensitivities (Qua2SeDiMo)", "+1 dB over uniform at 3.5 bits", way, values, LOW_UNIFORM, plain))
    return rows


def relevance_row(claims: Claims) -> list[Row]:
    """LRP-QViT (arXiv 2401.11243): gradients say which layers matter, beside what their sizes alone would say."""
    table, bench = claims.table, claims.bench
    known = table.select("gradient")
    pairs = [(row.damage, known[row.component, row.layer, row.format].damage) for row in bench.alone]
    rho = correlation(*map(list, zip(*pairs, strict=True)))
    by_size = np.array([[layer.weights * 4.0 ** -float(fmt[3]) for fmt in FORMATS] for layer in table.layers])
    found = allocate(table, nbytes=claims.problem().budget, measure="gradient", formats=FORMATS).of(table.components[0])
    sizes = claims.of(solve(*_parts(claims.problem(by_size))))
    words = f"milp by gradients (Spearman {rho} with a layer at a time, {len(pairs)} layers and formats)"
    return [_row("relevance (LRP-QViT)", "Spearman 0.6; better than by size", words, claims.psnr(found), "milp by size", sizes)]


def histogram_row(claims: Claims) -> list[Row]:
    """AdaPT (arXiv 2107.13490): word lengths from what rounding does to histograms. No format is tried in the denoiser."""
    problem = claims.problem()
    exact, rows = solve(*_parts(problem)), []
    for words, damage in damages(claims.bench.target, FORMATS):
        rho = float(spearmanr(damage.ravel(), problem.damage.ravel()).statistic)  # pyright: ignore[reportAttributeAccessIssue]
        values = claims.of(solve(*_parts(claims.problem(damage))))
        way = f"milp by {words} (Spearman {rho:.2f} with the map)"
        rows.append(_row("histograms (AdaPT)", "-0.3 dB to milp without a trial", way, values, "milp", claims.of(exact)))
    return rows


def noise_row(claims: Claims) -> list[Row]:
    """QuantNAS (arXiv 2208.14839): noise instead of rounding while searching. One recorded call, and the gains."""
    bench, plans = claims.bench, claims.table.configurations
    found = by_noise(bench.scene.progress, bench.target, FORMATS, (), 1, bench.kept)
    gained = replace(gains(bench.scene, bench.target, bench.kept), halves={})  # one call has one half of guidance
    table = replace(claims.table, rows=tuple(found.rows(gained, ())))
    rho = correlation(predicted(table, plans, "noise"), [one.damage for one in plans])
    calls, layers = len(bench.target.calls), len(claims.table.layers)
    points = sum(name.startswith("gain") and "step" in name for name in bench.kept.found)
    cost = (layers + 1 + points * calls) * MAP_CLIPS
    whole = layers * len(FORMATS) * calls * MAP_CLIPS
    told = f"Spearman {rho} ({len(plans)} plans), {whole / cost:.0f} times cheaper"
    return [["noise (QuantNAS)", "Spearman 0.7 with quality, 10 times cheaper", "noise of one call", "-", "a layer at a time", told]]


def groups_row(claims: Claims) -> list[Row]:
    """MixDQ (arXiv 2405.17873): attention over the prompt has a budget of its own, and how the two share the bytes is tried out."""
    problem = claims.problem(tries=True)
    exact = solve(*_parts(problem))
    cross = np.array([layer.cross or layer.role == "prompt" for layer in claims.table.layers])
    if cross.all() or not cross.any():
        return []
    trial = problem.trial
    assert trial is not None
    found = min(shared(problem, cross, exact), key=trial)
    way = f"milp apart, {len(RATIOS)} ratios tried"
    return [_row("two groups (MixDQ)", "better than one", way, claims.of(found), "milp", claims.of(exact))]


def shared(problem: Problem, apart: np.ndarray, joint: Picks) -> list[Picks]:
    """The best picks of two groups of layers, each with its own budget, at several ratios of what the joint optimum gives them."""
    rows = np.arange(problem.layers)
    found = []
    for ratio in RATIOS:
        mine = float(problem.sizes[rows, joint][apart].sum()) * ratio
        mine = min(max(mine, float(problem.sizes[apart].min(1).sum())), float(problem.sizes[apart].max(1).sum()))
        rest = problem.budget - mine
        if rest < problem.sizes[~apart].min(1).sum():
            continue
        picks = np.zeros(problem.layers, dtype=int)
        picks[apart] = solve(problem.damage[apart], problem.sizes[apart], mine)
        picks[~apart] = solve(problem.damage[~apart], problem.sizes[~apart], rest)
        found.append(picks.tolist())
    return found


def recipes_row(claims: Claims) -> list[Row]:
    """Quantune (arXiv 2202.05048): a search over whole recipes that begins with what was measured of other models."""
    rows = []
    for one in searched(Trials.load(Path("benchmarks/results/rows.jsonl")), splits=0):
        if one.pipeline == claims.bench.clips.name:
            way = f"{len(one.tried)} of {len(one.figures)} recipes ({one.words}), after trials on {' and '.join(one.others)}"
            told = f"{-one.lost:+.1f}"
            rows.append(
                ["search over recipes (Quantune)", "-0.3 dB to all of them in 25 % of the trials", way, "-", "the best of all", told]
            )
    return rows


def attention_row(claims: Claims) -> list[Row]:
    """Mixed Non-linear Quantization (arXiv 2407.18437): numbers by signal to noise, for every softmax by itself.

    Ours: the weights of attention, by place and step, by the error of the output of attention. Rows of ``benchmarks.attention``, 16 clips
    in the pipeline's own steps, with the layers' weights in 8 bits.
    """
    clips = Clips(claims.bench.clips.pipeline, ATTENTION_CLIPS)
    known = {(row["name"], row["digest"]): row["psnr"] for row in Records(Path("benchmarks/results/rows.jsonl")).load() if row.get("psnr")}
    rows = []
    for bits, candidates in attention.CHOICES.items():
        chosen = known.get(groups.key(clips, load_recipe(attention.chosen(bits))))
        for one in candidates if chosen else ():
            single = known.get(groups.key(clips, load_recipe(attention.single(one))))
            if single:
                way = f"one of {', '.join(candidates)} by place and step"
                rows.append(_row("attention weights (Mixed Non-linear)", "at least as good as every single one", way, chosen, one, single))
    return rows


def _parts(problem: Problem) -> tuple[np.ndarray, np.ndarray, float]:
    return problem.damage, problem.sizes, problem.budget


CLAIMS: tuple[Claim, ...] = (
    greedy_row,
    sampled_row,
    low_bits_row,
    relevance_row,
    histogram_row,
    groups_row,
    noise_row,
    recipes_row,
    attention_row,
)
HEADINGS = ("method", "claim", "ours", "PSNR, dB (95 %)", "held against", "difference, clip by clip, dB (95 %)")


def claims(bench: Bench) -> str:
    """The section."""
    made = Claims(bench)
    rows = [row for claim in CLAIMS for row in claim(made)]
    return markdown(HEADINGS, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the result."""
    made = parser(__doc__ or "")
    made.add_argument("--every", type=int, default=1, help="as in benchmarks.sensitivity")
    made.add_argument("--plans", type=int, default=50, help="as in benchmarks.sensitivity")
    made.add_argument("--randoms", type=int, default=20, help="as in benchmarks.sensitivity")
    args = made.parse_args(arguments)
    torch.set_num_threads(args.threads)
    clips = Clips(args.pipeline, args.clips, dict(args.set), args.batch)
    bench = Bench(clips, args.every, args.plans, args.randoms)
    about = (
        f"# Methods that divide bits, on {clips.name}\n\n{clips.count} clips of evaluation captions; choices are made on {MAP_CLIPS} other "
        f"clips, among {', '.join(FORMATS)}, at {UNIFORM}'s bytes where nothing else is said. Weights are rounded to nearest, inputs are "
        "float. `benchmarks/sensitivity_rows.py` says how.\n\n"
    )
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"sensitivity-rows-{clips.name}.md"
    file.write_text(about + claims(bench))
    print(file)


if __name__ == "__main__":
    main()
