"""Matrix products, convolutions and attentions of published video models, cut down in rows until one core finishes them soon.

Widths come from the models' configs. Rows (tokens, positions) are halved from the real number until the work fits :data:`BUDGET`, and
never go below :data:`LEAST_ROWS`: a product with fewer rows is bound by reading the weight and would be another problem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BUDGET = 6e10  # multiplications and additions of one call: 0.3 seconds in bf16 on one core
LEAST_ROWS = 1000


@dataclass(frozen=True)
class Gemm:
    """``[m, k] x [k, n]``: a linear layer on ``m`` tokens."""

    model: str
    name: str
    m: int
    k: int
    n: int

    @property
    def operations(self) -> int:
        return 2 * self.m * self.k * self.n

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Elements of input, weight and output."""
        return self.m * self.k, self.k * self.n, self.m * self.n

    @property
    def shape(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"


@dataclass(frozen=True)
class Conv:
    """A 2-D or 3-D convolution with padding that keeps the size; ``size`` is (frames, height, width), frames a batch in 2-D."""

    model: str
    name: str
    channels: int
    outputs: int
    kernel: tuple[int, ...]
    size: tuple[int, int, int]
    stride: int = 1

    @property
    def padding(self) -> tuple[int, ...]:
        return tuple(width // 2 for width in self.kernel)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the tensor: frames are the batch of a 2-D convolution."""
        frames, *plane = self.size
        return (frames, self.channels, *plane) if len(self.kernel) == 2 else (1, self.channels, *self.size)

    @property
    def positions(self) -> int:
        """Of the output."""
        return math.prod(self.size) // self.stride ** len(self.kernel)

    @property
    def operations(self) -> int:
        return 2 * self.positions * self.channels * self.outputs * math.prod(self.kernel)

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Elements of input, weight and output."""
        return math.prod(self.input_shape), self.channels * self.outputs * math.prod(self.kernel), self.positions * self.outputs

    @property
    def shape(self) -> str:
        return f"{'x'.join(map(str, self.input_shape))} {self.channels}>{self.outputs} {'x'.join(map(str, self.kernel))}"


@dataclass(frozen=True)
class Attention:
    """Queries of ``tokens`` over keys of ``keys``, ``batch`` times."""

    model: str
    name: str
    batch: int
    heads: int
    tokens: int
    keys: int
    dim: int

    @property
    def operations(self) -> int:
        return 4 * self.batch * self.heads * self.tokens * self.keys * self.dim

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Elements of the queries, of keys and values, and of the output."""
        width = self.batch * self.heads * self.dim
        return width * self.tokens, 2 * width * self.keys, width * self.tokens

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.heads}x{self.tokens}x{self.keys}x{self.dim}"


Shape = Gemm | Conv | Attention


def halved(real: int, cost: float, least: int = LEAST_ROWS) -> int:
    """The largest of ``real``, ``real / 2``, ``real / 4`` ... whose work (``cost`` for each) fits the budget, a multiple of 16.

    Example:
        >>> halved(32760, 2 * 1536 * 1536)  # 8190 rows, and two to make it a multiple of 16
        8192
    """
    rows = real
    while rows * cost > BUDGET and rows // 2 >= least:
        rows //= 2
    return -(-rows // 16) * 16 if rows >= 16 else rows


# --- transformers ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transformer:
    """Sizes of a video transformer: hidden width, heads, MLP width, video tokens of its usual clip, text tokens and their width."""

    hidden: int
    heads: int
    mlp: int
    tokens: int
    text: int
    cross: bool  # text is read through cross attention, not joined with the video tokens

    @property
    def dim(self) -> int:
        return self.hidden // self.heads


TRANSFORMERS = {
    # Wan-AI/Wan2.1-T2V-1.3B-Diffusers, 14B: 480x832, 81 frames -> 21 x 30 x 52 patches; 512 text tokens
    "wan-1.3b": Transformer(1536, 12, 8960, 32760, 512, True),
    "wan-14b": Transformer(5120, 40, 13824, 32760, 512, True),
    # THUDM/CogVideoX-5b: 480x720, 49 frames -> 13 x 30 x 45 patches, joined with 226 text tokens
    "cogvideox-5b": Transformer(3072, 48, 12288, 17776, 226, False),
    # hunyuanvideo-community/HunyuanVideo: 720x1280, 129 frames -> 33 x 45 x 80 patches, joined with 256 text tokens
    "hunyuanvideo": Transformer(3072, 24, 12288, 119056, 256, False),
}


def _transformer(model: str, its: Transformer) -> list[Shape]:
    products = {"attention projection": (its.hidden, its.hidden), "mlp in": (its.hidden, its.mlp), "mlp out": (its.mlp, its.hidden)}
    if model == "hunyuanvideo":
        products["single block out"] = (its.hidden + its.mlp, its.hidden)
    found: list[Shape] = [Gemm(model, name, halved(its.tokens, 2 * k * n), k, n) for name, (k, n) in products.items()]
    if its.cross:
        found.append(Gemm(model, "text key/value", its.text, its.hidden, its.hidden))
    tokens = _square(its.tokens, 4 * its.hidden)
    found.append(Attention(model, "self attention", 1, its.heads, tokens, tokens, its.dim))
    if its.cross:
        queries = halved(its.tokens, 4 * its.hidden * its.text)
        found.append(Attention(model, "cross attention", 1, its.heads, queries, its.text, its.dim))
    return found


def _square(tokens: int, cost: float) -> int:
    """Tokens of a self attention: work grows with their square."""
    while tokens**2 * cost > BUDGET:
        tokens //= 2
    return -(-tokens // 16) * 16


# --- UNets ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unet:
    """Sizes of a video UNet: channels and heads by level, frames, height and width of the latent, text tokens and their width."""

    channels: tuple[int, ...]
    heads: tuple[int, ...]
    latent: tuple[int, int, int]
    text: int
    text_width: int
    inputs: int  # channels of the latent
    temporal_conv: bool


UNETS = {
    # guoyww/animatediff on Stable Diffusion 1.5: 512x512, 16 frames
    "animatediff": Unet((320, 640, 1280), (8, 8, 8), (16, 64, 64), 77, 768, 4, False),
    # stabilityai/stable-video-diffusion-img2vid: 576x1024, 14 frames
    "svd": Unet((320, 640, 1280), (5, 10, 20), (14, 72, 128), 1, 1024, 8, True),
}


def _conv(model: str, name: str, channels: int, outputs: int, kernel: tuple[int, ...], size: tuple[int, int, int]) -> Conv:
    """With frames, then height and width, halved until it fits."""
    frames, height, width = size
    cost = 2 * channels * outputs * math.prod(kernel)
    while frames * height * width * cost > BUDGET and frames > 8:
        frames = -(-frames // 2)
    while frames * height * width * cost > BUDGET and height > 8:
        height, width = height // 2, width // 2
    return Conv(model, name, channels, outputs, kernel, (frames, height, width))


def _unet(model: str, its: Unet) -> list[Shape]:
    found: list[Shape] = [_conv(model, "conv_in", its.inputs, its.channels[0], (3, 3), its.latent)]
    for level, (channels, heads) in enumerate(zip(its.channels, its.heads, strict=True)):
        frames, height, width = its.latent[0], its.latent[1] >> level, its.latent[2] >> level
        found += _level(model, its, f"level {level}", channels, heads, (frames, height, width))
    return found


def _level(model: str, its: Unet, level: str, channels: int, heads: int, size: tuple[int, int, int]) -> list[Shape]:
    frames, plane = size[0], size[1] * size[2]
    found: list[Shape] = [
        _conv(model, f"{level} resnet 3x3", channels, channels, (3, 3), size),
        _conv(model, f"{level} shortcut 1x1", 2 * channels, channels, (1, 1), size),
    ]
    if its.temporal_conv:
        found.append(_conv(model, f"{level} temporal 3x1x1", channels, channels, (3, 1, 1), size))
    products = {"attention projection": (channels, channels), "geglu in": (channels, 8 * channels), "geglu out": (4 * channels, channels)}
    found += [Gemm(model, f"{level} {name}", halved(frames * plane, 2 * k * n), k, n) for name, (k, n) in products.items()]
    dim, tokens = channels // heads, _square(plane, 4 * channels)
    found.append(Attention(model, f"{level} spatial attention", 1, heads, tokens, tokens, dim))
    places = halved(plane, 4 * channels * frames**2, 16)
    found.append(Attention(model, f"{level} temporal attention", places, heads, frames, frames, dim))
    return found


def _unet3d() -> list[Shape]:
    """Spatio-temporal convolutions that no model above has: causal video VAEs, and the (1, 3, 3) of 3-D UNets."""
    size = (16, 32, 32)
    return [
        _conv("unet3d", "3x3x3", 320, 320, (3, 3, 3), size),
        _conv("unet3d", "1x3x3", 320, 320, (1, 3, 3), size),
        _conv("unet3d", "3x1x1", 320, 320, (3, 1, 1), size),
    ]


def shapes() -> list[Shape]:
    """All of them."""
    found = [shape for model, its in TRANSFORMERS.items() for shape in _transformer(model, its)]
    found += [shape for model, its in UNETS.items() for shape in _unet(model, its)]
    return found + _unet3d()


MODELS = (*TRANSFORMERS, *UNETS, "unet3d")
KINDS: dict[str, type[Shape]] = {"gemm": Gemm, "conv": Conv, "attention": Attention}
