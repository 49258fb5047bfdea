"""Attention that is not computed, under ``qvd-w8a8``: every mode alone at two numbers of computed steps, all modes together where a
threshold chooses, plans for a budget of multiplications; clips of half the size with scaled scores; and the time of one large attention.

Run it from the repository root::

    python -m benchmarks.attention_reuse --pipeline tiny-dit --clips 64 --output benchmarks/results
    python -m benchmarks.attention_reuse --pipeline tiny-unet --clips 64 --output benchmarks/results
    python -m benchmarks.attention_reuse --pipeline tiny-dit --clips 64 --output benchmarks/results --recall --sizes --times
    python -m benchmarks.attention_reuse --pipeline tiny-unet --clips 64 --output benchmarks/results --only "everything computed, 100 %" \\
        "share, fewer steps" "a plan for 50%"

Clips of evaluation captions, held against the same quantized pipeline without reuse. Rows that are there are not made again. Rows are
kept in ``rows.jsonl``; the table is ``attention-reuse-PIPELINE.md``; quantized pipelines are kept in ``runs/tuned``. ``--recall`` tells how
much of the weights of self-attention the heaviest half of the blocks still holds, steps after the search. ``--sizes`` makes clips of half
the height and width by the float pipeline, and asks the judge. ``--times`` takes the time of an attention of Wan-1.3B's heads over 4,096
tokens, in turns.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

import reelquant
from benchmarks.common import Clips, Records, judged, markdown, measure, parser
from benchmarks.tuned import KEPT, RECIPE, quantized
from reelquant.models.pipelines import calibration_prompts
from reelquant.models.sampling import sample
from reelquant.nn import AttentionCall, scale_logits
from reelquant.nn.around.attention_running import Where
from reelquant.reuse import AttentionReuse, installed_reuse, remove_reuse
from reelquant.reuse.attention.choosing import Comparing, compare, table_of
from reelquant.reuse.attention.following import Following
from reelquant.reuse.attention.installed import InstalledAttention
from reelquant.reuse.attention.mode import Mode, Place
from reelquant.reuse.attention.planned import plan
from reelquant.reuse.attention.recorded import Recorded, record
from reelquant.reuse.attention.share import Share
from reelquant.reuse.attention.sparse import Sparse, heaviest, masses
from reelquant.reuse.attention.window import Window
from reelquant.reuse.plans import even
from reelquant.reuse.reuse import put
from reelquant.tuning.recording import Site, site_of

HEADINGS = ("attention", "multiplications left of its places", "of all attention", "PSNR to no reuse, dB (95 %)", "worst clip, dB")
SEED, RECORDED, ROUNDS = 7_000, 4, 5
TOKENS, HEADS, WIDTH = 4096, 12, 128
SELF = "role:self"
WINDOW, HALVES = {"on": SELF, "mode": "window", "window": 0.25}, {"on": SELF, "mode": "halves"}
ALONE: Mapping[str, tuple[Mapping[str, Any], float]] = {
    "share": ({"on": "*", "mode": "share"}, 0.75),
    "share, fewer steps": ({"on": "*", "mode": "share"}, 0.5),
    "window of a quarter": (WINDOW, 0.5),
    "window of a quarter, fewer steps": (WINDOW, 0.25),
    "halves": (HALVES, 0.5),
    "halves, fewer steps": (HALVES, 0.05),
    "sparse, half of the blocks": ({"on": SELF, "mode": "sparse", "density": 0.5, "block": 64}, 0.4),
    "sparse, a quarter of the blocks": ({"on": SELF, "mode": "sparse", "density": 0.25, "block": 64}, 0.25),
}
"""A rule, and the share of the steps that are computed: the first ones, and as many again that are evenly spaced."""
DISTANCES = (0, 1, 2, 4, 8)
TOGETHER = (0.75, 0.5)
PLANNED = (0.5, 0.4, 0.3)


def labels() -> list[str]:
    """Of all rows."""
    chosen = [f"a threshold chooses, {share:.0%}" for share in TOGETHER]
    return ["everything computed, 100 %", *ALONE, *chosen, *(f"a plan for {share:.0%}" for share in PLANNED)]


def alone(rule: Mapping[str, Any], share: float, timesteps: list[float]) -> AttentionReuse:
    """One mode between computed steps: half of them at the start, where clips are most sensitive."""
    count = len(timesteps)
    number = max(round(share * count), 1)
    first = -(-number // 2)
    rest = {first + step for step in even(count - first, number - first)} if number > first else set()
    return AttentionReuse(rules=({**rule, "at": [timesteps[step] for step in sorted({*range(first), *rest})]},))


def left(comparing: Comparing, table: Mapping[str, Any]) -> float:
    """The share of attention's multiplications that a table leaves, as measured."""
    made = every = 0
    for site, row in table["table"].items():
        own = [known for (name, *_), known in comparing.found.items() if name == site]
        whole = max(known.every / max(known.calls, 1) for known in own)
        far = {number: getattr(mode, "window", 1.0) for number, mode in enumerate(comparing.modes)}
        for cell, rest in zip(row, (row[step + 1 :] for step in range(len(row))), strict=True):
            used = {far[later] for later in takewhile(lambda later: later >= 0, rest)} if cell < 0 else ()
            made += whole * sum(window for window in used if window < 1)  # what a computed step prepares
            known = [one for (name, _, mode, _), one in comparing.found.items() if name == site and mode == cell and one.every]
            made += whole * (1 if cell < 0 else sum(one.made for one in known) / sum(one.every for one in known))
            every += whole
    return made / every


def threshold_for(comparing: Comparing, share: float) -> float:
    """The smallest threshold, to three digits, that leaves no more than this share."""
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if left(comparing, table_of(comparing, middle)) <= share else (middle, high)
    return round(high, 3)


class Compared:
    """What a threshold chooses on a pipeline, measured once when it is asked for."""

    def __init__(self, pipe: Any, site: Site) -> None:
        self.pipe, self.site = pipe, site
        self.found: Comparing | None = None

    def __call__(self) -> Comparing:
        """The measurement."""
        if self.found is None:
            texts = calibration_prompts(self.pipe, RECORDED)
            work = SimpleNamespace(
                **self.site._asdict(),
                steps=0,
                timed=_silent,
                held_out_latents=lambda: sample(self.pipe, texts, seed=SEED, output="latent"),
            )
            stage = AttentionReuse(threshold=0.1)
            self.found = compare(work, names_of(self.site), stage.modes, stage.longest)  # type: ignore[arg-type]  (all that it asks for)
        return self.found


@contextmanager
def _silent(phase: str, total: int) -> Iterator[None]:
    yield


def names_of(site: Site) -> dict[str, Any]:
    """The denoiser's arguments that reuse reads."""
    return {"timestep": site.map.timestep_argument, "latent": site.map.latent_argument}


Made = tuple[AttentionReuse, dict[str, Any]]


def recorded(pipe: Any, site: Site, file: Path) -> Recorded:
    """What plans are made from, recorded once."""
    if not file.is_file():
        texts = calibration_prompts(pipe, RECORDED)
        found = record(site, names_of(site), lambda: sample(pipe, texts, seed=SEED, output="latent"))  # type: ignore[arg-type]
        file.parent.mkdir(parents=True, exist_ok=True)
        grams = {key: torch.from_numpy(value) for key, value in found.grams.items()}
        torch.save([list(found.timesteps), grams, dict(found.multiplications)], file)
    times, grams, counts = torch.load(file, weights_only=True)
    return Recorded(tuple(times), {key: value.numpy() for key, value in grams.items()}, counts)


def settings(site: Site, compared: Compared, timesteps: list[float], folder: Path, name: str) -> dict[str, Callable[[], Made]]:
    """Label -> a stage and its facts."""

    def ruled(rule: Mapping[str, Any], share: float) -> Made:
        stage = alone(rule, share, timesteps)
        return stage, stage.facts(site)  # type: ignore[arg-type]

    def together(share: float) -> Made:
        threshold = threshold_for(compared(), share)
        return AttentionReuse(threshold=threshold), names_of(site) | table_of(compared(), threshold)

    def budgeted(share: float) -> Made:
        found = recorded(compared.pipe, site, folder / f"attention-{name}.pt")
        stage, rows = AttentionReuse(budget=share), plan(found, share)
        forecasts = {place: [row and list(row) for row in rows[place]] for place in rows}
        return stage, names_of(site) | {"timesteps": list(found.timesteps), "forecasts": forecasts}

    def everything() -> Made:
        stage = AttentionReuse(threshold=0.0)
        return stage, names_of(site)

    found: dict[str, Callable[[], Made]] = {"everything computed, 100 %": everything}
    found |= {f"a threshold chooses, {share:.0%}": lambda share=share: together(share) for share in TOGETHER}
    found |= {f"a plan for {share:.0%}": lambda share=share: budgeted(share) for share in PLANNED}
    return found | {label: lambda rule=rule, share=share: ruled(rule, share) for label, (rule, share) in ALONE.items()}


def run(clips: Clips, records: Records, folder: Path, only: Sequence[str] = ()) -> None:
    """Measure the rows that are missing, of all or of some labels."""
    wanted = [label for label in only or labels() if not records.done(*key(clips, label))]
    if not wanted:
        return
    pipe = reelquant.open_pipeline(quantized(clips, folder))
    site = site_of(pipe)
    reference, timesteps = clips.frames(pipe), timesteps_of(pipe, site)
    for label, make in settings(site, Compared(pipe, site), timesteps, folder, clips.name).items():
        if label not in wanted:
            continue
        stage, facts = make()
        put(site.denoiser, "attention", stage, facts)
        frames, acting = clips.frames(pipe), installed_reuse(site.denoiser)["attention"].installed
        assert isinstance(acting, InstalledAttention)
        counts, parts = acting.counts(), list(acting.by_part().values()) or [(1, 0)]
        remove_reuse(site.denoiser)
        name, digest = key(clips, label)
        row = {"name": name, "digest": digest, "pipeline": clips.name, "clips": clips.count, "status": "measured"}
        row |= {"threshold": stage.threshold, "share": counts["computed"] / sum(counts.values())}
        row |= {"own_share": sum(made for made, _ in parts) / sum(map(sum, parts)), "steps": _steps(stage, len(timesteps))}
        records.add(row | measure(frames, reference, clips.prompts))
        print(f"{clips.name}: {name}", flush=True)


def _steps(stage: AttentionReuse, steps: int) -> str:
    at = stage.rules[0].get("at")
    return f", {len(at)} of {steps} steps computed" if at else ""


def timesteps_of(pipe: Any, site: Site) -> list[float]:
    """What the sampler calls the denoiser with."""
    from reelquant.clock import timestep_reader

    read, found = timestep_reader(site.denoiser, str(site.map.timestep_argument)), []
    handle = site.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(float(torch.as_tensor(read(args, kwargs)).amax())), with_kwargs=True
    )
    sample(pipe, calibration_prompts(pipe, 1), seed=SEED, output="latent")
    handle.remove()
    return list(dict.fromkeys(found))


def key(clips: Clips, label: str) -> tuple[str, str]:
    """Name and digest of a row."""
    said = json.dumps([RECIPE, ALONE.get(label), [TOGETHER, "by step"] if label.startswith("a threshold") else None])  # plans: by name
    return f"attention reuse {label}", f"{clips.digest}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def table(clips: Clips, records: Records) -> str:
    """The rows of these clips, as far as they are measured."""
    known = {(row["name"], row["digest"]): row for row in records.load()}
    rows = [(label, row) for label in labels() if (row := known.get(key(clips, label)))]
    return markdown(HEADINGS, [_line(label, row) for label, row in rows])


def _line(label: str, row: Mapping[str, Any]) -> list[str]:
    mean = f"{row['psnr_mean']:.1f} ({row['psnr_low']:.1f} to {row['psnr_high']:.1f})"
    said = label.partition(", fewer")[0] + row["steps"]
    said = f"{said} (`threshold: {row['threshold']:g}`)" if row["threshold"] else said
    return [
        said,
        f"{row['own_share']:.0%}",
        f"{row['share']:.0%}",
        *(["the same bits", "-"] if min(row["psnr"]) >= 100 else [mean, f"{min(row['psnr']):.1f}"]),
    ]


# --- what blocks hold -----------------------------------------------------------------------------------------------------------------


class Recalling(Following):
    """Computes everything, and measures the weight that blocks of earlier steps hold: by distance, sums and counts."""

    def __init__(self, site: Site, sparse: Sparse) -> None:
        self.sparse, self.found = sparse, {distance: [0.0, 0] for distance in DISTANCES}
        super().__init__(site.denoiser, names_of(site), [one.name for one in site.map.attention if one.role == "self"])

    def attend(self, call: AttentionCall, where: Where) -> torch.Tensor:
        if (placed := self.placed(call, where)) is not None:
            place, trajectory = placed
            mass = masses(call, *self.sparse.sizes(call))
            known = trajectory.notes.setdefault(("blocks", place.name, place.half), {})
            known[place.step] = heaviest(mass, self.sparse.density)
            for distance in DISTANCES:
                for head, blocks in enumerate(known.get(place.step - distance, ())):
                    self.found[distance][0] += float(mass[:, head].gather(2, blocks).sum(2).mean())
                    self.found[distance][1] += 1
        return self.compute(call, where)


def recall(clips: Clips) -> str:
    """The weight that the heaviest half of the blocks holds at the step of the search, and later; float pipeline, one text."""
    pipe = clips.open()
    recalling = Recalling(site_of(pipe), Sparse(0.5))
    sample(pipe, calibration_prompts(pipe, 1), seed=SEED, output="latent")
    recalling.remove()
    shares = [f"{total / count:.3f}" for total, count in recalling.found.values()]
    return markdown(["steps after the search", *map(str, DISTANCES)], [["weight in half of the blocks", *shares]])


# --- clips of half the size -----------------------------------------------------------------------------------------------------------


def sizes(clips: Clips) -> str:
    """What the judge sees in clips of half the height and width, with and without scaled scores; float pipeline."""
    pipe = clips.open()
    site, call = site_of(pipe), pipe_call(clips)
    usual = counted(pipe, site)
    half = {"height": call["height"] // 2, "width": call["width"] // 2}
    found = {}
    for label, tokens in (("unscaled", None), ("scaled scores", usual)):
        scale_logits(site.denoiser, tokens)
        frames = Clips(clips.pipeline, clips.count, half, clips.batch).frames(pipe)
        large = F.interpolate(frames.flatten(0, 1), size=(call["height"], call["width"]), mode="bilinear").unflatten(0, frames.shape[:2])
        found[label] = judged(large, clips.prompts)
    scale_logits(site.denoiser, None)
    kinds = list(found["unscaled"])
    lines = [[label, *(f"{facts[kind]:.0%}" for kind in kinds), f"{statistics.mean(facts.values()):.1%}"] for label, facts in found.items()]
    return markdown([f"half size, {clips.count} clips", *kinds, "mean"], lines)


def pipe_call(clips: Clips) -> dict[str, Any]:
    """How the pipeline likes to be called."""
    from reelquant.models.sampling import call_arguments

    return call_arguments(clips.open())


def counted(pipe: Any, site: Site) -> dict[str, int]:
    """Tokens of self-attention in a clip of the usual size."""
    from reelquant.nn import count_tokens

    places = [one.name for one in site.map.attention if one.role == "self"]
    return count_tokens(site.denoiser, places, lambda: sample(pipe, calibration_prompts(pipe, 1), seed=SEED, output="latent"))


# --- time -----------------------------------------------------------------------------------------------------------------------------


def times() -> str:
    """Times of one attention over those of computing it, in turns; median and extremes."""
    torch.manual_seed(0)
    query, key_, value = (torch.randn(1, HEADS, TOKENS, WIDTH) for _ in range(3))
    near = torch.arange(TOKENS) / 64
    query, key_ = (x + 2 * torch.stack([torch.sin(near * (1 + d / 16)) for d in range(WIDTH)], 1) for x in (query, key_))  # places matter
    call, notes = AttentionCall(query, key_, value), {}

    def computed(one: AttentionCall) -> torch.Tensor:
        return F.scaled_dot_product_attention(one.query, one.key, one.value, one.mask, scale=one.scale)

    def place(step: int) -> Place:
        return Place(call, computed, notes, notes, step=step)

    modes: dict[str, Mode] = {"share": Share(), "window 0.25": Window(0.25), "window 0.5": Window(0.5), "sparse 0.5": Sparse(0.5)}
    modes |= {"sparse 0.25": Sparse(0.25)}
    output = computed(call)
    searched = {label: _seconds(lambda mode=mode: mode.keep(place(0), output)) for label, mode in modes.items()}
    ratios: dict[str, list[float]] = {label: [] for label in modes}
    for _ in range(ROUNDS):
        whole = _seconds(lambda: computed(call))
        for label, mode in modes.items():
            ratios[label].append(_seconds(lambda mode=mode: mode.attend(place(1))) / whole)
    whole = _seconds(lambda: computed(call))
    lines = [
        [label, f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})", f"{searched[label] / whole:.2f}"]
        for label, found in ratios.items()
    ]
    heading = f"{HEADS} heads of {WIDTH}, {TOKENS} tokens, float32, {torch.get_num_threads()} thread"
    return markdown([heading, "time over computing", "preparing it, over computing"], lines)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


PARTS: Mapping[str, Callable[[Clips], str]] = {"recall": recall, "sizes": sizes, "times": lambda _: times()}
"""Option -> a table beside the rows."""


def page(clips: Clips, records: Records) -> str:
    """A section for every number of clips that is measured, and the other tables."""
    own = [row for row in records.load() if row["name"].startswith("attention reuse") and row["pipeline"] == clips.name]
    counts = sorted({row["clips"] for row in own if "psnr" in row}, reverse=True)
    found = {count: table(Clips(clips.pipeline, count, clips.call, clips.batch), records) for count in counts}
    rows = [f"{clips.name}, {count} clips, `{RECIPE}`\n\n{text}" for count, text in found.items() if text.count("\n") > 2]
    return "\n".join([*rows, *(f"{row['clips']} clips\n\n{row['table']}" for row in own if "table" in row)])


def main() -> None:
    """Parse the command line, measure what is missing, write the table."""
    made = parser(__doc__)
    made.add_argument("--only", nargs="*", default=(), metavar="LABEL", help=f"some rows: {'; '.join(labels())}".replace("%", "%%"))
    made.add_argument("--recall", action="store_true", help="what half of the blocks hold, too")
    made.add_argument("--sizes", action="store_true", help="clips of half the size, too")
    made.add_argument("--times", action="store_true", help="the time of one large attention, too")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    clips, records = Clips(args.pipeline, args.clips, {}, args.batch), Records(args.output / "rows.jsonl")
    KEPT.mkdir(parents=True, exist_ok=True)
    if not args.table:
        run(clips, records, KEPT, args.only)
        for part in (part for part in PARTS if getattr(args, part)):
            if not records.done(f"attention reuse: {part}", clips.digest):
                facts = {"name": f"attention reuse: {part}", "digest": clips.digest, "pipeline": clips.name, "clips": clips.count}
                records.add(facts | {"status": "measured", "table": PARTS[part](clips)})
    text = page(clips, records)
    (args.output / f"attention-reuse-{clips.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
