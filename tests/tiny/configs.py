"""The denoisers of twelve pipelines, tiny, with random weights: same classes, same wiring, a few thousand parameters.

Use: ``TINY["WanTransformer3DModel"]()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn


def build(cls: str, **config: Any) -> nn.Module:
    """A diffusers model of this class in eval mode, the same weights every time; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(diffusers, cls)(**config).eval()


def wan() -> nn.Module:
    """Wan 2.1 and 2.2: text cross-attention, one modulation table per block."""
    return build(
        "WanTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def cogvideox() -> nn.Module:
    """CogVideoX: text and video tokens in one stream, frames before channels."""
    return build(
        "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=8,
    )  # fmt: skip


def ltx() -> nn.Module:
    """LTX-Video: packed tokens, sizes passed as integers."""
    return build(
        "LTXVideoTransformer3DModel", in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=12,
    )  # fmt: skip


def hunyuan() -> nn.Module:
    """HunyuanVideo: double and single stream blocks, a text refiner that looks at the timestep, distilled guidance."""
    return build(
        "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2,
        num_single_layers=2, num_refiner_layers=2, patch_size=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip


def mochi() -> nn.Module:
    """Mochi: two streams of different width; the pooler has 8 heads whatever the config says."""
    return build(
        "MochiTransformer3DModel", patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=8,
    )  # fmt: skip


def latte() -> nn.Module:
    """Latte: spatial and temporal blocks take turns."""
    return build(
        "LatteTransformer3DModel", sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        caption_channels=12, in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
        video_length=3,
    )  # fmt: skip


def animatediff() -> nn.Module:
    """AnimateDiff: an image UNet with motion modules, whose output projections start at zero."""
    return build(
        "UNetMotionModel", block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=8,
    )  # fmt: skip


def modelscope() -> nn.Module:
    """ModelScope and ZeroScope: temporal convolutions that start at zero."""
    return build(
        "UNet3DConditionModel", block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8,
    )  # fmt: skip


def svd() -> nn.Module:
    """Stable Video Diffusion: conditioned on a picture, spatial and temporal layers blended. Its norms want 32 groups."""
    return build(
        "UNetSpatioTemporalConditionModel", block_out_channels=(32, 64), layers_per_block=1, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), num_attention_heads=(2, 4),
        cross_attention_dim=16, projection_class_embeddings_input_dim=24, addition_time_embed_dim=8,
    )  # fmt: skip


def sdxl() -> nn.Module:
    """Stable Diffusion XL: an image UNet that also gets pooled text and six sizes."""
    return build(
        "UNet2DConditionModel", block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    )  # fmt: skip


def pixart() -> nn.Module:
    """PixArt-Sigma."""
    return build(
        "PixArtTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, sample_size=8, caption_channels=12,
    )  # fmt: skip


def flux() -> nn.Module:
    """Flux dev: packed tokens with explicit positions, distilled guidance."""
    return build(
        "FluxTransformer2DModel", in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip


TINY: dict[str, Callable[[], nn.Module]] = {
    "WanTransformer3DModel": wan,
    "CogVideoXTransformer3DModel": cogvideox,
    "LTXVideoTransformer3DModel": ltx,
    "HunyuanVideoTransformer3DModel": hunyuan,
    "MochiTransformer3DModel": mochi,
    "LatteTransformer3DModel": latte,
    "UNetMotionModel": animatediff,
    "UNet3DConditionModel": modelscope,
    "UNetSpatioTemporalConditionModel": svd,
    "UNet2DConditionModel": sdxl,
    "PixArtTransformer2DModel": pixart,
    "FluxTransformer2DModel": flux,
}
