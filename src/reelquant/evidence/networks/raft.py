"""RAFT: where every pixel of a picture moves to in the next.

Definition: the large model, trained on FlyingChairs and then FlyingThings ("things"), inference only. Written from the
paper; the order of the 9x9 window of correlations (offsets of x outer, of y inner) follows the released weights.

Preprocessing: [0, 1] to [-1, 1]; sides padded to multiples of 8 by repeating the border, half on each side; pictures
with a side below 128 pixels are enlarged first, for the coarsest of the four correlation levels (1/64) needs 2 places
to interpolate between.

Paper:
    Teed and Deng, RAFT: Recurrent All-Pairs Field Transforms for Optical Flow, 2020, section 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelquant._errors import MeasurementError

MIN_SIDE = 128
LEVELS = 4
RADIUS = 4
HIDDEN = 128
STRIDE = 8

_Norm = type[nn.BatchNorm2d] | type[nn.InstanceNorm2d]


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: _Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm1, self.norm2 = norm(outputs), norm(outputs)
        self.downsample = None
        if stride > 1:
            self.norm3 = norm(outputs)  # registered twice, as in the released weights
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), self.norm3)

    def forward(self, maps: Tensor) -> Tensor:
        change = F.relu(self.norm1(self.conv1(maps)))
        change = F.relu(self.norm2(self.conv2(change)))
        return F.relu((maps if self.downsample is None else self.downsample(maps)) + change)


class _Encoder(nn.Module):
    """A picture to 256 features at 1/8 of its size."""

    def __init__(self, norm: _Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3)
        self.norm1 = norm(64)
        self.layer1 = nn.Sequential(_Residual(64, 64, 1, norm), _Residual(64, 64, 1, norm))
        self.layer2 = nn.Sequential(_Residual(64, 96, 2, norm), _Residual(96, 96, 1, norm))
        self.layer3 = nn.Sequential(_Residual(96, 128, 2, norm), _Residual(128, 128, 1, norm))
        self.conv2 = nn.Conv2d(128, 256, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        maps = F.relu(self.norm1(self.conv1(pictures)))
        return self.conv2(self.layer3(self.layer2(self.layer1(maps))))


class _Motion(nn.Module):
    """Correlations and the flow so far to 128 features, the flow itself among them."""

    def __init__(self) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(LEVELS * (2 * RADIUS + 1) ** 2, 256, 1)
        self.convc2 = nn.Conv2d(256, 192, 3, 1, 1)
        self.convf1 = nn.Conv2d(2, 128, 7, 1, 3)
        self.convf2 = nn.Conv2d(128, 64, 3, 1, 1)
        self.conv = nn.Conv2d(64 + 192, 128 - 2, 3, 1, 1)

    def forward(self, flow: Tensor, correlations: Tensor) -> Tensor:
        seen = F.relu(self.convc2(F.relu(self.convc1(correlations))))
        moved = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([seen, moved], 1))), flow], 1)


class _Recurrence(nn.Module):
    """A convolutional GRU, once along rows and once along columns."""

    def __init__(self) -> None:
        super().__init__()
        for pass_, kernel in (("1", (1, 5)), ("2", (5, 1))):
            for gate in "zrq":
                self.add_module(
                    f"conv{gate}{pass_}",
                    nn.Conv2d(HIDDEN + 256, HIDDEN, kernel, 1, (kernel[0] // 2, kernel[1] // 2)),
                )

    def forward(self, state: Tensor, inputs: Tensor) -> Tensor:
        for update, reset, candidate in (
            (self.convz1, self.convr1, self.convq1),
            (self.convz2, self.convr2, self.convq2),
        ):
            both = torch.cat([state, inputs], 1)
            z, r = update(both).sigmoid(), reset(both).sigmoid()
            state = (1 - z) * state + z * candidate(torch.cat([r * state, inputs], 1)).tanh()
        return state


class _FlowHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(HIDDEN, 256, 3, 1, 1)
        self.conv2 = nn.Conv2d(256, 2, 3, 1, 1)

    def forward(self, state: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(state)))


class _Update(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = _Motion()
        self.gru = _Recurrence()
        self.flow_head = _FlowHead()
        self.mask = nn.Sequential(nn.Conv2d(HIDDEN, 256, 3, 1, 1), nn.ReLU(), nn.Conv2d(256, STRIDE * STRIDE * 9, 1))


def _grid(height: int, width: int, like: Tensor) -> Tensor:
    """``[1, 2, h, w]``: x and y of every place."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=like.dtype, device=like.device),
        torch.arange(width, dtype=like.dtype, device=like.device),
        indexing="ij",
    )
    return torch.stack([x, y])[None]


def _pyramid(first: Tensor, second: Tensor) -> list[Tensor]:
    """Correlations of every place of the first with every place of the second, halved up to three times: equation 1.

    Returns:
        Four times ``[n h w, 1, h / 2**i, w / 2**i]``.
    """
    n, channels, h, w = first.shape
    all_pairs = first.flatten(2).mT @ second.flatten(2) / math.sqrt(channels)
    levels = [all_pairs.reshape(n * h * w, 1, h, w)]
    for _ in range(LEVELS - 1):
        levels.append(F.avg_pool2d(levels[-1], 2, 2))
    return levels


def _look_up(pyramid: list[Tensor], places: Tensor) -> Tensor:
    """Correlations in the 9x9 windows around ``places`` ``[n, 2, h, w]``, bilinear: ``[n, 324, h, w]``."""
    n, _, h, w = places.shape
    offset = torch.arange(-RADIUS, RADIUS + 1, dtype=places.dtype, device=places.device)
    window = torch.stack(
        torch.meshgrid(offset, offset, indexing="ij"),
        -1,
    )  # (x, y), x in rows: the order of the released weights
    centres = places.permute(0, 2, 3, 1).reshape(n * h * w, 1, 1, 2)
    found = []
    for i, level in enumerate(pyramid):
        last = torch.tensor([level.shape[-1] - 1, level.shape[-2] - 1], dtype=places.dtype, device=places.device)
        points = (centres / 2**i + window) * 2 / last - 1
        found.append(F.grid_sample(level, points, align_corners=True).reshape(n, h, w, -1))
    return torch.cat(found, -1).permute(0, 3, 1, 2)


def _enlarge(flow: Tensor, mask: Tensor) -> Tensor:
    """Flow at 1/8 to full size: a fine pixel is a convex combination of the 3x3 coarse ones around it, section 3.3."""
    n, _, h, w = flow.shape
    shares = mask.view(n, 1, 9, STRIDE, STRIDE, h, w).softmax(2)
    coarse = F.unfold(STRIDE * flow, 3, padding=1).view(n, 2, 9, 1, 1, h, w)
    return (shares * coarse).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(n, 2, STRIDE * h, STRIDE * w)


class RAFT(nn.Module):
    """The large RAFT, inference only; build it with ``weights.load("raft", folder)``."""

    def __init__(self) -> None:
        super().__init__()
        self.fnet = _Encoder(nn.InstanceNorm2d)
        self.cnet = _Encoder(nn.BatchNorm2d)
        self.update_block = _Update()

    @staticmethod
    def key(name: str) -> str:
        """The name in the weights file of an entry of the state dict: the same."""
        return name

    def forward(self, first: Tensor, second: Tensor, iterations: int = 12) -> Tensor:
        """Flow in pixels ``[n, 2, h, w]`` for pictures ``[n, 3, h, w]`` in [-1, 1]; sides: multiples of 8, at least 128."""
        features = self.fnet(torch.cat([first, second]))
        pyramid = _pyramid(*features.chunk(2))
        context = self.cnet(first)
        state, inputs = context[:, :HIDDEN].tanh(), context[:, HIDDEN:].relu()
        start = _grid(*context.shape[-2:], like=context)
        flow = torch.zeros_like(context[:, :2])
        for _ in range(iterations):
            motion = self.update_block.encoder(flow, _look_up(pyramid, start + flow))
            state = self.update_block.gru(state, torch.cat([inputs, motion], 1))
            flow = flow + self.update_block.flow_head(state)
        return _enlarge(flow, 0.25 * self.update_block.mask(state))

    @torch.no_grad()
    def flow(self, first: Tensor, second: Tensor, iterations: int = 12, batch: int = 4) -> Tensor:
        """Where the pixels of ``first`` are found in ``second``.

        A picture with a side below 128 pixels is enlarged until its shorter side is 128 and the flow is scaled back: a
            flow of 64x64
        pictures is what the network sees of them at 128x128, in pixels of the 64x64 ones.

        Args:
            first: ``[n, 3, h, w]`` in [0, 1], on any device.
            second: the same shape.
            iterations: updates of the flow; the paper evaluates with 12 to 32.
            batch: pairs in memory at a time (all-pairs correlations of 480x832 take 210 MB a pair); no influence on the
                answer.

        Returns:
            ``[n, 2, h, w]`` float32 on the CPU, in pixels: channel 0 is x, to the right, channel 1 is y, down.

        Raises:
            MeasurementError: if the shapes differ or are not ``[n, 3, height, width]``.
        """
        if first.shape != second.shape or first.ndim != 4 or first.shape[1] != 3:
            raise MeasurementError(
                f"RAFT looks at pairs of pictures [n, 3, h, w] of one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
            )
        like = self.fnet.conv1.weight
        parts = [
            self._flow(a.to(like), b.to(like), iterations).float().cpu()
            for a, b in zip(first.split(batch), second.split(batch), strict=True)
            if len(a)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, 2, *first.shape[-2:])

    def _flow(self, first: Tensor, second: Tensor, iterations: int) -> Tensor:
        h, w = first.shape[-2:]
        scale = max(1.0, MIN_SIDE / min(h, w))
        high, wide = round(h * scale), round(w * scale)
        left, top = (-wide % STRIDE) // 2, (-high % STRIDE) // 2
        border = (left, -wide % STRIDE - left, top, -high % STRIDE - top)

        def prepare(pictures: Tensor) -> Tensor:
            if scale > 1:
                pictures = F.interpolate(pictures, (high, wide), mode="bilinear", align_corners=False)
            return F.pad(pictures * 2 - 1, border, mode="replicate")

        flow = self(prepare(first), prepare(second), iterations)[..., top : top + high, left : left + wide]
        if scale > 1:
            # the average of the pixels that one small pixel became, not a sample among them
            flow = F.interpolate(flow, (h, w), mode="area") * flow.new_tensor([w / wide, h / high]).view(2, 1, 1)
        return flow
