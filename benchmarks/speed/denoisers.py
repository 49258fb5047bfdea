"""Denoisers of real video pipelines cut to one core's size: true widths, few layers, short clips, random weights.

What a layer costs depends on its shape, not on its values, so the time of one call is real per layer; errors are only a check that a
variant computes the same function. Recipes are the library's own, run by ``reelquant.quantize`` on a stand-in pipeline.

    python -m benchmarks.speed.denoisers          # what there is, with sizes
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import LAYERS, markdown
from reelquant.recipes.recipe import Recipe, load_recipe

SEED = 7
TIMESTEPS = (900.0, 300.0)
CLIPS = 2  # calibration runs: ranges that look at how far runs differ need two
GATES = ("*scale_shift_table", "*norm*.linear.bias")  # of adaptive norms; trained ones are far from zero
Arguments = dict[str, Any]


# --- calls ----------------------------------------------------------------------------------------------------------------------------


def _wan(text: int) -> Callable[[Tensor, Tensor, nn.Module], Arguments]:
    def call(latent: Tensor, timestep: Tensor, denoiser: nn.Module) -> Arguments:
        prompt = noise(1, text, denoiser.config.text_dim, seed=1)
        return {"hidden_states": latent, "timestep": timestep.long(), "encoder_hidden_states": prompt}

    return call


def _cogvideox(latent: Tensor, timestep: Tensor, denoiser: nn.Module) -> Arguments:
    config = denoiser.config
    prompt = noise(1, config.max_text_seq_length, config.text_embed_dim, seed=1)
    tokens = latent.shape[1] * (latent.shape[3] // config.patch_size) * (latent.shape[4] // config.patch_size)
    angles = noise(tokens, config.attention_head_dim, seed=2)
    return {
        "hidden_states": latent, "timestep": timestep.long(), "encoder_hidden_states": prompt,
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }  # fmt: skip


def _hunyuan(latent: Tensor, timestep: Tensor, denoiser: nn.Module) -> Arguments:
    config, tokens = denoiser.config, 64
    return {
        "hidden_states": latent, "timestep": timestep.long(), "encoder_hidden_states": noise(1, tokens, config.text_embed_dim, seed=1),
        "encoder_attention_mask": torch.ones(1, tokens, dtype=torch.bool),
        "pooled_projections": noise(1, config.pooled_projection_dim, seed=2), "guidance": torch.tensor([6000.0]),
    }  # fmt: skip


def _unet(latent: Tensor, timestep: Tensor, denoiser: nn.Module) -> Arguments:
    prompt = noise(1, 77, denoiser.config.cross_attention_dim, seed=1)
    return {"sample": latent, "timestep": timestep, "encoder_hidden_states": prompt}


def _animatediff(latent: Tensor, timestep: Tensor, denoiser: nn.Module) -> Arguments:
    given = _unet(latent, timestep, denoiser)
    return given | {"encoder_hidden_states": given["encoder_hidden_states"].repeat(latent.shape[2], 1, 1)}  # once per frame


def _svd(latent: Tensor, timestep: Tensor, denoiser: nn.Module) -> Arguments:
    picture = noise(*latent.shape, seed=3)  # the conditioning frame, beside the latent
    return {
        "sample": torch.cat([latent, picture], 2), "timestep": timestep,
        "encoder_hidden_states": noise(1, 1, denoiser.config.cross_attention_dim, seed=1),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
    }  # fmt: skip


def noise(*shape: int, seed: int) -> Tensor:
    """The same normal numbers for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the table ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Denoiser:
    """One denoiser to time.

    Attributes:
        cls: its class in diffusers.
        config: what differs from the class's defaults; widths are those of the published checkpoint.
        latent: shape of the latent, in the order the class wants.
        call: arguments of one call, in float32, from a latent and a timestep.
        channels_last: convolutions decide its speed, and those want channels last.
        reduced: what is smaller than in the checkpoint.
    """

    cls: str
    config: dict[str, Any]
    latent: tuple[int, ...]
    call: Callable[[Tensor, Tensor, nn.Module], Arguments]
    reduced: str
    channels_last: bool = False

    def inputs(self, denoiser: nn.Module, dtype: torch.dtype, timestep: float = TIMESTEPS[0], latent: Tensor | None = None) -> Arguments:
        """Keyword arguments of one call; timesteps and masks keep their type."""
        latent = noise(*self.latent, seed=0) if latent is None else latent
        return _cast(self.call(latent, torch.tensor([timestep]), denoiser), dtype) | {"return_dict": False}

    def make(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """With random weights, the same ones every time; made in this dtype, so that a float32 copy is never held.

        Zero-initialised layers get small weights and gates large ones, or whole branches would be dead and no error could be seen.
        """
        import diffusers

        torch.manual_seed(SEED)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            denoiser = getattr(diffusers, self.cls)(**self.config).eval()
        finally:
            torch.set_default_dtype(usual)
        for seed, (name, parameter) in enumerate(denoiser.named_parameters()):
            gate = any(fnmatch(name, pattern) for pattern in GATES)
            if gate or not bool(parameter.any()):
                parameter.data = (noise(*parameter.shape, seed=seed) * (0.5 if gate else 0.02)).to(parameter.dtype)
        return denoiser


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: item if key == "timestep" else _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_cast(item, torch.float32) for item in value)  # rotary angles stay float32, as in the pipelines
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _levels(kind: str, plain: str, count: int = 2) -> dict[str, tuple[str, ...]]:
    """Down and up blocks of a UNet of so many levels, all but the deepest with attention."""
    return {
        "down_block_types": (*[f"{kind.format('Down')}"] * (count - 1), plain.format("Down")),
        "up_block_types": (plain.format("Up"), *[f"{kind.format('Up')}"] * (count - 1)),
    }


_SMALL = {"block_out_channels": (320, 640), "layers_per_block": 1}
DENOISERS: dict[str, Denoiser] = {
    "wan-1.3b": Denoiser(
        "WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 2}, (1, 16, 13, 20, 30), _wan(512),
        "2 of 30 layers, 1950 of 32760 tokens",
    ),
    "wan-1.3b-deep": Denoiser(
        "WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, (1, 16, 5, 30, 40), _wan(512),
        "all 30 layers, 1500 of 32760 tokens",
    ),
    "wan-14b": Denoiser(
        "WanTransformer3DModel", {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 1}, (1, 16, 5, 20, 20), _wan(256),
        "1 of 40 layers, 500 of 32760 tokens",
    ),
    "wan-14b-deep": Denoiser(
        "WanTransformer3DModel", {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 10}, (1, 16, 5, 20, 20), _wan(256),
        "10 of 40 layers, 500 of 32760 tokens",
    ),
    "cogvideox-5b": Denoiser(
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 1, "use_rotary_positional_embeddings": True}, (1, 5, 16, 30, 40), _cogvideox,
        "1 of 42 layers, 1726 of 17776 tokens",
    ),
    "cogvideox-5b-deep": Denoiser(
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 16, "use_rotary_positional_embeddings": True}, (1, 5, 16, 20, 20), _cogvideox,
        "16 of 42 layers, 726 of 17776 tokens",
    ),
    "hunyuanvideo": Denoiser(
        "HunyuanVideoTransformer3DModel", {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}, (1, 16, 4, 30, 40),
        _hunyuan, "1 + 1 of 20 + 40 layers, 1264 of 118800 tokens",
    ),
    "animatediff": Denoiser(
        "UNetMotionModel",
        {**_SMALL, "cross_attention_dim": 768, **_levels("CrossAttn{}BlockMotion", "{}BlockMotion")}, (1, 4, 8, 24, 24), _animatediff,
        "2 of 4 levels, 1 of 2 layers a block, 8 of 16 frames of 192x192 instead of 512x512", channels_last=True,
    ),
    "svd": Denoiser(
        "UNetSpatioTemporalConditionModel",
        {**_SMALL, "num_attention_heads": (5, 10), "num_frames": 6, **_levels("CrossAttn{}BlockSpatioTemporal", "{}BlockSpatioTemporal")},
        (1, 6, 4, 32, 32), _svd, "2 of 4 levels, 1 of 2 layers a block, 6 of 14 frames of 256x256 instead of 576x1024",
        channels_last=True,
    ),
    "unet3d": Denoiser(
        "UNet3DConditionModel", {**_SMALL, **_levels("CrossAttn{}Block3D", "{}Block3D")}, (1, 4, 8, 24, 24), _unet,
        "2 of 4 levels, 1 of 2 layers a block, 8 of 16 frames of 192x192", channels_last=True,
    ),
}  # fmt: skip


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A float or quantized denoiser from where :class:`Subject` keeps it, as a user would load it."""
    import diffusers

    import reelquant  # noqa: F401  # registers the quantized checkpoints with diffusers

    kind = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    denoiser = kind.from_pretrained(folder, torch_dtype=dtype).eval()
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        tensor.data = tensor.data.clone()  # or one tensor that was not cast keeps the whole float32 file mapped, and counted as memory
    return denoiser


def channels_last(denoiser: nn.Module) -> nn.Module:
    """Weights of 2-D and 3-D convolutions channels-last: their outputs follow, and oneDNN need not reorder."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for module in denoiser.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, LAYERS) and weight is not None and weight.is_floating_point() and weight.ndim in formats:
            weight.data = weight.data.contiguous(memory_format=formats[weight.ndim])
    return denoiser


# --- recipes --------------------------------------------------------------------------------------------------------------------------


class Sampler:
    """The least that ``reelquant.quantize`` asks of a pipeline: an Euler sampler around a denoiser."""

    def __init__(self, spec: Denoiser, denoiser: nn.Module) -> None:
        self.spec = spec
        self.components = {"denoiser": denoiser}
        self.config: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        """Components are attributes of a pipeline."""
        try:
            return self.__dict__["components"][name]
        except KeyError:
            raise AttributeError(name) from None

    def set_progress_bar_config(self, **options: Any) -> None:
        """There is none."""

    def __call__(
        self, prompt: list[str], generator: list[torch.Generator], output_type: str = "latent", num_inference_steps: int = len(TIMESTEPS)
    ) -> Any:
        """A clip per generator; the text is not looked at."""
        return SimpleNamespace(frames=torch.cat([self._clip(one) for one in generator]))

    def _clip(self, generator: torch.Generator) -> Tensor:
        latent = torch.randn(self.spec.latent, generator=generator)
        denoiser = self.components["denoiser"]
        for timestep in TIMESTEPS:
            latent = latent - denoiser(**self.spec.inputs(denoiser, torch.float32, timestep, latent))[0] / len(TIMESTEPS)
        return latent


def for_speed(name: str) -> Recipe:
    """A recipe whose layers have the form, and so the speed, of the named one's, made quickly.

    Weights are rounded to nearest instead of solved, of values to choose from the middle one is taken, and two clips calibrate.
    """
    full = load_recipe(name).model_dump(mode="json", exclude_unset=True)
    steps = [_quick(step) for step in full.get("steps", [])]
    calibrate = full.get("calibrate") and {**full["calibrate"], "prompts": CLIPS, "steps": len(TIMESTEPS)}
    return load_recipe({**full, "steps": steps, "calibrate": calibrate, "search": {"prompts": 1, "steps": len(TIMESTEPS)}})


def _quick(step: dict[str, Any]) -> dict[str, Any]:
    if step.get("solve"):
        return {key: value for key, value in step.items() if key in ("on", "correct_bias")} | {"solve": "nearest"}
    return {key: value[len(value) // 2] if isinstance(value, list) else value for key, value in step.items()}


@dataclass
class Subject:
    """A denoiser on disk, float and quantized: written once, and loaded by every process for every variant.

    Attributes:
        name: of :data:`DENOISERS`.
        folder: where checkpoints are kept; they can be deleted at any time.
    """

    name: str
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> Denoiser:
        return DENOISERS[self.name]

    @property
    def home(self) -> Path:
        return self.folder / self.name

    def load(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The float denoiser."""
        if not (self.home / "float" / "config.json").is_file():
            self.spec.make().save_pretrained(self.home / "float")
        denoiser = load(self.home / "float", dtype)
        return channels_last(denoiser) if self.spec.channels_last else denoiser

    def quantized(self, recipe: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """Quantized by a recipe of the library, in the form of :func:`for_speed`."""
        folder = self.quantize(recipe)
        self.facts = json.loads((folder / "facts.json").read_text())
        denoiser = load(folder, dtype)
        return channels_last(denoiser) if self.spec.channels_last else denoiser

    def quantize(self, recipe: str) -> Path:
        """Make sure that the checkpoint is there."""
        import reelquant

        chosen = for_speed(recipe)
        folder = self.home / f"{recipe}-{chosen.digest()[:8]}"
        if not (folder / "facts.json").is_file():
            denoiser = self.load()
            with torch.no_grad():
                report = reelquant.quantize(Sampler(self.spec, denoiser), chosen, prompts=["a"] * (CLIPS + 1))
            denoiser.save_pretrained(folder)
            (folder / "facts.json").write_text(json.dumps({"layers": len(report.layers), "latent_psnr": report.latent_psnr}))
        return folder


def size(denoiser: nn.Module) -> int:
    """Parameters."""
    return sum(math.prod(parameter.shape) for parameter in denoiser.parameters())


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = []
    for name, spec in DENOISERS.items():
        with torch.device("meta"):
            import diffusers

            parameters = size(getattr(diffusers, spec.cls)(**spec.config))
        rows.append([name, spec.cls, f"{parameters / 1e6:.0f} M", "x".join(map(str, spec.latent)), spec.reduced])
    print(markdown(["name", "class", "parameters", "latent", "reduced"], rows))


if __name__ == "__main__":
    main()
