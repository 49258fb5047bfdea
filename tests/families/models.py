"""One tiny denoiser for every family: the class and the wiring that its pipelines use, random weights, the arguments of one real call.

Use: ``FAMILIES["wan-2.1"].make()`` and ``FAMILIES["wan-2.1"].inputs()``. Arguments are spelled out as the pipeline of the family passes
them, independently of what :func:`reelquant.discover.dummy_inputs` makes up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny.configs import TINY, build

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One row of the matrix.

    Attributes:
        title: for people.
        make: builds the float denoiser, the same weights every time.
        call: the arguments of one denoiser call, float32, batch one.
        attention: the projections that adapters are put on, by the end of their names.
    """

    title: str
    make: Callable[[], nn.Module]
    call: Callable[[], Inputs]
    attention: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def inputs(self, dtype: torch.dtype = torch.float32) -> Inputs:
        """Arguments of one call; float tensors in this dtype, but timesteps and positions as pipelines give them."""
        made = self.call()
        return {name: _cast(value, dtype) if name not in AS_GIVEN else value for name, value in made.items()} | {"return_dict": False}


AS_GIVEN = ("timestep", "fps", "img_ids", "txt_ids", "image_rotary_emb")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def noise(*shape: int) -> Tensor:
    """Standard normal numbers, the same for a shape every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def time(value: float = 500.0) -> Tensor:
    return torch.tensor([value])


def text(width: int, tokens: int = 6) -> Inputs:
    return {"encoder_hidden_states": noise(1, tokens, width)}


def awake(model: nn.Module) -> nn.Module:
    """The model with small noise where parameters are zero: gates and output projections that start at zero would hide what they gate."""
    for number, parameter in enumerate(model.parameters()):
        if not parameter.any():
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return model


# ------------------------------------------------------------------------------------------------------------- models beyond TINY


def wan_experts() -> nn.Module:
    """Wan 2.2 A14B, image to video: the picture is a part of the latent, there is no image embedder."""
    return build(
        "WanTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=9, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def wan_image() -> nn.Module:
    """Wan 2.1, image to video: cross-attention to the picture with projections of its own."""
    return build(
        "WanTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=9, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32, image_dim=16, added_kv_proj_dim=24,
    )  # fmt: skip


def hunyuan15() -> nn.Module:
    """HunyuanVideo 1.5: two text encoders and a picture in one row of tokens, sorted by their masks."""
    return build(
        "HunyuanVideo15Transformer3DModel", in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=10, rope_axes_dim=(4, 6, 6), target_size=16,
    )  # fmt: skip


def ltx2() -> nn.Module:
    """LTX-2: video and audio attend to each other."""
    return build(
        "LTX2VideoTransformer3DModel", in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=2, caption_channels=12,
    )  # fmt: skip


def allegro() -> nn.Module:
    """Allegro: positions are computed by the pipeline and passed in."""
    return build(
        "AllegroTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=3, caption_channels=12,
    )  # fmt: skip


def skyreels() -> nn.Module:
    """SkyReels-V2 with the embedding of the frame rate."""
    return build(
        "SkyReelsV2Transformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32, inject_sample_info=True,
    )  # fmt: skip


def cosmos() -> nn.Module:
    """Cosmos Predict: low-rank modulation, learned positions. A padding mask in the latent would ask for torchvision."""
    return build(
        "CosmosTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=8, max_size=(4, 16, 16), concat_padding_mask=False,
    )  # fmt: skip


def i2vgen() -> nn.Module:
    """I2VGen-XL: a UNet that also reads the first frame and the frame rate."""
    return build(
        "I2VGenXLUNet", block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        num_attention_heads=None, attention_head_dim=8,
    )  # fmt: skip


def sd() -> nn.Module:
    """Stable Diffusion 1.5: projections around its transformers are 1x1 convolutions."""
    return build(
        "UNet2DConditionModel", block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip


def sd3() -> nn.Module:
    """Stable Diffusion 3.5: two streams, the second attention of some blocks, normalised queries and keys."""
    return build(
        "SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=24, out_channels=4, pos_embed_max_size=12,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def qwen() -> nn.Module:
    """Qwen-Image."""
    return build(
        "QwenImageTransformer2DModel", patch_size=2, in_channels=8, out_channels=2, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def sana() -> nn.Module:
    """SANA: linear attention, a feed-forward part of convolutions, one of them depthwise."""
    return build(
        "SanaTransformer2DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12, sample_size=8,
    )  # fmt: skip


def dit() -> nn.Module:
    """DiT: class labels instead of text, a timestep embedder in every block."""
    return build(
        "DiTTransformer2DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------- their calls


def wan_call(channels: int = 4, timestep: Tensor | None = None) -> Inputs:
    return {"hidden_states": noise(1, channels, 3, 8, 12), "timestep": time() if timestep is None else timestep, **text(16)}


def wan_image_call() -> Inputs:
    """Text is padded to 512 tokens: whatever stands before the last 512 is the picture."""
    return wan_call(9) | text(16, 512) | {"encoder_hidden_states_image": noise(1, 5, 16)}


def wan_per_token() -> Inputs:
    """Wan 2.2 TI2V-5B: a timestep for every token; those of the given first frame are zero."""
    tokens = torch.full((1, 3 * 4 * 6), 500.0)
    tokens[:, : 4 * 6] = 0
    return wan_call(timestep=tokens)


def hunyuan15_call() -> Inputs:
    mask = torch.tensor([[1.0, 1, 1, 1, 0, 0]])
    return {
        "hidden_states": noise(1, 9, 2, 4, 6), "timestep": time(), **text(16), "encoder_attention_mask": mask,
        "encoder_hidden_states_2": noise(1, 4, 12), "encoder_attention_mask_2": torch.tensor([[1.0, 1, 0, 0]]),
        "image_embeds": noise(1, 3, 10),
    }  # fmt: skip


def ltx2_call() -> Inputs:
    """The timestep has one entry per token, as the pipeline's image-to-video call has."""
    return {
        "hidden_states": noise(1, 2 * 3 * 4, 8), "audio_hidden_states": noise(1, 5, 8), "encoder_hidden_states": noise(1, 6, 12),
        "audio_encoder_hidden_states": noise(1, 6, 12), "timestep": torch.full((1, 24), 500.0), "audio_timestep": time(),
        "num_frames": 2, "height": 3, "width": 4, "audio_num_frames": 5, "fps": 24.0,
    }  # fmt: skip


def allegro_call() -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *rotary, times, rows, columns = get_3d_rotary_pos_embed_allegro(
        embed_dim=12, crops_coords=((0, 0), (4, 6)), grid_size=(4, 6), temporal_size=2, interpolation_scale=(1.0, 1.0, 1.0)
    )
    places = torch.cartesian_prod(times.long(), rows.long(), columns.long()).T[:, None]
    return {
        "hidden_states": noise(1, 4, 2, 8, 12), "timestep": time(), **text(12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]), "image_rotary_emb": (tuple(rotary), tuple(places)),
    }  # fmt: skip


def flux_call() -> Inputs:
    return {
        "hidden_states": noise(1, 12, 8), "timestep": time(0.5), **text(12), "pooled_projections": noise(1, 10), "guidance": time(3.5),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0)), "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip


def sdxl_call() -> Inputs:
    added = {"text_embeds": noise(1, 16), "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])}
    return {"sample": noise(1, 4, 8, 12), "timestep": time(), **text(16), "added_cond_kwargs": added}


_NO_OUT = ("to_q", "to_k", "to_v")

FAMILIES: dict[str, Family] = {
    "wan-2.1": Family("Wan 2.1", TINY["WanTransformer3DModel"], wan_call),
    "wan-2.1-i2v": Family("Wan 2.1 image to video", wan_image, wan_image_call),
    "wan-2.2-a14b": Family("Wan 2.2 A14B (one of two experts)", wan_experts, lambda: wan_call(9)),
    "wan-2.2-5b": Family("Wan 2.2 TI2V-5B (a timestep per token)", TINY["WanTransformer3DModel"], wan_per_token),
    "cogvideox": Family(
        "CogVideoX", TINY["CogVideoXTransformer3DModel"],
        lambda: {"hidden_states": noise(1, 3, 4, 8, 8), "timestep": time(), **text(16, 8)},
    ),
    "hunyuanvideo": Family(
        "HunyuanVideo", TINY["HunyuanVideoTransformer3DModel"],
        lambda: {
            "hidden_states": noise(1, 4, 2, 4, 6), "timestep": time(), **text(16), "guidance": time(6000.0),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]), "pooled_projections": noise(1, 8),
        },
    ),
    "hunyuanvideo-1.5": Family("HunyuanVideo 1.5", hunyuan15, hunyuan15_call),
    "ltx": Family(
        "LTX-Video", TINY["LTXVideoTransformer3DModel"],
        lambda: {
            "hidden_states": noise(1, 2 * 3 * 4, 8), "timestep": time(), **text(12), "encoder_attention_mask": torch.ones(1, 6).long(),
            "num_frames": 2, "height": 3, "width": 4,
        },
    ),
    "ltx-2": Family("LTX-2", ltx2, ltx2_call),
    "mochi": Family(
        "Mochi", TINY["MochiTransformer3DModel"],
        lambda: {
            "hidden_states": noise(1, 4, 2, 4, 6), "timestep": time(), **text(16, 8), "encoder_attention_mask": torch.ones(1, 8).bool(),
        },
    ),
    "allegro": Family("Allegro", allegro, allegro_call),
    "latte": Family(
        "Latte", TINY["LatteTransformer3DModel"],
        lambda: {"hidden_states": noise(1, 4, 3, 8, 8), "timestep": time(), **text(12), "enable_temporal_attentions": True},
    ),
    "skyreels-v2": Family("SkyReels-V2", skyreels, lambda: wan_call() | {"fps": [1]}),
    "cosmos": Family(
        "Cosmos", cosmos,
        lambda: {
            "hidden_states": noise(1, 4, 2, 8, 12), "timestep": time(0.5), **text(16), "fps": 24,
        },
    ),
    "svd": Family(
        "Stable Video Diffusion", TINY["UNetSpatioTemporalConditionModel"],
        lambda: {
            "sample": noise(1, 3, 8, 8, 12), "timestep": time(), **text(16, 1), "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
        },
    ),
    "animatediff": Family(
        "AnimateDiff", TINY["UNetMotionModel"],
        lambda: {"sample": noise(1, 4, 3, 8, 12), "timestep": time(), "encoder_hidden_states": noise(3, 6, 16)},
    ),
    "modelscope": Family(
        "ModelScope (UNet3D)", TINY["UNet3DConditionModel"], lambda: {"sample": noise(1, 4, 3, 8, 12), "timestep": time(), **text(16)},
    ),
    "i2vgen-xl": Family(
        "I2VGen-XL", i2vgen,
        lambda: {
            "sample": noise(1, 4, 3, 8, 12), "timestep": time(), **text(16), "fps": torch.tensor([16]),
            "image_latents": noise(1, 4, 3, 8, 12), "image_embeddings": noise(1, 16),
        },
    ),
    "sd": Family("Stable Diffusion 1.5", sd, lambda: {"sample": noise(1, 4, 8, 12), "timestep": time(), **text(16)}),
    "sdxl": Family("Stable Diffusion XL", TINY["UNet2DConditionModel"], sdxl_call),
    "pixart": Family(
        "PixArt-Sigma", TINY["PixArtTransformer2DModel"],
        lambda: {
            "hidden_states": noise(1, 4, 8, 8), "timestep": time(), **text(12), "encoder_attention_mask": torch.ones(1, 6).long(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "sd3": Family(
        "Stable Diffusion 3.5", sd3,
        lambda: {"hidden_states": noise(1, 4, 8, 12), "timestep": time(), **text(16), "pooled_projections": noise(1, 24)},
    ),
    "flux": Family("Flux", TINY["FluxTransformer2DModel"], flux_call),
    "qwen-image": Family(
        "Qwen-Image", qwen,
        lambda: {
            "hidden_states": noise(1, 12, 8), "timestep": time(0.5), **text(12), "img_shapes": [[(1, 3, 4)]],
            "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        },
    ),
    "sana": Family(
        "SANA", sana,
        lambda: {
            "hidden_states": noise(1, 4, 8, 8), "timestep": time(), **text(12), "encoder_attention_mask": torch.ones(1, 6).long(),
        },
    ),
    "dit": Family(
        "DiT", dit, lambda: {"hidden_states": noise(1, 4, 8, 8), "timestep": time(), "class_labels": torch.tensor([3])},
    ),
}  # fmt: skip
