"""Draw the pictures and clips that come with the library, for pipelines that need some and are given none.

    PYTHONPATH=src python -m training.conditions

Everything is drawn from the seeds below: landscapes with a sun, hills and grain, and objects of :mod:`reelquant.models.shapes` in front.
Calibration needs what photographs have: smooth and rough areas, hard edges, dark and bright parts, strong and weak colours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reelquant.models import defaults
from reelquant.models.shapes import COLORS, OBJECTS, SIZES, Scene, render

SIZE, CLIP_SIZE, FRAMES = 256, 128, 17
PICTURES = {  # name -> seed, colours of the sky above and at the horizon, of the ground, height of the horizon, object, colour, size
    "0-morning-star": (1, (0.35, 0.55, 0.85), (0.98, 0.85, 0.65), (0.25, 0.42, 0.20), 0.62, "star", "yellow", "small"),
    "1-evening-circle": (2, (0.12, 0.10, 0.30), (0.95, 0.45, 0.20), (0.10, 0.08, 0.10), 0.70, "circle", "red", "large"),
    "2-snow-square": (3, (0.70, 0.78, 0.88), (0.92, 0.94, 0.97), (0.88, 0.90, 0.94), 0.50, "square", "blue", "small"),
    "3-desert-triangle": (4, (0.25, 0.60, 0.90), (0.85, 0.90, 0.92), (0.80, 0.62, 0.35), 0.45, "triangle", "purple", "large"),
    "4-night-heart": (5, (0.01, 0.01, 0.05), (0.05, 0.07, 0.16), (0.02, 0.04, 0.03), 0.75, "heart", "orange", "small"),
    "5-meadow-seven": (6, (0.45, 0.70, 0.95), (0.80, 0.90, 0.98), (0.20, 0.55, 0.15), 0.55, "seven", "green", "large"),
}
CLIPS = {"0-morning-circle": ("0-morning-star", "circle", "red", "right"), "1-night-star": ("4-night-heart", "star", "yellow", "spinning")}


def noise(draw: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise of so many cells a side, ``[size, size]`` in [-1, 1]."""
    coarse = torch.from_numpy(draw.uniform(-1, 1, (1, 1, cells, cells)))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)[0, 0].numpy()


def landscape(name: str, size: int) -> np.ndarray:
    """``[size, size, 3]`` in [0, 1]."""
    seed, above, horizon, ground, height, *_ = PICTURES[name]
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    line = height + 0.08 * noise(draw, size, 5)[0][None] + 0.02 * noise(draw, size, 17)[0][None]  # hills
    sky = np.clip(y / height, 0, 1)[..., None]
    picture = (1 - sky) * np.array(above) + sky * np.array(horizon)
    sun = np.exp(-((x - draw.uniform(0.2, 0.8)) ** 2 + (y - height * 0.6) ** 2) / 0.006)[..., None]
    picture = picture + sun * (1 - picture) * 0.9
    rough = 0.10 * noise(draw, size, 12) + 0.08 * noise(draw, size, 40) + 0.05 * noise(draw, size, 110)
    land = np.array(ground) * (1 + rough[..., None] * 2) * (1.15 - 0.5 * (y - line))[..., None]
    return np.where((y > line)[..., None], land, picture).clip(0, 1)


def with_object(picture: np.ndarray, scene: Scene, frames: int) -> torch.Tensor:
    """The object of a scene before a picture, lit from above: ``[frames, size, size, 3]``."""
    size = picture.shape[0]
    black, white = (
        render(
            Scene(scene.shape, scene.color, scene.motion, scene.size, ground),
            torch.Generator().manual_seed(7),
            frames=frames,
            resolution=size,
        )
        for ground in ("black", "white")
    )
    cover = 1 - ((white - black) / 0.94).clamp(0, 1)  # what of the ground is hidden
    light = torch.linspace(1.15, 0.7, size)[:, None]
    colour = torch.tensor(COLORS[scene.color])[:, None, None] * light
    ground = torch.from_numpy(picture).float().movedim(-1, 0)
    return (ground * (1 - cover) + colour * cover).clamp(0, 1).movedim(1, -1)


def saved(frames: torch.Tensor, file: Path) -> None:
    """A lossless WebP of one frame or more; 64 levels of a colour are enough and keep it small."""
    first, *others = [Image.fromarray((((frame * 63).round() / 63) * 255).round().byte().numpy()) for frame in frames]
    more = {"save_all": True, "append_images": others, "duration": 125} if others else {}
    first.save(file, lossless=True, quality=100, method=6, **more)


def main() -> None:
    defaults.FOLDER.mkdir(exist_ok=True)
    for name, (*_, shape, color, size) in PICTURES.items():
        assert shape in OBJECTS and size in SIZES
        scene = Scene(shape, color, "spinning", size, "black")
        saved(with_object(landscape(name, SIZE), scene, 3)[1:2], defaults.FOLDER / f"picture-{name}.webp")
    for name, (ground, shape, color, motion) in CLIPS.items():
        scene = Scene(shape, color, motion, "small", "black")
        saved(with_object(landscape(ground, CLIP_SIZE), scene, FRAMES), defaults.FOLDER / f"clip-{name}.webp")
    for file in sorted(defaults.FOLDER.iterdir()):
        print(file.name, file.stat().st_size)


if __name__ == "__main__":
    main()
