"""Quantize checkpoints that are bigger than the allowed memory, and kill the work half-way: ``python -m benchmarks.streaming --gb 28``.

Writes a random Wan-shaped checkpoint of about ``--gb`` gigabytes (bfloat16, sharded; speed and memory do not depend on the weights), runs
``reelquant quantize --max-memory`` on it in a process of its own, then once more with ``kill -9`` at several moments and ``--resume`` each
time, and compares the two folders byte by byte. Measured of every process, from ``/proc/PID/status`` four times a second: the peak of all
resident memory (VmHWM), and of the part that no file backs (RssAnon), which is what a limit on memory cannot take back.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SHAPES = {  # WanTransformer3DModel configurations of the published models, but for the number of blocks
    "1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "in_channels": 16, "out_channels": 16},
    "5b": {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
    "14b": {"num_attention_heads": 40, "ffn_dim": 13824, "in_channels": 16, "out_channels": 16},
}
RESULTS = Path(__file__).with_name("results")
SHARD = 5_000_000_000
COLUMNS = (
    "shape", "recipe", "blocks", "checkpoint_gb", "allowed_gb", "peak_rss_gb", "peak_anon_gb", "estimated_gb", "seconds", "result_gb",
    "kills", "same_bytes",
)  # fmt: skip


def config_of(shape: str, blocks: int) -> dict[str, Any]:
    return SHAPES[shape] | {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256, "num_layers": blocks}


def blocks_for(shape: str, size: float) -> int:
    """As many blocks as make a checkpoint of ``size`` bytes."""
    one, two = (_bytes(shape, blocks) for blocks in (1, 2))
    return max(1, round((size - one) / (two - one)) + 1)


def _bytes(shape: str, blocks: int) -> int:
    return 2 * sum(parameter.numel() for parameter in _empty(shape, blocks).parameters())


def _empty(shape: str, blocks: int) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        return WanTransformer3DModel(**config_of(shape, blocks))


def write_checkpoint(folder: Path, shape: str, blocks: int) -> int:
    """A whole Wan pipeline around a random denoiser; bytes of the denoiser."""
    from huggingface_hub import split_torch_state_dict_into_shards

    from reelquant.checkpoint import Spec, write_tensors
    from reelquant.models.sampling import write_notes
    from tests.tiny.stock import PROMPTS, wan_pipeline

    pipe = wan_pipeline()
    width = pipe.text_encoder.config.d_model
    pipe.save_pretrained(folder)
    write_notes(folder, {"num_frames": 5, "height": 32, "width": 32, "max_sequence_length": 8, "num_inference_steps": 2}, PROMPTS)
    shutil.rmtree(folder / "transformer")
    config = config_of(shape, blocks) | {"text_dim": width, "in_channels": 4, "out_channels": 4}
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    model.save_config(folder / "transformer")
    specs = {name: Spec(torch.bfloat16, tuple(value.shape)) for name, value in model.state_dict().items()}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))

    def random(name: str) -> torch.Tensor:
        """Cut from a short row of noise at a place that depends on the name: no generator is fast enough for gigabytes."""
        spec = specs[name]
        if len(spec.shape) == 1:
            return torch.ones(spec.shape, dtype=spec.dtype) if "norm" in name else torch.zeros(spec.shape, dtype=spec.dtype)
        start = int(hashlib.sha256(name.encode()).hexdigest(), 16) % (noise.numel() // 2)
        row = (noise[start : start + noise.numel() // 2] * torch.Size(spec.shape[1:]).numel() ** -0.5).to(spec.dtype)
        return row.repeat(-(-spec.numel // row.numel()))[: spec.numel].reshape(spec.shape)

    split = split_torch_state_dict_into_shards(
        model.to(torch.bfloat16).state_dict(), filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size=SHARD
    )
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / "transformer" / file, {name: specs[name] for name in names}, random)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return sum(spec.bytes for spec in specs.values())


def run(words: list[str], kill_after: float | None = None, group: Path | None = None) -> dict[str, Any]:
    """One process, in a control group if there is one: its wall time, its exit status and its peaks of memory."""

    def restrict() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    with tempfile.TemporaryFile("w+") as said:  # a pipe without a reader would stop the process when it is full
        command = [sys.executable, "-m", "reelquant", *words]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True, preexec_fn=restrict)
        found = _watched(process, kill_after)
        found["seconds"] = time.perf_counter() - start
        said.seek(0)
        found["output"] = said.read()
    if process.returncode and not found["killed"]:
        raise SystemExit(f"reelquant {' '.join(words)} failed:\n{found['output']}")
    return found


def _watched(process: subprocess.Popen[str], kill_after: float | None) -> dict[str, Any]:
    """Peaks of a process until it ends, or is killed after so many seconds."""
    start, peaks, killed = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}, False
    while process.poll() is None:
        for line in _status(process.pid):
            key, _, value = line.partition(":")
            if key in peaks:
                peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)
        if kill_after is not None and time.perf_counter() - start > kill_after:
            process.send_signal(signal.SIGKILL)
            killed = True
            break
        time.sleep(0.25)
    process.wait()
    return {"rss": peaks["VmHWM"], "anon": peaks["RssAnon"], "killed": killed}


def _status(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return []


def digests(folder: Path) -> dict[str, str]:
    """Hash of every file but the report, which holds timings."""
    found = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "report.json"):
        with file.open("rb") as opened:
            found[str(file.relative_to(folder))] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def measure(
    scratch: Path, shape: str, recipe: str, size: float, memory: str, kills: int, group: Path | None, more: list[str]
) -> dict[str, Any]:
    """One row of the table."""
    from reelquant.streaming.estimate import parse_bytes

    blocks = blocks_for(shape, size)
    source, whole = scratch / "source", scratch / "out"
    stored = write_checkpoint(source, shape, blocks)
    words = ["quantize", str(source), "-r", recipe, "--dtype", "bfloat16", "--max-memory", memory, "--json", *more]
    estimate = json.loads(run([*words, "--dry-run"])["output"])["estimate"]
    words += ["-o", str(whole)]
    first = run(words, group=group)
    result, expected = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file()), digests(whole)
    shutil.rmtree(whole)
    runs, stopped = [first], 0
    for number in range(kills):
        again = run([*words, "--resume"], first["seconds"] * (number + 1) / (kills + 1), group)
        stopped += again["killed"]
        runs.append(again)
    if stopped or not kills:
        runs.append(run([*words, "--resume"], group=group) if kills else first)
    same = digests(whole) == expected if kills else None
    shutil.rmtree(scratch)
    return {
        "shape": shape, "recipe": recipe, "blocks": blocks, "checkpoint_gb": stored / 1e9,
        "allowed_gb": parse_bytes(memory) / 1e9,
        "peak_rss_gb": max(one["rss"] for one in runs) / 1e9,
        "peak_anon_gb": max(one["anon"] for one in runs) / 1e9,
        "estimated_gb": estimate["memory"] / 1e9, "seconds": first["seconds"], "result_gb": result / 1e9,
        "kills": stopped, "same_bytes": same,
    }  # fmt: skip


def write_table(row: dict[str, Any], file: Path) -> None:
    """Append a row to the CSV and write the table of all rows again."""
    known = list(csv.DictReader(file.open())) if file.is_file() else []
    rows = [*known, {key: f"{value:.2f}" if isinstance(value, float) else str(value) for key, value in row.items()}]
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(one[column] for column in COLUMNS) + " |" for one in rows]
    file.with_suffix(".md").write_text("Made by `python -m benchmarks.streaming`; see docs/streaming.md.\n\n" + "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=28, help="size of the checkpoint, decimal gigabytes")
    parser.add_argument("--shape", choices=SHAPES, default="14b")
    parser.add_argument("--recipe", default="w8a16")
    parser.add_argument("--max-memory", default="4GB")
    parser.add_argument("--kills", type=int, default=3, help="how often the second run is killed; 0 leaves it out")
    parser.add_argument("--group", type=Path, help="folder of a control group with a limit of its own, to run in; you make it")
    parser.add_argument(
        "--scratch", type=Path, default=Path("/tmp/reelquant-streaming"), help="needs about 2.5 times the checkpoint; emptied"
    )
    options, more = parser.parse_known_args()
    row = measure(options.scratch, options.shape, options.recipe, options.gb * 1e9, options.max_memory, options.kills, options.group, more)
    write_table(row, RESULTS / "streaming.csv")
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
