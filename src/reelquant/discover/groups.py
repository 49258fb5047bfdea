"""Groups: layers that read the very same tensor, who wrote it, and whether an affine can move into the writer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from reelquant.discover.lineage import Key, Read, Trace, is_norm
from reelquant.sites import Group, Layer


def find_groups(denoiser: nn.Module, layers: dict[str, Layer], trace: Trace) -> tuple[Group, ...]:
    """A partition of the layers that ran, in execution order.

    Layers are together if they read the same tensor in every one of their calls. The identity is taken literally: the prompt that
    all cross-attentions share makes ONE group of all their keys and values, since a transform of that tensor is one transform.
    """
    together: dict[tuple, list[str]] = {}
    for name, reads in trace.reads.items():
        together.setdefault((layers[name].role, *(read.same for read in reads)), []).append(name)
    consumers = _consumers(trace)
    return tuple(_group(denoiser, layers, trace, tuple(names), consumers) for names in together.values())


def _consumers(trace: Trace) -> dict[Key, set[str]]:
    consumers: dict[Key, set[str]] = {}
    for name, reads in trace.reads.items():
        for read in reads:
            consumers.setdefault(read.root, set()).add(name)
    return consumers


def _group(denoiser: nn.Module, layers: dict[str, Layer], trace: Trace, names: tuple[str, ...], consumers: dict[Key, set[str]]) -> Group:
    read = trace.reads[names[0]][0]
    writer = trace.written.get(read.root)
    producer = denoiser.get_submodule(writer.module) if writer else None
    foldable = (
        writer is not None
        and producer is not None
        and is_norm(producer)
        and trace.calls[writer.module] == 1
        and trace.readers[read.root] == 0
        and consumers[read.root] == set(names)
        and all(_takes_affine(denoiser.get_submodule(name)) and len(trace.reads[name]) == 1 for name in names)
        and all(_same_channels(trace.reads[name][0], writer.low, writer.high) for name in names)
    )
    return Group(
        layers=names,
        role=layers[names[0]].role,
        producer=writer.module if writer else None,
        producer_kind=type(producer).__name__ if producer is not None else None,
        foldable=foldable,
        fold_shift=foldable and isinstance(getattr(producer, "bias", None), Tensor),
        seam=_seam(layers[names[0]], read),
    )


def _takes_affine(layer: nn.Module) -> bool:
    """Can weight and bias absorb ``x -> a x + b`` exactly? Zero padding does not follow the shift, groups mix up the channels."""
    if isinstance(layer, nn.Linear):
        return True
    return isinstance(layer, _ConvNd) and layer.groups == 1 and _unpadded(layer)


def _unpadded(layer: _ConvNd) -> bool:
    return layer.padding == "valid" if isinstance(layer.padding, str) else not any(layer.padding)


def _same_channels(read: Read, low: Tensor | None, high: Tensor | None) -> bool:
    if read.low is None or read.high is None or low is None or high is None or read.low.shape != low.shape:
        return False
    # rounding is monotone, so a cast in between keeps the extremes
    return bool((low.to(read.low) == read.low).all() and (high.to(read.high) == read.high).all())


def _seam(layer: Layer, read: Read) -> int | None:
    """Only a joint along the channels of something that follows the latent is a seam; joined tokens or embeddings are not."""
    if read.seam is None or "latent" not in layer.depends:
        return None
    axis, channel = read.seam
    return channel if axis == layer.channel_axis % len(read.shape) else None
