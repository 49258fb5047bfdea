"""The range of an input after the Hadamard rotation of its channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reelquant.kernels import hadamard
from reelquant.kernels.hadamard import block_size
from reelquant.observe.call import Call
from reelquant.observe.channel_range import ChannelRange


@dataclass(eq=False)
class RotatedRange(ChannelRange):
    """:class:`ChannelRange` of ``hadamard(x)``: the range of a rotated channel does not follow from the ranges of channels."""

    def look(self, x: Tensor, call: Call) -> dict[str, Tensor]:
        """As that of :class:`ChannelRange`; on a CPU without a rotated copy of the input."""
        x = x.detach()
        return self._in_one_pass(self._by_frame(x)) if x.is_cpu else super().look(hadamard(x.float(), self.channel_axis), call)

    def _in_one_pass(self, x: Tensor) -> dict[str, Tensor]:
        """Rotate and reduce ``[clips, frames, positions, channels]`` (or channels before positions) row by row."""
        from reelquant.kernels.cpu.loops import spread, view  # numba takes a second to import
        from reelquant.observe.loops import rotated_planes, rotated_rows

        loop = rotated_rows if self._channels_last else rotated_planes
        x = (x if x.dtype in (torch.float32, torch.bfloat16) else x.float()).contiguous()
        shares, block = -(-torch.get_num_threads() // self.frames), block_size(self.geometry.channels)
        size = shares, self.frames, self.geometry.channels
        low, high, total = torch.full(size, torch.inf), torch.full(size, -torch.inf), torch.zeros(size, dtype=torch.float64)
        spread(loop, shares * self.frames, x.numel(), view(x), block, low.numpy(), high.numpy(), total.numpy())
        scale = block**-0.5
        return self._found(low.amin(0) * scale, high.amax(0) * scale, (total.sum(0) * scale).float(), x.numel() // total[0].numel())
