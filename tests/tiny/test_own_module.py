"""Modules without a pipeline: their arguments are told by real calls, they are quantized by every recipe, saved and opened again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reelquant
from reelquant import CheckpointError, Denoiser, UnsupportedError
from reelquant.discover.arguments import own_kinds
from reelquant.nn import quantized_layers
from reelquant.sites import Role
from tests.tiny.own import Nameless, OwnDiT, decode, sampler

PROMPTS = ["a red ball", "a blue box moves left", "a box", "a red box moves right"]
SMALL = {"calibrate.prompts": 2, "search.prompts": 2}


def latents(module: nn.Module, prompt: str = "a blue ball") -> Tensor:
    with torch.no_grad():
        return sampler(module, prompt, torch.Generator().manual_seed(5))


def roles(own: Denoiser) -> dict[str, Role]:
    return {name: row.layer.role for name, row in reelquant.plan(own, "w8a16").layers.items()}


@pytest.fixture(scope="module")
def quantized() -> tuple[Denoiser, Any]:
    own = Denoiser(OwnDiT(), sampler)
    return own, reelquant.quantize(own, "qvd-w8a8", PROMPTS, overrides=SMALL)


@pytest.fixture(scope="module")
def folder(quantized: tuple[Denoiser, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reelquant.save(quantized[0], tmp_path_factory.mktemp("own") / "out", quantized[1])


def test_it_is_calibrated_over_the_steps_of_its_sampler(quantized: tuple[Denoiser, Any]) -> None:
    own, report = quantized
    assert report.denoiser == "OwnDiT" and report.timesteps == [1000.0, 750.0, 500.0, 250.0]
    assert report.latent_psnr is not None and 25 < report.latent_psnr < 100
    assert len(report.prompts) >= 2 and report.held_out
    found = latents(own.denoiser)
    assert found.isfinite().all() and not torch.equal(found, latents(OwnDiT()))


def test_saved_and_loaded_into_a_fresh_module_it_gives_the_same_bits(quantized: tuple[Denoiser, Any], folder: Path) -> None:
    fresh = OwnDiT(seed=1)
    assert reelquant.load_denoiser(folder, fresh) is fresh
    assert torch.equal(latents(fresh), latents(quantized[0].denoiser))
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_a_module_without_weights_is_filled(quantized: tuple[Denoiser, Any], folder: Path) -> None:
    with torch.device("meta"):
        blank = OwnDiT()
    blank.register_buffer("places", torch.empty(1, 32, 32))
    assert torch.equal(latents(reelquant.load_denoiser(folder, blank)), latents(quantized[0].denoiser))


def test_saved_again_it_has_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = reelquant.save(Denoiser(reelquant.load_denoiser(folder, OwnDiT(seed=1)), sampler), tmp_path / "again")
    for name in ("denoiser.json", "denoiser.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def with_frames(module: Any, prompt: str, generator: torch.Generator) -> Tensor:
    return sampler(lambda z, idx, c: module(z, idx, c, 2), prompt, generator)


NAMELESS = {"z": "latent", "idx": "timestep", "c": "prompt"}


@pytest.mark.parametrize(
    ("kind", "loop", "expected"),
    [(OwnDiT, sampler, {"y": "prompt"}), (Nameless, sampler, NAMELESS), (Nameless, with_frames, NAMELESS | {"t": "other"})],
)
def test_arguments_are_told_by_names_and_by_calls(kind: Any, loop: Any, expected: dict[str, str]) -> None:
    own = Denoiser(kind(), loop)
    found = roles(own)
    assert own_kinds(own.denoiser) == expected
    assert found["time.0"] == found["blocks.0.modulation"] == "temporal"
    assert found["blocks.1.kv"] == "prompt"
    assert found["blocks.0.qkv"] == "main" and found["embed"] == "entry" and found["head"] == "exit"


@pytest.mark.parametrize("recipe", ["w8a16", "minmax-w8a8", "minmax-w4a8"])
def test_other_recipes_and_names(recipe: str, tmp_path: Path) -> None:
    own = Denoiser(Nameless(), sampler)
    report = reelquant.quantize(own, recipe, PROMPTS, overrides={} if recipe == "w8a16" else SMALL)
    assert len(report.layers) > 8
    fresh = reelquant.load_denoiser(reelquant.save(own, tmp_path / "out", report), Nameless(seed=3))
    assert torch.equal(latents(fresh), latents(own.denoiser))


class WithGuidance(OwnDiT):
    """As DiT and Latte: a method beside forward that calls it."""

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.forward(x, t, y)


def guided(module: Any, prompt: str, generator: torch.Generator) -> Tensor:
    return sampler(module.forward_with_cfg, prompt, generator)


def test_calls_of_forward_are_seen(tmp_path: Path) -> None:
    own = Denoiser(WithGuidance(), guided)
    report = reelquant.quantize(own, "qvd-w8a8", PROMPTS, overrides=SMALL)
    assert len(report.timesteps) == 4 and report.denoiser == "WithGuidance" and isinstance(own.denoiser, WithGuidance)
    fresh = reelquant.load_denoiser(reelquant.save(own, tmp_path / "out"), WithGuidance(seed=2))
    clips = [guided(module, "a box", torch.Generator().manual_seed(1)) for module in (own.denoiser, fresh, copy.deepcopy(fresh))]
    assert torch.equal(clips[0], clips[1]) and torch.equal(clips[0], clips[2])
    assert torch.equal(clips[0], sampler(own.denoiser, "a box", torch.Generator().manual_seed(1)))  # hooks count once


def test_a_module_that_is_called_as_it_should_be_keeps_its_class(quantized: tuple[Denoiser, Any]) -> None:
    assert type(quantized[0].denoiser) is OwnDiT


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # what torch.compile imports
def test_a_compiled_module_is_looked_into() -> None:
    module: Any = torch.compile(OwnDiT())  # its calls run eagerly while they are looked at
    report = reelquant.quantize(Denoiser(module, sampler), "w8a16")
    assert quantized_layers(module._orig_mod) and report.denoiser == "OwnDiT"


def test_saturation_is_counted(quantized: tuple[Denoiser, Any]) -> None:
    with reelquant.saturation(quantized[0]) as seen:
        latents(quantized[0].denoiser)
    assert seen.layers and seen.excess < 10


def test_clips_are_evaluated(quantized: tuple[Denoiser, Any]) -> None:
    test, reference = (Denoiser(module, sampler, decode=decode) for module in (quantized[0].denoiser, OwnDiT()))
    found = reelquant.evaluate(test, reference, PROMPTS, clips=2, metrics=["psnr"], floor=["none"], num_inference_steps=3)
    psnr = found["psnr"]
    assert psnr is not None and 20 < psnr < 100


def by_class(module: Any, generator: torch.Generator, class_labels: int) -> Tensor:
    latent = torch.randn(1, 4, 2, 8, 8, generator=generator)
    for t in (3, 2, 1):
        latent = latent - module(latent, torch.tensor([t]), torch.tensor([class_labels])) / 3
    return latent


class Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = OwnDiT(), nn.Embedding(4, 16)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        return self.inner(x, timesteps, self.table(y)[:, None])


def test_labels_are_conditions() -> None:
    own = Denoiser(Classes(), by_class)
    assert reelquant.plan(own, "minmax-w8a8", class_labels=[0, 1]).map.prompt_argument == "y"
    report = reelquant.quantize(own, "minmax-w8a8", overrides=SMALL, class_labels=[0, 1, 2, 3])
    assert own_kinds(own.denoiser) == {"y": "prompt"} and report.latent_psnr is not None and report.latent_psnr > 20
    with pytest.raises(reelquant.CalibrationError, match="needs 'class_labels' for every clip"):
        reelquant.quantize(Denoiser(Classes(), by_class), "minmax-w8a8", overrides=SMALL)


# ------------------------------------------------------------------------------------------------------------------ what is refused
def timeless(module: Any, prompt: str, generator: torch.Generator) -> Tensor:
    latent = torch.randn(1, 4, 2, 8, 8, generator=generator)
    for _ in range(3):
        latent = latent - module(latent, torch.tensor([5.0]), torch.randn(1, 8, 16, generator=generator))
    return latent


class Strange(OwnDiT):
    def forward(self, x: Tensor, level: Tensor, y: Tensor) -> Tensor:
        return self.predict(x, level, y)


def nothing(module: Any, generator: torch.Generator) -> None:
    sampler(module, "", generator, steps=2)


def another(module: Any, prompt: str, generator: torch.Generator) -> Tensor:
    return sampler(OwnDiT(), prompt, generator)


@contextmanager
def refused(match: str, error: type[Exception] = UnsupportedError) -> Iterator[None]:
    with pytest.raises(error, match=match):
        yield


def test_no_timestep_is_one_sentence() -> None:
    module = Strange()
    with refused(
        r"no argument of Strange.forward looks like the timestep: .* level \[1\] float32 \(stays\); .*arguments={'NAME': 'timestep'}"
    ):
        reelquant.quantize(Denoiser(module, timeless), "minmax-w8a8", PROMPTS, overrides=SMALL)
    assert not quantized_layers(module)
    told = Denoiser(module, timeless, arguments={"level": "timestep"})
    assert reelquant.quantize(told, "minmax-w8a8", PROMPTS, overrides=SMALL).timesteps == [5.0]


def test_what_cannot_be_taken_is_one_sentence() -> None:
    with refused("never called OwnDiT as module"):
        reelquant.quantize(Denoiser(OwnDiT(), another), "w8a16", PROMPTS)
    with refused("OwnDiT.forward has no argument 'idx'"):
        Denoiser(OwnDiT(), sampler, arguments={"idx": "timestep"})
    with refused("arguments\\['t'\\] is 'time'"):
        Denoiser(OwnDiT(), sampler, arguments={"t": "time"})
    with refused("takes module, prompt and no generator"):
        Denoiser(OwnDiT(), lambda module, prompt: None)
    with refused("the sampler returns NoneType", reelquant.CalibrationError):
        reelquant.quantize(Denoiser(OwnDiT(), nothing), "w8a16")
    with refused("takes no argument 'stesp'"):
        reelquant.quantize(Denoiser(OwnDiT(), sampler), "minmax-w8a8", PROMPTS, stesp=3)
    with refused("nothing is quantized|has no quantized layers"):
        reelquant.save(Denoiser(OwnDiT(), sampler), "/nonexistent/out")


def test_another_architecture_is_refused_and_left_as_it_was(folder: Path) -> None:
    other = OwnDiT(seed=2)
    other.blocks.append(copy.deepcopy(other.blocks[0]))
    before = latents(other)
    with refused("this OwnDiT has, but the folder lacks, 1. tensors", CheckpointError):
        reelquant.load_denoiser(folder, other)
    assert torch.equal(latents(other), before)


def test_the_example_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "own-modules.md").read_text(encoding="utf-8")
    code = "\n".join(part.split("```")[0] for part in text.split("```python\n")[1:])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "own-modules.md", "exec"), names)
    assert (tmp_path / "out" / "denoiser.safetensors").is_file() and torch.equal(names["one"], names["other"])


def test_damage_is_refused(folder: Path, tmp_path: Path) -> None:
    found = reelquant.verify(folder)
    assert found.files == 2 and found.layers == len(quantized_layers(reelquant.load_denoiser(folder, OwnDiT())))
    import shutil

    for name in ("denoiser.json", "denoiser.safetensors"):
        bad = shutil.copytree(folder, tmp_path / name)
        data = bytearray((bad / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bad / name).write_bytes(data)
        fresh = OwnDiT(seed=1)
        with refused("is not what was written", CheckpointError):
            reelquant.load_denoiser(bad, fresh)
        with refused("is not what was written", CheckpointError):
            reelquant.verify(bad)
        assert not quantized_layers(fresh)
    with refused("already exists", CheckpointError):
        reelquant.save(Denoiser(reelquant.load_denoiser(folder, OwnDiT()), sampler), folder)
