"""SCOPES: the parts of a denoiser that are reconstructed one after the other, as module paths in execution order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reelquant.sites import DenoiserMap, Layer


def each_layer(map_: DenoiserMap) -> Sequence[str]:
    """Every layer by itself."""
    return list(map_.layers)


def blocks(map_: DenoiserMap) -> Sequence[str]:
    """The blocks of the denoiser."""
    return map_.blocks


def whole(map_: DenoiserMap) -> Sequence[str]:
    """The denoiser itself."""
    del map_
    return [""]


def temporal_modules(map_: DenoiserMap) -> Sequence[str]:
    """The largest modules all of whose layers follow the timestep alone. The denoiser itself does not count."""
    layers = list(map_.layers.values())
    found = (_temporal_above(layer.name, layers) for layer in layers if layer.role == "temporal")
    return list(dict.fromkeys(found))


def _temporal_above(name: str, layers: Sequence[Layer]) -> str:
    """The largest module around a temporal layer that holds no other layers."""
    words = name.split(".")
    for count in range(1, len(words)):
        path = ".".join(words[:count])
        if all(layer.role == "temporal" for layer in layers if layer.name.startswith(f"{path}.")):
            return path
    return name


WHOLE = "model"
SCOPES: dict[str, Callable[[DenoiserMap], Sequence[str]]] = {
    "layer": each_layer,
    "block": blocks,
    "temporal": temporal_modules,
    WHOLE: whole,
}
"""Name in recipes -> the parts."""
