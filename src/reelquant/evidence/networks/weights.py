"""Finding and loading the published weights that metrics measure with; nothing here asks the network.

Weights lie in a folder that the user names or in a cache, which :mod:`~reelquant.evidence.networks.download` fills.
Every number that is loaded is checked against a pinned digest: an FVD on other weights than the published ones compares
with no other FVD.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from reelquant._cache import cache_folder
from reelquant._errors import CheckpointError
from reelquant.evidence.networks.published import WEIGHTS, Weights, command, missing, of
from reelquant.evidence.networks.readers import Tensors


def cache() -> Path:
    """The folder of downloaded weights, in the user's cache."""
    return cache_folder() / "weights"


def check_place(folder: str | Path | None, example: str = "lpips_alex.safetensors") -> None:
    """Refuse a folder of weights that is not there.

    Raises:
        CheckpointError: naming a file that it could hold.
    """
    if folder is not None and not Path(folder).is_dir():
        raise CheckpointError(f"no folder of weights at '{folder}'; name one that holds e.g. '{example}', or leave it out")


def find(name: str, folder: str | Path | None = None) -> Path | None:
    """The weights' file in ``folder``, else in the cache; never asks the network.

    Raises:
        CheckpointError: if a folder is given that does not exist.
        RecipeError: for an unknown name.
    """
    weights = of(name)
    check_place(folder, weights.files[-1])
    for place in ([Path(folder)] if folder is not None else []) + [cache()]:
        for file in weights.files:
            if (place / file).is_file():
                return place / file
    return None


def sha256(file: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(tensors: Tensors) -> str:
    """A sha256 of names, shapes and numbers, independent of the order and the format in which they are stored."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        whole.update(value.numpy().tobytes())
    return whole.hexdigest()


def read(name: str, file: str | Path) -> Tensors:
    """The tensors of a weights' file, checked to be the published ones.

    Raises:
        CheckpointError: if the file is broken, is an archive whose sha256 is not the pinned one, has missing, foreign,
            misshaped or NaN tensors, or holds other numbers than the published.
    """
    weights, file = of(name), Path(file)
    tensors = _open(weights, file)
    check(weights, file, tensors)
    if digest(tensors) != weights.digest:
        raise _wrong(
            weights,
            file,
            "has the right tensors with other numbers than the published ones, so nothing measured with it would compare",
        )
    return tensors


def whole(name: str, file: Path) -> bool:
    """Whether a file has the header that its weights have; :func:`read` looks at the numbers, too, and takes seconds."""
    if file.suffix != ".safetensors":
        return True  # an archive is hashed before it is opened
    try:
        with safe_open(file, "pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError):
        return False
    return shapes == {key: tuple(value.shape) for key, value in _skeleton(name)[1].items()}


def _wrong(weights: Weights, file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"'{file}' {what}; it should be {weights.about}; delete it and get it again with: {command(weights.name)}")


def _open(weights: Weights, file: Path) -> Tensors:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise _wrong(weights, file, f"is not a complete safetensors file ({error})") from error
    found = sha256(file)  # before it is opened: this format can carry code
    if found != weights.member_sha256:
        raise _wrong(weights, file, f"has the sha256 {found}, and only {weights.member_sha256} is opened")
    return weights.read(file)


def _few(names: set[str]) -> str:
    return ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check(weights: Weights, file: Path, tensors: Tensors) -> None:
    """Compare names, shapes and finiteness with what the network needs.

    Raises:
        CheckpointError: naming the tensors that are missing, unknown, misshaped or not finite.
    """
    wanted = {name: tuple(value.shape) for name, value in _skeleton(weights.name)[1].items()}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    problems = {
        "lacks": wanted.keys() - shapes.keys(),
        "has tensors that the network does not know:": shapes.keys() - wanted.keys(),
        "has misshaped tensors:": {
            f"{name} {shapes[name]} for {wanted[name]}" for name in wanted.keys() & shapes.keys() if shapes[name] != wanted[name]
        },
        "has NaN or infinite numbers in": {name for name, value in tensors.items() if not value.isfinite().all()},
    }
    for what, names in problems.items():
        if names:
            raise _wrong(weights, file, f"{what} {_few(names)}")


def _skeleton(name: str) -> tuple[nn.Module, Tensors]:
    """The network on the meta device, and its state by the names of the weights' file."""
    with torch.device("meta"):
        network = of(name).network()
    return network, {network.key(own): value for own, value in network.state_dict().items()}


def load(name: str, folder: str | Path | None = None) -> nn.Module:
    """The network with its published weights, float32 on the CPU, in evaluation mode; cached by file.

    Args:
        name: of :data:`WEIGHTS`.
        folder: looked in before the cache.

    Raises:
        CheckpointError: if the weights are nowhere, or are not the published ones.
        RecipeError: for an unknown name.
    """
    file = find(name, folder)
    if file is None:
        raise CheckpointError(f"no weights '{name}' in {f'{folder} or ' if folder else ''}{cache()}: it {missing(name)}")
    return _load(name, file.resolve(), file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=len(WEIGHTS))
def _load(name: str, file: Path, changed: int) -> nn.Module:
    del changed  # only there so that a file which was replaced is read again
    tensors = read(name, file)
    network, _ = _skeleton(name)
    network.load_state_dict({own: tensors[network.key(own)] for own in network.state_dict()}, assign=True)
    return network.eval().requires_grad_(False)
