"""What the training scripts share: Muon, an average of the weights, a schedule planned in wall time, the loop, logs, clips, options."""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelquant.models.shapes import Scene, random_clip

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs"
CURVES = ROOT / "training" / "curves"
WEIGHTS = ROOT / "src" / "reelquant" / "models" / "weights"
TEST_SEED = 900_000_000  # seeds from here on are never trained on


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices by Newton-Schulz iteration in bfloat16 (singular values land in about [0.7, 1.2]).

    Args:
        matrices: ``[batch, rows, columns]``.
        steps: iterations; five are enough for an optimizer.

    Returns:
        ``[batch, rows, columns]`` in bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, scaled to the root mean square an AdamW update has (so AdamW's rates carry over).

    Parameters of more than two dimensions (convolutions) are seen as ``[outputs, everything else]``. Parameters of the same shape are
    orthogonalized in one batch.

    Args:
        params: matrices and convolution weights.
        lr: learning rate, on AdamW's scale.
        momentum: of the Nesterov momentum.
        weight_decay: decoupled, times ``lr``.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 2e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update all parameters that have a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                self._step_same_shape(params, group)

    def _step_same_shape(self, params: list[nn.Parameter], group: dict) -> None:
        momentum = group["momentum"]
        updates = []
        for p in params:
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - momentum)
            updates.append(p.grad.lerp(buffer, momentum).flatten(1))
        rows, columns = updates[0].shape
        scale = 0.2 * max(rows, columns) ** 0.5
        for p, update in zip(params, orthogonalize(torch.stack(updates)), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.to(p.dtype).view_as(p), alpha=-group["lr"] * scale)


class Ema:
    """Exponential moving average of a module's parameters, with a warm-up so that early averages are not stuck at the start.

    Args:
        module: the module to follow; its buffers are not averaged.
        decay: of the average, once warm.
    """

    def __init__(self, module: nn.Module, decay: float = 0.998):
        self.decay = decay
        self.steps = 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average toward the module's present parameters."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        params = dict(module.named_parameters())
        torch._foreach_lerp_([self.shadow[name] for name in params], [p.detach() for p in params.values()], weight)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into a module of the same kind."""
        for name, p in module.named_parameters():
            p.copy_(self.shadow[name])

    def state_dict(self) -> dict:
        """Everything needed to go on, for ``torch.save``."""
        return {"shadow": self.shadow, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Go on from :meth:`state_dict`."""
        self.steps = state["steps"]
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)


class Clock:
    """Progress of a training in wall time, from 0 to 1. The plan can be changed while it runs by writing minutes into ``plan_file``.

    Args:
        minutes: how long the training should take.
        plan_file: if this file exists it holds another number of minutes, read at every :meth:`progress`.
        spent: seconds already spent by an earlier process (when resuming).
    """

    def __init__(self, minutes: float, plan_file: Path | None = None, spent: float = 0.0):
        self.minutes, self.plan_file = minutes, plan_file
        self.start = time.perf_counter() - spent

    def elapsed(self) -> float:
        """Seconds spent so far."""
        return time.perf_counter() - self.start

    def progress(self) -> float:
        """Fraction of the planned time that has passed, at most 1."""
        if self.plan_file is not None and self.plan_file.exists():
            self.minutes = float(self.plan_file.read_text().split()[0])
        return min(1.0, self.elapsed() / (60 * self.minutes))


def linear_decay(progress: float, *, decay: float = 0.35, floor: float = 0.0) -> float:
    """Factor of the learning rate: 1, then a straight line down to ``floor`` over the last ``decay`` of the training."""
    return max(floor, min(1.0, (1 - progress) / decay))


def set_lr(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to ``factor`` times the one it was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
            group["lr"] = group["base_lr"] * factor


def say(*words: object) -> None:
    """Print a line, and at once: the output usually goes to a log."""
    print(*words, flush=True)


class Curve:
    """A CSV file of training figures, one row per :meth:`add`, also printed.

    Args:
        path: the file; its folder is made if need be.
        append: append to an existing file instead of replacing it.
    """

    def __init__(self, path: Path, append: bool = False):
        self.path = path
        self.fields: list[str] | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        if append and path.exists():
            with path.open() as file:
                self.fields = next(csv.reader(file), None)

    def add(self, **figures: float) -> None:
        """Append one row; the first row fixes the columns."""
        row = {key: round(value, 6) if isinstance(value, float) else value for key, value in figures.items()}
        new = self.fields is None
        self.fields = self.fields or list(row)
        with self.path.open("w" if new else "a", newline="") as file:
            writer = csv.DictWriter(file, self.fields, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        say(*(f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}" for key, value in figures.items()))


def save_atomically(state: object, path: Path) -> None:
    """``torch.save`` under a temporary name, then rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


@dataclass
class Training:
    """A training that can be interrupted: what moves, and how far it has come.

    Attributes:
        module: whose gradients are clipped to a norm of 1, and whose average is kept.
        ema: the average.
        optimizers: of the module's parameters.
        file: everything needed to go on; the average is in it under ``ema``, ``shadow``.
        clock: plan and progress in wall time.
        step: steps done.
    """

    module: nn.Module
    ema: Ema
    optimizers: Sequence[torch.optim.Optimizer]
    file: Path
    clock: Clock
    step: int = 0

    def run(self, rate: Callable[[int, float], float], backward: Callable[[int], None], after: Callable[[int], None]) -> None:
        """Train until the planned time is over.

        Args:
            rate: factor of the learning rates, from the steps done and the progress.
            backward: adds up the gradients of one step, given the steps done.
            after: notes and saves, given the steps done, after each.
        """
        while (progress := self.clock.progress()) < 1:
            set_lr(self.optimizers, rate(self.step, progress))
            backward(self.step)
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.ema.update(self.module)
            self.step += 1
            after(self.step)

    def save(self) -> None:
        """Write the whole state."""
        state = {"model": self.module.state_dict(), "ema": self.ema.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        save_atomically({**state, "step": self.step, "spent": self.clock.elapsed()}, self.file)

    def resume(self) -> None:
        """Go on from what :meth:`save` wrote."""
        state = torch.load(self.file)
        self.module.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        self.clock.start -= state["spent"]


def averaged(file: Path) -> dict[str, Tensor]:
    """The averaged parameters in what :meth:`Training.save` wrote."""
    return torch.load(file, mmap=True)["ema"]["shadow"]


def contact_sheet(clips: Tensor, path: Path, captions: Sequence[str] = (), every: int = 2) -> None:
    """One row of frames per clip, with the caption above it, as a PNG.

    Args:
        clips: ``[n, frames, 3, h, w]`` in [0, 1].
        path: of the PNG.
        captions: one per clip, or none.
        every: show every so many frames.
    """
    from PIL import Image, ImageDraw

    clips = clips[:, ::every].clamp(0, 1)
    n, frames, _, height, width = clips.shape
    band = 12 if captions else 0
    sheet = Image.new("RGB", (frames * (width + 2), n * (height + band + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    pixels = (clips.permute(0, 1, 3, 4, 2) * 255).round().byte().numpy()
    for i in range(n):
        top = i * (height + band + 2)
        if captions:
            draw.text((2, top), captions[i], fill="black")
        for j in range(frames):
            sheet.paste(Image.fromarray(pixels[i, j]), (j * (width + 2), top + band))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def clip_pool(seeds: Sequence[int], frames: int) -> tuple[Tensor, list[Scene]]:
    """Draw clips once and keep them as bytes.

    Args:
        seeds: one clip each.
        frames: of every clip.

    Returns:
        The clips, uint8 ``[n, frames, 3, 64, 64]``, and their scenes.
    """
    clips, scenes = torch.empty(len(seeds), frames, 3, 64, 64, dtype=torch.uint8), []
    for i, seed in enumerate(seeds):
        clip, _, scene = random_clip(seed, frames=frames)
        clips[i] = (clip * 255).round().byte()
        scenes.append(scene)
    return clips, scenes


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1], one figure per first index."""
    return -10 * (x - y).square().flatten(1).mean(1).clamp_min(1e-10).log10()


def split_parameters(module: nn.Module, is_matrix: Callable[[str, nn.Parameter], bool]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters for Muon (``is_matrix(name, p)``) and for AdamW."""
    matrices = [p for name, p in module.named_parameters() if is_matrix(name, p)]
    rest = [p for name, p in module.named_parameters() if not is_matrix(name, p)]
    return matrices, rest


@torch.no_grad()
def generate(pipe: Any, captions: Sequence[str], batch: int = 10, **call: Any) -> Tensor:
    """Clips ``[n, frames, 3, 64, 64]`` in [0, 1]; clip i starts from the noise of seed i. ``call`` goes to the pipeline."""
    clips = []
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        clips.append(pipe(part, generator=generators, output_type="pt", **call).frames.float().clamp(0, 1))
    return torch.cat(clips)


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """For printing."""
    return {key: round(value, 3) for key, value in figures.items()}


def stage_parser(about: str | None, stages: Sequence[str], run: Path, *, minutes: float, count: int) -> argparse.ArgumentParser:
    """Options that the scripts share.

    Args:
        about: what the help says of the script.
        stages: names; one of them is run.
        run: folder of the checkpoints.
        minutes: default length of a training.
        count: default number of clips to evaluate on.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=stages)
    changed = f"{run.relative_to(ROOT)}/STAGE-minutes.txt"
    parser.add_argument("--minutes", type=float, default=minutes, help=f"planned length of a training; may be changed in {changed}")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted training")
    parser.add_argument("--count", type=int, default=count, help="clips to evaluate on")
    return parser
