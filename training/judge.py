"""Train the judge (``src/reelquant/models/judge.py``) on rendered clips, degraded the way a generator might degrade them.

PYTHONPATH=src python training/judge.py --minutes 6
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import CURVES, RUNS, TEST_SEED, WEIGHTS, Clock, Curve, Muon, clip_pool, linear_decay, say, set_lr
from safetensors.torch import save_file
from torch import Tensor

from reelquant.models.judge import KINDS, Judge, accuracy
from reelquant.models.shapes import Scene

POOL_SEED = 100_000_000  # away from the generators' training clips
FRAME_COUNTS = (8, 13, 16)


def _chance(p: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < p


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _blur(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Shrink by up to three and enlarge again."""
    size = round(64 / _uniform(1.2, 3.0, generator))
    small = F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)
    return F.interpolate(small, (64, 64), mode="bilinear" if _chance(0.5, generator) else "bicubic")


def _blotches(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Errors as large as an autoencoder's cells: coarse noise, smooth or in blocks."""
    cells = (4, 8, 16)[int(torch.randint(3, (), generator=generator))]
    noise = torch.randn(len(pictures), 3, cells, cells, generator=generator) * _uniform(0.02, 0.15, generator)
    return pictures + F.interpolate(noise, (64, 64), mode="bilinear" if _chance(0.7, generator) else "nearest")


def degrade(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Spoil clips ``[n, frames, 3, 64, 64]`` in [0, 1], each its own way; about one in six stays as it is."""
    out = []
    for clip in clips:
        if _chance(0.5, generator):
            clip = _blur(clip, generator)
        if _chance(0.5, generator):
            clip = _blotches(clip, generator)
        if _chance(0.4, generator):
            clip = clip + torch.randn(clip.shape, generator=generator) * _uniform(0.01, 0.12, generator)
        if _chance(0.3, generator):  # frames bleeding into each other
            weight = _uniform(0.05, 0.3, generator)
            clip = clip * (1 - weight) + weight * torch.roll(clip, 1, 0)
        if _chance(0.4, generator):
            clip = (clip - 0.5) * _uniform(0.8, 1.1, generator) + 0.5 + _uniform(-0.06, 0.06, generator)
        out.append(clip.clamp(0, 1))
    return torch.stack(out)


def targets(scenes: list[Scene]) -> dict[str, Tensor]:
    """Class indices ``[n]`` of every kind."""
    return {kind: torch.tensor([words.index(getattr(scene, kind)) for scene in scenes]) for kind, words in KINDS.items()}


def save(judge: Judge) -> None:
    """Write the weights in float16 (counters of the batch norms left as they are)."""
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    state = {key: value.half() if value.is_floating_point() else value for key, value in judge.state_dict().items()}
    save_file({key: value.contiguous() for key, value in state.items()}, WEIGHTS / "judge.safetensors")


def evaluate(judge: Judge, generator: torch.Generator) -> dict[str, dict[str, float]]:
    """Accuracies on 300 unseen clips, clean and degraded, per number of frames."""
    judge.eval()
    figures = {}
    for frames in FRAME_COUNTS:
        clips, scenes = clip_pool(range(TEST_SEED, TEST_SEED + 300), frames)
        clean = clips.float() / 255
        figures[f"{frames} frames"] = accuracy(clean, scenes, judge)
        figures[f"{frames} frames, degraded"] = accuracy(degrade(clean, generator), scenes, judge)
    return figures


def main(minutes: float, pool: int, seed: int) -> None:
    """Train, evaluate and save."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pools = []
    for k, frames in enumerate(FRAME_COUNTS):
        clips, scenes = clip_pool(range(POOL_SEED + k * pool, POOL_SEED + (k + 1) * pool), frames)
        pools.append((clips, targets(scenes)))
    judge = Judge().to(memory_format=torch.channels_last)
    hidden = [p for name, p in judge.named_parameters() if p.ndim >= 2 and not name.startswith("heads.")]
    rest = [p for name, p in judge.named_parameters() if p.ndim < 2 or name.startswith("heads.")]
    optimizers = [Muon(hidden, lr=4e-3, weight_decay=0.02), torch.optim.AdamW(rest, lr=4e-3, weight_decay=0.02)]
    curve, clock, step = Curve(CURVES / "judge.csv"), Clock(minutes, RUNS / "judge-minutes.txt"), 0
    while (progress := clock.progress()) < 1:
        set_lr(optimizers, min(1.0, (step + 1) / 20) * linear_decay(progress, decay=0.8, floor=0.01))
        clips, truth = pools[step % len(pools)]
        index = torch.randint(pool, (32,), generator=generator)
        batch = clips[index].float() / 255
        if progress > 0.15:  # shapes are learned sooner from clean clips
            batch = degrade(batch, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(batch)
        losses = {kind: F.cross_entropy(logits[kind].float(), truth[kind][index], label_smoothing=0.02) for kind in KINDS}
        (2 * losses["shape"] + sum(losses.values())).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 25 == 0:
            curve.add(seconds=clock.elapsed(), step=step, **{kind: loss.item() for kind, loss in losses.items()})
    save(judge)
    for name, figures in evaluate(judge, generator).items():
        say(name, {kind: round(value, 3) for kind, value in figures.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--pool", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
