"""Attention to those blocks of keys that had the largest weights at the last computed step, head by head.

Paper: AdaSpa (arXiv 2502.21079) finds at a few steps which blocks matter, and uses them until the next search; heads that spread their
weights get more blocks. Ours: a search is a whole computed step, with the exact weights once more beside the output (theirs: one fused
kernel, and sums from an earlier step at later searches); how many blocks a head gets follows from the weights alone: of all blocks of all
heads the heaviest stay, so that the weight that is kept is as large as it can be (theirs moves three classes of heads up and down).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from reelquant._errors import RecipeError
from reelquant.kernels.attention_quant import key_bias
from reelquant.nn import AttentionCall
from reelquant.reuse.attention.mode import Mode, Place, check_share

LEAST = 16
"""Blocks of keys, and groups of queries. With fewer there would be little to choose from."""
AT_ONCE = 64
"""Queries whose weights are held at once."""
GATHERED = 2**26
"""At most so many values of keys are gathered at once."""


@dataclass(frozen=True)
class Sparse(Mode):
    """Every group of queries sees its heaviest blocks of keys. Calls with a mask over pairs of tokens are computed.

    Attributes:
        density: the share of all blocks that is computed.
        block: keys of a block at most; there are sixteen blocks at least.
        queries: of a group, at most; there are sixteen groups at least. Fewer hold more of the weights, and their products are slow: on
            processors 64 take twice as long as 256.
    """

    density: float = 0.5
    block: int = 64
    queries: int = 256

    def __post_init__(self) -> None:
        check_share("sparse", "density", self.density)
        for name, value in (("block", self.block), ("queries", self.queries)):
            if type(value) is not int or value < 1:
                raise RecipeError(f"'{name}' of attention's mode 'sparse' is a number of tokens, 1 or more, got {value!r}")

    def attend(self, place: Place) -> Tensor | None:
        found = place.recall(self)
        if found is None or found[0] != _kind(place.call):
            return None
        blocks = found[1]
        return place.compute(place.call) if blocks is None else torch.stack([self._head(place, *one) for one in enumerate(blocks)], 1)

    def keep(self, place: Place, output: Tensor) -> None:
        del output
        call = place.call
        if call.over_pairs:
            return
        query, key = call.query, call.key
        if self.density == 1:
            place.keep(self, lambda: (_kind(call), None))
            return
        place.multiplied += query[..., 0].numel() * key.shape[2] * query.shape[3]
        place.keep(self, lambda: (_kind(call), heaviest(masses(call, *self.sizes(call)), self.density)))

    def sizes(self, call: AttentionCall) -> tuple[int, int]:
        """Queries of a group, and keys of a block, of this call."""
        return max(min(self.queries, call.query.shape[2] // LEAST), 1), max(min(self.block, call.key.shape[2] // LEAST), 1)

    def _head(self, place: Place, head: int, blocks: Tensor) -> Tensor:
        """Attention of one head, ``[batch, queries, head]``, to blocks ``[batch, groups, chosen]``."""
        call, (rows, size) = place.call, self.sizes(place.call)
        query, key, value = _blocks(call.query[:, head], rows), _blocks(call.key[:, head], size), _blocks(call.value[:, head], size)
        bias = _bias(call, head, size)
        batch, _, chosen = blocks.shape
        at_once = max(GATHERED // (batch * chosen * key[0, 0].numel()), 1)
        items, parts = torch.arange(batch, device=blocks.device)[:, None, None], []
        for some, part in zip(blocks.split(at_once, 1), query.split(at_once, 1), strict=True):
            keys, values = (one[items, some].flatten(2, 3).flatten(0, 1)[:, None] for one in (key, value))
            mask = None if bias is None else bias[items if len(bias) > 1 else 0, some].flatten(2).flatten(0, 1)[:, None, None]
            parts.append(
                place.compute(AttentionCall(part.flatten(0, 1)[:, None], keys, values, call.scale, mask)).unflatten(0, (batch, -1))
            )
        return torch.cat(parts, 1)[:, :, 0].flatten(1, 2)[:, : call.query.shape[2]]


def _kind(call: AttentionCall) -> tuple[object, ...]:
    return call.query.shape, call.key.shape, call.query.device


def _blocks(tokens: Tensor, size: int) -> Tensor:
    """``[batch, tokens, head]`` as ``[batch, blocks, size, head]``; zeros fill the last block."""
    return F.pad(tokens, (0, 0, 0, -tokens.shape[1] % size)).unflatten(1, (-1, size))


def _bias(call: AttentionCall, head: int, size: int) -> Tensor | None:
    """What is added to the scores of keys, ``[1 or batch, blocks, size]``: that of the mask, and minus infinity where there is no key."""
    keys = call.key.shape[2]
    given = key_bias(call.mask)
    if given is None and keys % size == 0:
        return None
    own = torch.zeros(1, keys, device=call.key.device) if given is None else given[:, head if given.shape[1] > 1 else 0]
    return F.pad(own, (0, -keys % size), value=-torch.inf).unflatten(1, (-1, size)).to(call.query.dtype)


def masses(call: AttentionCall, rows: int, block: int) -> Tensor:
    """The weights of attention summed over blocks of keys, the mean over a group of queries.

    Args:
        rows: queries of a group.
        block: keys of a block.

    Returns:
        ``[batch, heads, groups, blocks]`` float32; the last axis sums to 1.
    """
    query, key, scale = call.query.float(), call.key.float(), call.query.shape[3] ** -0.5 if call.scale is None else call.scale
    bias, found = key_bias(call.mask), []
    for group in query.split(rows, 2):
        mean = sum(_weights(some, key, scale, bias).sum(2) for some in group.split(AT_ONCE, 2)) / group.shape[2]
        found.append(F.pad(mean, (0, -key.shape[2] % block)).unflatten(2, (-1, block)).sum(3))
    return torch.stack(found, 2)


def _weights(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    scores = query @ key.mT * scale
    return (scores if bias is None else scores + bias[:, :, None]).softmax(-1)


def heaviest(mass: Tensor, density: float) -> list[Tensor]:
    """The blocks of keys that stay: of every head ``[batch, query blocks, chosen]``, one at least.

    Args:
        mass: see :func:`masses`.
        density: the share of all blocks of all heads that stays.
    """
    sorted_, order = mass.sort(-1, descending=True)
    gains = sorted_.mean((0, 2))  # [heads, key blocks]: the weight that a head gains with one more block
    heads, blocks = gains.shape
    rest = gains[:, 1:].flatten().argsort(descending=True)[: max(round(density * heads * blocks) - heads, 0)]
    counts = 1 + torch.bincount(rest // max(blocks - 1, 1), minlength=heads)
    return [order[:, head, :, :count] for head, count in enumerate(counts.tolist())]
