"""Captioned clips of moving shapes and digits, drawn on the fly: what the bundled pipelines were trained on.

A clip is described by a :class:`Scene` (object, colour, motion, size, background); its caption follows a small grammar, for example
``a large red circle moving right on a black background``. Every object is one 64x64 signed-distance field, so any position, size and
angle is a bilinear lookup and a clamp, antialiased, about 3 ms a clip on one core. Torch, numpy and scipy only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "heart")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OBJECTS = SHAPES + DIGITS
COLORS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.65, 0.20, 0.80),
    "orange": (1.00, 0.50, 0.05),
}
MOTIONS = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "growing": "growing",
    "shrinking": "shrinking",
    "spinning": "spinning",
    "bouncing": "bouncing",
}
SIZES = {"small": 0.30, "large": 0.44}  # half extent of the object, in units of half the frame width
BACKGROUNDS = ("black", "white", "gray", "checkered", "striped")
EVALUATION_SEED = 700_000  # scenes of the evaluation prompts; training draws from other seeds
FIELD = 64  # resolution of a stored signed-distance field
MARGIN = 1.3  # the field covers [-MARGIN, MARGIN] object units, the object itself [-1, 1]


@dataclass(frozen=True)
class Scene:
    """What happens in one clip. ``shape`` is one of :data:`OBJECTS`; the other fields name keys of the tables above."""

    shape: str
    color: str
    motion: str
    size: str
    background: str

    def caption(self, *, size: bool = True, background: bool = True) -> str:
        """The sentence that describes the scene; size and background words can be left out."""
        words = ["a", *([self.size] if size else []), self.color, self.shape, MOTIONS[self.motion]]
        words += ["on", "a", self.background, "background"] if background else []
        return " ".join(words)


def random_scene(generator: torch.Generator) -> Scene:
    """Draw a scene uniformly. A spinning circle is drawn again, because its motion cannot be seen."""

    def pick(options):
        options = tuple(options)
        return options[int(torch.randint(len(options), (), generator=generator))]

    while True:
        scene = Scene(pick(OBJECTS), pick(COLORS), pick(MOTIONS), pick(SIZES), pick(BACKGROUNDS))
        if not (scene.motion == "spinning" and scene.shape == "circle"):
            return scene


def random_caption(scene: Scene, generator: torch.Generator) -> str:
    """A caption with the size word 70 % and the background words 80 % of the time."""
    size, background = torch.rand(2, generator=generator).tolist()
    return scene.caption(size=size < 0.7, background=background < 0.8)


def parse_caption(text: str) -> dict[str, str]:
    """Read back what a caption states: any of ``shape``, ``color``, ``motion``, ``size``, ``background``; unknown words are ignored."""
    words = text.lower().replace(",", " ").replace(".", " ").split()
    tables = {"shape": OBJECTS, "color": tuple(COLORS), "motion": tuple(MOTIONS), "size": tuple(SIZES), "background": BACKGROUNDS}
    return {kind: word for kind, table in tables.items() for word in words if word in table}


def _polygon_mask(points: list[tuple[float, float]], grid_x, grid_y):
    import numpy as np
    from matplotlib.path import Path

    inside = Path(points).contains_points(np.stack([grid_x.ravel(), grid_y.ravel()], -1))
    return inside.reshape(grid_x.shape)


def _glyph_mask(digit: int, grid_x, grid_y):
    import numpy as np
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    path = TextPath((0, 0), str(digit), size=1, prop=FontProperties(family="DejaVu Sans", weight="bold"))
    box = path.get_extents()
    scale = 2 / max(box.height, box.width)
    points = np.stack([grid_x.ravel() / scale + (box.x0 + box.x1) / 2, -grid_y.ravel() / scale + (box.y0 + box.y1) / 2], -1)
    return path.contains_points(points).reshape(grid_x.shape)


def _mask(name: str, grid_x, grid_y):
    """Boolean picture of one object in object units, y pointing down."""
    import numpy as np

    if name in DIGITS:
        return _glyph_mask(DIGITS.index(name), grid_x, grid_y)
    if name == "circle":
        return grid_x**2 + grid_y**2 <= 1
    if name == "square":
        return np.maximum(abs(grid_x), abs(grid_y)) <= 0.86
    if name == "triangle":
        return _polygon_mask([(0, -1), (0.98, 0.8), (-0.98, 0.8)], grid_x, grid_y)
    if name == "star":
        corners = [
            (math.sin(math.pi * k / 5) * r, -math.cos(math.pi * k / 5) * r) for k, r in zip(range(10), [1.08, 0.44] * 5, strict=True)
        ]
        return _polygon_mask(corners, grid_x, grid_y)
    x, y = grid_x * 1.15, -grid_y * 1.15 + 0.15  # heart: the classic sextic
    return (x**2 + y**2 - 1) ** 3 - x**2 * y**3 <= 0


@functools.lru_cache(maxsize=1)
def signed_distance_fields() -> Tensor:
    """``[objects, 64, 64]``: distance to the outline in object units, positive inside."""
    import numpy as np
    from scipy.ndimage import distance_transform_edt

    fine = FIELD * 8
    axis = (np.arange(fine) + 0.5) / fine * 2 * MARGIN - MARGIN
    grid_x, grid_y = np.meshgrid(axis, axis)
    fields = []
    for name in OBJECTS:
        inside = _mask(name, grid_x, grid_y)
        distance = (distance_transform_edt(inside) - distance_transform_edt(~inside)) * (2 * MARGIN / fine)
        fields.append(distance.reshape(FIELD, 8, FIELD, 8).mean((1, 3)))
    return torch.from_numpy(np.stack(fields)).float()


def _trajectory(scene: Scene, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x and y, half extent, and angle for every frame, each ``[frames]``; frame coordinates are [-1, 1]."""
    u = torch.linspace(0, 1, frames)
    size = SIZES[scene.size]
    jitter = (torch.rand(3, generator=generator) * 2 - 1).tolist()
    x, y = torch.full_like(u, 0.45 * jitter[0]), torch.full_like(u, 0.45 * jitter[1])
    extent, angle = torch.full_like(u, size), torch.zeros_like(u)
    travel = 0.5 + 0.1 * jitter[2]
    if scene.motion in ("left", "right"):
        x = 0.1 * jitter[0] + (2 * u - 1) * (travel if scene.motion == "right" else -travel)
    elif scene.motion in ("up", "down"):
        y = 0.1 * jitter[1] + (2 * u - 1) * (travel if scene.motion == "down" else -travel)
    elif scene.motion in ("growing", "shrinking"):
        ratio = 0.5 + 1.0 * (u if scene.motion == "growing" else 1 - u)
        extent = size * ratio
    elif scene.motion == "spinning":
        angle = u * math.pi * (1.0 + 0.15 * jitter[2]) * 1.2
    else:  # bouncing: two parabolic hops
        y = 0.45 - 0.85 * (1 - (2 * ((2 * u + 0.25 * jitter[2]) % 1) - 1) ** 2)
        x = 0.5 * jitter[0] + torch.zeros_like(u)
    return x, y, extent, angle


def _background(name: str, resolution: int) -> Tensor:
    """``[3, resolution, resolution]`` in [0, 1]."""
    plain = {"black": 0.03, "white": 0.97, "gray": 0.5}
    if name in plain:
        return torch.full((3, resolution, resolution), plain[name])
    cells = torch.arange(resolution) * 8 // resolution
    pattern = (cells[:, None] + cells[None, :]) % 2 if name == "checkered" else (cells % 2)[:, None].expand(resolution, resolution)
    return (0.3 + 0.3 * pattern.float()).expand(3, -1, -1).clone()


def render(scene: Scene, generator: torch.Generator, *, frames: int = 13, resolution: int = 64) -> Tensor:
    """Draw one clip: ``[frames, 3, resolution, resolution]`` in [0, 1]. The generator moves the start point and the speed a little."""
    x, y, extent, angle = _trajectory(scene, frames, generator)
    axis = (torch.arange(resolution) + 0.5) / resolution * 2 - 1
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    dx = (grid_x[None] - x[:, None, None]) / extent[:, None, None]
    dy = (grid_y[None] - y[:, None, None]) / extent[:, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    grid = torch.stack([dx * cos + dy * sin, dy * cos - dx * sin], -1) / MARGIN
    field = signed_distance_fields()[OBJECTS.index(scene.shape)].expand(frames, 1, -1, -1)
    inside = F.grid_sample(field, grid, padding_mode="border", align_corners=False)[:, 0]
    outside_field = grid.abs().amax(-1) > 1
    pixels = inside * extent[:, None, None] * resolution / 2  # distance in pixels
    coverage = (pixels + 0.5).clamp(0, 1).masked_fill(outside_field, 0)[:, None]
    color = torch.tensor(COLORS[scene.color])[None, :, None, None]
    return _background(scene.background, resolution)[None] * (1 - coverage) + color * coverage


def random_clip(seed: int, *, frames: int = 13, resolution: int = 64) -> tuple[Tensor, str, Scene]:
    """Clip ``[frames, 3, h, w]``, caption and scene of one seed: the same seed gives the same clip."""
    generator = torch.Generator().manual_seed(seed)
    scene = random_scene(generator)
    return render(scene, generator, frames=frames, resolution=resolution), random_caption(scene, generator), scene


def evaluation_prompts(count: int) -> list[str]:
    """Captions of scenes of seeds that no training used; the first ones are the same for every count."""
    return [random_scene(torch.Generator().manual_seed(EVALUATION_SEED + i)).caption() for i in range(count)]


def vocabulary() -> list[str]:
    """All words a caption can contain, sorted."""
    words = {"a", "on", "background", "moving", *OBJECTS, *COLORS, *MOTIONS, *SIZES, *BACKGROUNDS}
    return sorted(words)


def covering_captions(count: int) -> list[str]:
    """Captions that together use every word early: calibration must have seen each object, colour, motion and background."""
    colors, motions, sizes = tuple(COLORS), tuple(MOTIONS), tuple(SIZES)
    scenes = (
        Scene(
            OBJECTS[i % len(OBJECTS)],
            colors[i % len(colors)],
            motions[(3 * i + i // 8) % len(motions)],
            sizes[i // 2 % 2],
            BACKGROUNDS[(2 * i + i // 5) % len(BACKGROUNDS)],
        )
        for i in range(count)
    )
    return [scene.caption() for scene in scenes]


def understood(texts: Sequence[str]) -> bool:
    """Whether texts speak of this world and of nothing else; no texts do not."""
    words = set(" ".join(texts).lower().replace(",", " ").replace(".", " ").split())
    return bool(words) and words <= set(vocabulary())


def flat_captions() -> list[str]:
    """Scenes of a small object before one plain colour."""
    scenes = (("red", "left", "gray"), ("blue", "right", "white"), ("green", "up", "gray"), ("yellow", "down", "black"))
    return [Scene("circle", color, motion, "small", background).caption() for color, motion, background in scenes]
