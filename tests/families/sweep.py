"""Every denoiser class of the installed diffusers that has no row in the matrix: tiny random configurations, quantized while loading.

Configurations are made from the signature of the class: whatever is a size is drawn small, by its name (``SIZES``); classes whose sizes
must fit each other say so in ``FITTING``.
"""

from __future__ import annotations

import inspect
import random
import re
import tempfile
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import nn

from reelquant import ReelQuantConfig, UnsupportedError
from reelquant.discover import discover, dummy_inputs
from reelquant.discover.components import denoises
from reelquant.discover.probe import quantizable, tensors_in
from reelquant.nn import quantized_layers
from tests.families.models import FAMILIES, awake
from tests.tiny.configs import build

HEADS, HEAD = 2, 16
WIDTHS = r"^(dim|hidden_size|model_dim|dit_dim|embed_dim|caption_projection_dim|model_channels|time_embed_hidden_dim)$"
SIZES: tuple[tuple[str, Any], ...] = (
    (r"_types$|patch_size|^rope_scale|^vae_scale|causal|multiplier|scale_factor|^freq_shift|theta$|^mlp_acts$", None),
    (r"block_out_channels", lambda rng, old: tuple(16 * 2 ** min(i, 1) for i in range(len(old)))),
    (r"(in|out|io|latent)_channels|(in|out)_visual_dim|latent_dim", lambda rng, old: 4 if old < 64 else 8),
    (r"channel_sizes", None),
    (r"num_groups$|^groups$", lambda rng, old: 4),
    (r"kv_heads|key_value", lambda rng, old: HEADS),
    (r"heads$", lambda rng, old: HEADS),
    (r"head_dim$|dim_head$", lambda rng, old: HEAD),
    (WIDTHS, lambda rng, old: HEADS * HEAD),
    (r"^(rope_axes_dim|axes_dims_rope|axes_dims?|axes_dim_rope|rope_dim|rope_dim_list)$", lambda rng, old: AXES[len(old)]),
    (r"layers(?!_per)|depth|blocks$|^num_.*blocks", lambda rng, old: rng.choice((1, 2)) if isinstance(old, int) else None),
    (r"sample_(size|width|height)|image_size", lambda rng, old: 8),
    (r"sample_frames", lambda rng, old: 9),
    (r"max_position|vocab|axes_lens|max_seq_len|max_size|pos_embed_max|seq_len|text_len|max_text", None),
    (r"dim|channels|_size$|inner|hidden", lambda rng, old: rng.choice((8, 16, 24)) if isinstance(old, int) and old > 24 else None),
)  # fmt: skip
"""Pattern of a parameter's name -> how it is drawn, given its default; first match wins, ``None`` keeps the default."""

AXES = {2: (8, 8), 3: (4, 6, 6), 4: (4, 4, 4, 4)}

_UNET: dict[str, Any] = {"attention_head_dim": 8, "cross_attention_dim": 16, "norm_num_groups": 4, "layers_per_block": 1}
_WAN_IMAGE = {"in_channels": 12, "latent_channels": 4, "out_channels": 4, "image_dim": 16, "added_kv_proj_dim": 32}
FITTING: dict[str, dict[str, Any]] = {
    "AudioLDM2UNet2DConditionModel": _UNET | {"block_out_channels": (16, 16, 32, 32)},
    "DreamLiteTransformer2DModel": {"in_channels": 16, "cross_attention_dim": 16, "norm_num_groups": 4},
    "DreamLiteUNetModel": _UNET | {"block_out_channels": (16, 16, 32)},
    "EasyAnimateTransformer3DModel": {"in_channels": 4, "out_channels": 4, "patch_size": 2, "mmdit_layers": 2, "num_layers": 2},
    "HiDreamImageTransformer2DModel": {"patch_size": 2, "caption_channels": (8, 8), "llama_layers": (0, 1), "axes_dims_rope": (8, 8)},
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "num_layers": 2, "text_len": 6, "text_len_t5": 6},
    "Kandinsky3UNet": {"block_out_channels": (16, 32), "groups": 4, "layers_per_block": 1},
    "LuminaNextDiT2DModel": {"num_kv_heads": 2, "multiple_of": 8},
    "NucleusMoEImageTransformer2DModel": {"mlp_ratio": 8},  # the inner width is a multiple of 128
    "OmniGenTransformer2DModel": {
        "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        "vocab_size": 32,
        "pad_token_id": 0,
    },
    "PRXTransformer2DModel": {"axes_dim": (8, 8)},
    "SanaVideoTransformer3DModel": {"cross_attention_dim": 32},
    "Transformer2DModel": {"in_channels": 16, "cross_attention_dim": 16, "norm_num_groups": 4},
    "TransformerTemporalModel": {"in_channels": 16, "cross_attention_dim": 16, "norm_num_groups": 4},
    "UNet1DModel": {"layers_per_block": 1},
    "UNet2DModel": {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 4},
    "WanAnimateTransformer3DModel": _WAN_IMAGE | {"inject_face_latents_blocks": 1},
    "WanVACETransformer3DModel": {"num_layers": 2, "vace_layers": [0], "vace_in_channels": 4},
    "ZImageControlNetModel": {"control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 4},
}


def unlisted() -> list[str]:
    """Classes of diffusers that take a latent and a timestep and have no row in the matrix."""
    rows = {type(family.make()).__name__ for family in FAMILIES.values()}
    kinds = ((name, getattr(diffusers, name, None)) for name in sorted(dir(diffusers)) if name not in rows)
    return [name for name, kind in kinds if inspect.isclass(kind) and issubclass(kind, ModelMixin) and denoises(kind)]


def config_of(name: str, seed: int = 0) -> dict[str, Any]:
    """A small random configuration."""
    rng = random.Random(f"{name} {seed}")
    found: dict[str, Any] = {}
    for key, parameter in inspect.signature(getattr(diffusers, name).__init__).parameters.items():
        new = _drawn(key, parameter.default, rng)
        if new is not None:
            found[key] = new
    return found | FITTING.get(name, {})


def _drawn(key: str, old: Any, rng: random.Random) -> Any:
    rule = next((rule for pattern, rule in SIZES if re.search(pattern, key)), None)
    sized = isinstance(old, int | tuple | list) and not isinstance(old, bool)
    return rule(rng, old) if rule is not None and sized else None


@dataclass(frozen=True)
class Outcome:
    """The result for one class.

    Attributes:
        layers, quantized: number of linear layers and convolutions, and of those in 8 bits.
        refusal: why the model could not be probed, or None.
        error: signal over noise of its first output in dB, where it was probed.
    """

    layers: int
    quantized: int
    refusal: str | None = None
    error: float | None = None

    def row(self, name: str) -> list[str]:
        roles = "probed" if self.refusal is None else "outline"
        return [f"`{name}`", f"{self.quantized}/{self.layers}", roles, "-" if self.error is None else f"{self.error:.0f} dB"]


def attempt(name: str) -> Outcome:
    """Build a class, save it, and open it quantized."""
    model: Any = awake(build(name, **config_of(name)))
    refusal, inputs = None, {}
    try:
        inputs = dummy_inputs(model)
        discover(model, inputs)
    except UnsupportedError as error:
        refusal = str(error)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        opened = type(model).from_pretrained(folder, quantization_config=ReelQuantConfig("w8a16"))
    counts = len(quantizable(model)), len(quantized_layers(opened))
    return Outcome(*counts, refusal) if refusal else Outcome(*counts, None, _error(model, opened, inputs))


def _error(model: nn.Module, opened: nn.Module, inputs: dict[str, Any]) -> float:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = []
        for one in (model, opened):
            torch.manual_seed(0)
            outputs.append(next(tensors_in(one(**inputs))).float())
    noise = (outputs[1] - outputs[0]).square().mean()
    return float(10 * torch.log10(outputs[0].square().mean() / noise))


def sweep() -> list[list[str]]:
    """Rows of the published table."""
    return [attempt(name).row(name) for name in unlisted()]
