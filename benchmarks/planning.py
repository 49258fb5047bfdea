"""Predictions of ``reelquant plan`` beside what happens: peak memory, the time of a step, the size of a folder.

    python -m benchmarks.planning --output benchmarks/results                  # everything; what is there already is kept
    python -m benchmarks.planning --only memory --models wan-1.3b
    python -m benchmarks.planning --quality                                    # what plans say of quality, from rows.jsonl

Denoisers have the true widths of Wan-1.3B and CogVideoX-5B, random weights and one or two blocks: every block is alike, so the weights of
the others are added to both sides (*full depth*), and a step of all blocks takes as many times as long. VAEs are whole, with random
weights. Peaks are high-water marks of
resident memory of one call, a process each. Times are processor time
of one thread, the float and the quantized model in turns. The quantized one has 8-bit weights and inputs in 8 bits with a scale per
token, which needs no data.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.beside import measured
from benchmarks.common import Clips, Records, markdown
from benchmarks.memory import BASE, float_folder, folder_of
from benchmarks.speed import memory
from benchmarks.speed.denoisers import DENOISERS, Subject
from benchmarks.speed.timing import interleaved
from reelquant.engine.plan import Plan, make_plan
from reelquant.evidence.machine import machine
from reelquant.models.pipelines import BUNDLED
from reelquant.planning.memory import footprint
from reelquant.planning.parts import Part
from reelquant.planning.process import process_bytes
from reelquant.planning.rounding import rounding_of, tokenwise
from reelquant.planning.speed import seconds
from reelquant.planning.timing import Timings
from reelquant.planning.trace import NONE, to_meta, traced
from reelquant.recipes.recipe import load_recipe
from reelquant.streaming.offload import hollow

SIZES = {
    "wan-1.3b": {"17x160x240": (1, 16, 5, 20, 30), "17x240x416": (1, 16, 5, 30, 52), "17x320x576": (1, 16, 5, 40, 72)},
    "cogvideox-5b": {"17x160x240": (1, 5, 16, 20, 30), "17x240x416": (1, 5, 16, 30, 52), "17x320x480": (1, 5, 16, 40, 60)},
}
DEPTH = {"wan-1.3b": (2, 30), "cogvideox-5b": (1, 42)}  # blocks here, blocks of the published model
VAES: dict[str, tuple[str, dict[str, Any]]] = {
    "wan-1.3b": ("AutoencoderKLWan", {}),
    "cogvideox-5b": (
        "AutoencoderKLCogVideoX",
        {
            "block_out_channels": (128, 256, 256, 512), "latent_channels": 16, "layers_per_block": 3, "temporal_compression_ratio": 4,
            "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        },
    ),
}  # fmt: skip
VAE_SIZES = {  # latents of small clips: a larger one takes hours of one core
    "wan-1.3b": {"5x96x128": (1, 16, 2, 12, 16), "5x128x192": (1, 16, 2, 16, 24)},
    "cogvideox-5b": {"5x96x128": (1, 16, 2, 12, 16), "5x128x192": (1, 16, 2, 16, 24)},
}
TILES = {"tile_sample_min_height": 64, "tile_sample_min_width": 64}
QUANTIZED = "ours w8a8"
VARIANTS = (BASE, QUANTIZED)
RECIPES = ("w8a16", "w4a16", "qvd-w8a8")
MEMORY_HEADINGS = (
    "model",
    "clip",
    "variant",
    "measured, MB",
    "predicted, MB",
    "error",
    "full depth, MB",
    "error",
    "beside weights, MB",
    "predicted, MB",
)
TIME_HEADINGS = ("model", "clip", "variant", "measured, s", "predicted, s", "error", "speed-up", "predicted", "error")
VAE_HEADINGS = (
    "VAE of",
    "clip",
    "decoded",
    "measured, MB",
    "predicted, MB",
    "error",
    "beside weights, MB",
    "predicted, MB",
    "its tensors, MB",
)
SIZE_HEADINGS = ("pipeline", "recipe", "folder, kB", "dry run, kB", "error", "layers, kB", "dry run, kB", "error")


# --- predictions ----------------------------------------------------------------------------------------------------------------------


def part_of(subject: Subject) -> Part:
    """The denoiser as a plan sees it: its config, and no weight."""
    return Part("transformer", "denoiser", hollow(float_folder(subject), torch.bfloat16), 0)


def plan_of(name: str, part: Part) -> Plan | None:
    """What is quantized of a variant."""
    from benchmarks.memory import INPUT, WEIGHTS

    if name == BASE:
        return None
    return make_plan(
        load_recipe({"name": name, "defaults": {"weight": WEIGHTS[name], "input": INPUT}, "calibrate": None}), part.map, part.model
    )


def trace_of(subject: Subject, part: Part, plan: Plan | None, latent: tuple[int, ...]) -> Any:
    """One call, followed."""
    inputs = to_meta(subject.spec.inputs(part.model, torch.bfloat16, latent=torch.zeros(latent)))
    with torch.no_grad(), traced(part.model, NONE if plan is None else rounding_of(plan, tokenwise(part.model))) as trace:
        part.model(**inputs)
    return trace


def block_bytes(part: Part, plan: Plan | None) -> float:
    """Of one block in memory."""
    return footprint(part, plan, [], "cpu").block


# --- memory ---------------------------------------------------------------------------------------------------------------------------


def peaks_of(name: str, subject: Subject, latent: tuple[int, ...]) -> dict[str, float]:
    """The peak of one call, opened as a user would."""
    return forked(lambda: memory.peaks(lambda: opened(name, subject, latent), 1))


def forked(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The answer of a process of its own: a copy of this one, which has imported everything and holds nothing else."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        text = told.read()
    os.waitpid(child, 0)
    return json.loads(text)


def opened(name: str, subject: Subject, latent: tuple[int, ...]) -> Callable[[], object]:
    """One call of a variant that lies in a folder."""
    import diffusers

    folder = float_folder(subject) if name == BASE else folder_of(name, subject)
    return calling(subject, getattr(diffusers, subject.spec.cls).from_pretrained(folder, torch_dtype=torch.bfloat16).eval(), latent)


def base_of(name: str) -> int:
    """What a plan counts for the process, in a process of its own."""
    return int(forked(lambda: {"base": process_bytes(torch.bfloat16, quantized=name != BASE)})["base"])


def memory_rows(model: str, work: Path) -> Iterator[dict[str, Any]]:
    """Each size and variant."""
    subject = Subject(model, work)
    part = part_of(subject)
    for name in VARIANTS:
        _ = float_folder(subject) if name == BASE else folder_of(name, subject)
    bases = {name: base_of(name) for name in VARIANTS}
    here, published = DEPTH[model]
    for clip, latent in SIZES[model].items():
        for name in VARIANTS:
            plan = plan_of(name, part)
            found = footprint(part, plan, [trace_of(subject, part, plan, latent)], "cpu")
            peaks = peaks_of(name, subject, latent)
            more = (published - here) * block_bytes(part, plan)
            yield {
                "name": f"memory {model} {clip} {name}", "digest": str(latent), "status": "measured",
                "measured": peaks["rss_mb"], "predicted": (bases[name] + found.weights + found.running) / 1e6, "more": more / 1e6,
                "beside": peaks["rss_mb"] - (bases[name] + found.weights) / 1e6, "running": found.running / 1e6,
                "base": bases[name] / 1e6, "bare": peaks["rss_bare_mb"],
            }  # fmt: skip


# --- VAEs -----------------------------------------------------------------------------------------------------------------------------


def vae_folder(model: str, work: Path) -> Path:
    """The bf16 checkpoint of a VAE with random weights, made if it is not there yet."""
    import diffusers

    cls, config = VAES[model]
    folder = work / "vae" / model
    if not folder.is_dir():
        torch.manual_seed(0)
        getattr(diffusers, cls)(**config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def decoding(vae: Any, latent: tuple[int, ...], tiled: bool, device: str | None = None) -> Callable[[], object]:
    """One call of a VAE's decoder, whole or in tiles."""
    if tiled:
        vae.enable_tiling(**TILES)
    latents = torch.zeros(latent, dtype=torch.bfloat16, device=device)

    def call() -> object:
        with torch.no_grad():
            return vae.decode(latents, return_dict=False)

    return call


def vae_rows(model: str, clip: str, work: Path) -> Iterator[dict[str, Any]]:
    """A size, whole and in tiles."""
    import diffusers

    folder, kind = vae_folder(model, work), getattr(diffusers, VAES[model][0])
    base = base_of(BASE)
    latent = VAE_SIZES[model][clip]
    for tiled in (False, True):
        part = Part("vae", "vae", hollow(folder, torch.bfloat16), 0)
        call = decoding(part.model, latent, tiled, "meta")
        with traced(part.model) as trace:
            call()
        found = footprint(part, None, [trace], "cpu")

        def opened(tiled: bool = tiled) -> Callable[[], object]:
            vae = kind.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()
            for weight in vae.parameters():  # files are mapped, and pages of an encoder that is not called would not count
                weight.data = weight.data.clone()
            return decoding(vae, latent, tiled)

        peaks = forked(lambda opened=opened: memory.peaks(opened, 1))
        yield {
            "name": f"vae {model} {clip} {'tiles' if tiled else 'whole'}", "digest": str(latent), "status": "measured",
            "measured": peaks["rss_mb"], "predicted": (base + found.weights + found.running) / 1e6,
            "beside": peaks["rss_mb"] - (base + found.weights) / 1e6, "running": found.running / 1e6, "tensors": trace.peak / 1e6,
        }  # fmt: skip


# --- time -----------------------------------------------------------------------------------------------------------------------------


def time_rows(model: str, work: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Each size; kernels are timed again, before and apart from what is predicted."""
    import diffusers

    subject = Subject(model, work)
    part, kind = part_of(subject), getattr(diffusers, DENOISERS[model].cls)
    for clip, latent in SIZES[model].items():
        models = {
            name: kind.from_pretrained(
                float_folder(subject) if name == BASE else folder_of(name, subject), torch_dtype=torch.bfloat16
            ).eval()
            for name in VARIANTS
        }
        timings = Timings(folder=work / "no-cache" / f"{model}-{clip}")
        timings.seconds.clear()
        predicted = {name: predicted_seconds(subject, part, plan_of(name, part), latent, timings) for name in VARIANTS}
        found = interleaved({name: calling(subject, one, latent) for name, one in models.items()}, rounds=rounds)
        ratios = [slow / fast for slow, fast in zip(found[BASE].seconds, found[QUANTIZED].seconds, strict=True)]
        for name in VARIANTS:
            yield {
                "name": f"time {model} {clip} {name}", "digest": str(latent), "status": "measured",
                "measured": found[name].median, "predicted": predicted[name],
                "ratio": statistics.median(ratios), "predicted_ratio": predicted[BASE] / predicted[QUANTIZED], "rounds": rounds,
            }  # fmt: skip


def calling(subject: Subject, denoiser: nn.Module, latent: tuple[int, ...]) -> Callable[[], object]:
    """One call of a denoiser."""
    inputs = subject.spec.inputs(denoiser, torch.bfloat16, latent=torch.zeros(latent))

    def call() -> object:
        with torch.no_grad():
            return denoiser(**inputs)

    return call


def predicted_seconds(subject: Subject, part: Part, plan: Plan | None, latent: tuple[int, ...], timings: Timings) -> float:
    """Of one call."""
    specs = {} if plan is None else {row.layer.name: row.specs for row in plan.quantized if row.specs is not None}
    return seconds(part.model, trace_of(subject, part, plan, latent), specs, timings)


# --- sizes ----------------------------------------------------------------------------------------------------------------------------


def size_rows(model: str, recipe: str, work: Path) -> Iterator[dict[str, Any]]:
    """What ``quantize --dry-run`` says, and the folder."""
    import reelquant
    from reelquant.api import folder_job
    from reelquant.engine.sizes import layers_bytes

    job = folder_job(model, recipe, None, None, (), None, (), None, "cpu", None, {})
    folder = work / "sizes" / f"{model}-{recipe}"
    report = reelquant.quantize_folder(model, folder, recipe, force=True, progress=False)
    yield {
        "name": f"size {model} {recipe}", "digest": recipe, "status": "measured",
        "measured": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()), "predicted": job.estimate().result,
        "layers": sum(row.bytes_after for row in report.layers), "predicted_layers": sum(map(layers_bytes, job.plans.values())),
    }  # fmt: skip


# --- quality --------------------------------------------------------------------------------------------------------------------------


def write_quality(rows: Path, target: Path) -> None:
    """The measured figures that plans quote: bundled pipelines, recipes of the library as they are now, the row with most clips."""
    from reelquant.recipes.recipe import names

    records, found = Records(rows), dict[str, dict[str, Any]]()
    for pipeline in BUNDLED:
        found[pipeline] = {}
        for name in names():
            known = (measured(records, Clips(pipeline, count, {}, 4), name) for count in (64, 16))
            if row := next(filter(None, known), None):
                found[pipeline][name] = {key: round(row[f"psnr_{key}"], 2) for key in ("mean", "low", "high")} | {"clips": row["clips"]}
    target.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


# --- tables ---------------------------------------------------------------------------------------------------------------------------


def error(predicted: float, measured: float) -> str:
    """Relative, with its sign."""
    return f"{100 * (predicted / measured - 1):+.1f} %"


def memory_line(row: dict[str, Any]) -> list[str]:
    """A row of the table of peaks."""
    _, model, clip, variant = row["name"].split(" ", 3)
    measured, predicted, more = row["measured"], row["predicted"], row["more"]
    whole = [f"{measured + more:.0f}", error(predicted + more, measured + more)]
    beside = [f"{row['beside']:.0f}", f"{row['running']:.0f}"]
    return [model, clip, variant, f"{measured:.0f}", f"{predicted:.0f}", error(predicted, measured), *whole, *beside]


def vae_line(row: dict[str, Any]) -> list[str]:
    """A row of the table of VAEs."""
    _, model, clip, variant = row["name"].split(" ", 3)
    figures = [f"{row['measured']:.0f}", f"{row['predicted']:.0f}", error(row["predicted"], row["measured"])]
    return [model, clip, variant, *figures, *(f"{row[key]:.0f}" for key in ("beside", "running", "tensors"))]


def time_line(row: dict[str, Any]) -> list[str]:
    """A row of the table of times."""
    _, model, clip, variant = row["name"].split(" ", 3)
    ratio = ["", "", ""]
    if variant != BASE:
        ratio = [f"{row['ratio']:.2f}", f"{row['predicted_ratio']:.2f}", error(row["predicted_ratio"], row["ratio"])]
    return [model, clip, variant, f"{row['measured']:.2f}", f"{row['predicted']:.2f}", error(row["predicted"], row["measured"]), *ratio]


def size_line(row: dict[str, Any]) -> list[str]:
    """A row of the table of sizes."""
    _, model, recipe = row["name"].split(" ")
    pairs = ((row["predicted"], row["measured"]), (row["predicted_layers"], row["layers"]))
    return [model, recipe, *(word for said, made in pairs for word in (f"{made / 1e3:.0f}", f"{said / 1e3:.0f}", error(said, made)))]


TABLES = {
    "memory": ("Peak memory of one call of a denoiser", MEMORY_HEADINGS, memory_line),
    "vae": ("Peak memory of one call of a VAE's decoder", VAE_HEADINGS, vae_line),
    "time": ("Time of one call of a denoiser", TIME_HEADINGS, time_line),
    "size": ("Sizes that dry runs and plans say", SIZE_HEADINGS, size_line),
}


def written(records: Records, output: Path) -> str:
    """The Markdown of what is known."""
    known = records.load()
    parts = [f"# Plans beside what happens\n\n{' '.join(__doc__.split(chr(10) * 2)[2].split())}\n"]
    for kind, (title, headings, line) in TABLES.items():
        rows = [line(row) for row in known if row["name"].startswith(f"{kind} ")]
        if rows:
            parts.append(f"## {title}\n\n{markdown(headings, rows)}")
    about = machine()
    parts.append(f"One thread of {about['cpu']}, torch {torch.__version__}.\n")
    text = "\n".join(parts)
    output.mkdir(parents=True, exist_ok=True)
    (output / "planning.md").write_text(text)
    return text


def main() -> None:
    """Parse the command line, measure what is missing, write."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", choices=TABLES, nargs="*", default=list(TABLES))
    made.add_argument("--models", choices=SIZES, nargs="*", default=list(SIZES))
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--work", type=Path, default=Path("runs/planning"), help="checkpoints and rows, made once")
    made.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    made.add_argument("--quality", action="store_true", help="only write what plans say of quality, from rows.jsonl of the output")
    args = made.parse_args()
    torch.set_num_threads(1)
    if args.quality:
        return write_quality(args.output / "rows.jsonl", Path("src/reelquant/planning/measured.json"))
    import reelquant

    reelquant.open_pipeline("tiny-dit")  # what is imported for any pipeline at all
    records = Records(args.work / "planning.jsonl")
    works: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        f"size {model} {recipe}": lambda model=model, recipe=recipe: size_rows(model, recipe, args.work)
        for recipe in RECIPES
        for model in BUNDLED
    }
    for model in args.models:
        works[f"memory {model}"] = lambda model=model: memory_rows(model, args.work)
        for clip in VAE_SIZES[model]:
            works[f"vae {model} {clip}"] = lambda model=model, clip=clip: vae_rows(model, clip, args.work)
        works[f"time {model}"] = lambda model=model: time_rows(model, args.work, args.rounds)
    done = [row["name"] for row in records.load()]
    for name, rows in works.items():
        if name.split()[0] not in args.only or any(one.startswith(name) for one in done):
            continue
        for row in list(rows()):  # a table of a model is kept whole or not at all
            records.add(row)
            print("  ".join(TABLES[row["name"].split()[0]][2](row)), flush=True)
    print(written(records, args.output))
    return None


if __name__ == "__main__":
    main()
