"""Tiny random pipelines of stock classes that make clips from pictures, frames, classes or nothing, and the calls that suit them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    AnimateDiffControlNetPipeline,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXVideoToVideoPipeline,
    ConsisIDPipeline,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    I2VGenXLPipeline,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableVideoDiffusionPipeline,
    WanImageToVideoPipeline,
    WanVACEPipeline,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from reelquant.models.compat import bridged
from tests.tiny.configs import build

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "ball", "box"]


def picture(red: int = 200, size: int = 32) -> Image.Image:
    """A picture with a gradient, so that no two of its corners are alike."""
    image = Image.linear_gradient("L").resize((size, size))
    return Image.merge("RGB", (Image.new("L", (size, size), red), image, image.rotate(90)))


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8)


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def vision() -> CLIPVisionConfig:
    """Four patches of the size that Stable Video Diffusion asks for."""
    return CLIPVisionConfig(
        hidden_size=16, projection_dim=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=112, intermediate_size=32
    )


def eyes() -> CLIPImageProcessor:
    return CLIPImageProcessor()


def svd() -> StableVideoDiffusionPipeline:
    """A picture and no text."""
    return StableVideoDiffusionPipeline(
        unet=build(
            "UNetSpatioTemporalConditionModel", block_out_channels=(32, 64), layers_per_block=1, sample_size=8, cross_attention_dim=16,
            num_attention_heads=2, down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), projection_class_embeddings_input_dim=24,
            addition_time_embed_dim=8,
        ),
        image_encoder=CLIPVisionModelWithProjection(vision()).eval(), feature_extractor=eyes(),
        vae=AutoencoderKLTemporalDecoder(block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D"] * 2).eval(),
        scheduler=EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0
        ),
    )  # fmt: skip


def vae2d() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=32, **blocks).eval()


def i2vgen() -> I2VGenXLPipeline:
    """A picture beside the text; refuses a call without one."""
    return bridged(I2VGenXLPipeline(
        vae=vae2d(), text_encoder=clip_text(), tokenizer=tokenizer(), feature_extractor=eyes(),
        image_encoder=CLIPVisionModelWithProjection(vision()).eval(), scheduler=DDIMScheduler(clip_sample=False),
        unet=build(
            "I2VGenXLUNet", block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            num_attention_heads=None, attention_head_dim=8,
        ),
    ))  # fmt: skip


def vae_wan() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4, scale_factor_temporal=2, scale_factor_spatial=2,
    ).eval()  # fmt: skip


def wan_i2v() -> WanImageToVideoPipeline:
    """A picture beside the text; refuses lists of pictures."""
    return WanImageToVideoPipeline(
        tokenizer=tokenizer(), text_encoder=umt5(), vae=vae_wan(), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        image_processor=eyes(), image_encoder=CLIPVisionModel(vision()).eval(),
        transformer=build(
            "WanTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=10, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32, image_dim=16, added_kv_proj_dim=24,
        ),
    )  # fmt: skip


def wan_vace() -> WanVACEPipeline:
    """One text at a time; frames, masks and pictures are optional."""
    return WanVACEPipeline(
        tokenizer=tokenizer(), text_encoder=umt5(), vae=vae_wan(), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        transformer=build(
            "WanVACETransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
            freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=12,
        ),
    )  # fmt: skip


def cogvideox_i2v() -> CogVideoXImageToVideoPipeline:
    """A picture beside the text, one for each clip of a call."""
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    return CogVideoXImageToVideoPipeline(
        tokenizer=tokenizer(), text_encoder=t5(), scheduler=CogVideoXDDIMScheduler(),
        vae=AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, **blocks
        ).eval(),
        transformer=build(
            "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=8,
            text_embed_dim=16, num_layers=2, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=8,
            use_rotary_positional_embeddings=True,
        ),
    )  # fmt: skip


def cogvideox_v2v() -> CogVideoXVideoToVideoPipeline:
    """Frames beside the text; fails in a raw error without."""
    parts = dict(cogvideox_i2v().components)
    config = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
    parts["transformer"] = build("CogVideoXTransformer3DModel", **config | {"in_channels": 4})
    return CogVideoXVideoToVideoPipeline(**parts)


def consisid() -> ConsisIDPipeline:
    """A picture and what a face model says of it beside the text."""
    parts = dict(cogvideox_i2v().components)
    parts["transformer"] = build(
        "ConsisIDTransformer3DModel", num_attention_heads=3, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=8,
        use_rotary_positional_embeddings=True, is_train_face=True, cross_attn_interval=1, cross_attn_dim_head=8, cross_attn_num_heads=2,
        LFE_id_dim=FACE, LFE_vit_dim=FACE, LFE_depth=2, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=4,
        LFE_output_dim=32, LFE_ff_mult=1, LFE_num_scale=2,
    )  # fmt: skip
    return ConsisIDPipeline(**parts)


FACE = 24  # width of what a face model gives


def clip_text() -> CLIPTextModel:
    text = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8,
        eos_token_id=1, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return CLIPTextModel(text).eval()


UNET = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16, "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}  # fmt: skip


def controlnet() -> ControlNetModel:
    """With zero convolutions as after training: not all zero."""
    unet = build("UNet2DConditionModel", up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8, **UNET)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=generator)
    return net


def animatediff_controlnet() -> AnimateDiffControlNetPipeline:
    """Frames that control beside the text, one for each frame of the clip."""
    return AnimateDiffControlNetPipeline(
        vae=vae2d(), text_encoder=clip_text(), tokenizer=tokenizer(), scheduler=DDIMScheduler(clip_sample=False), controlnet=controlnet(),
        unet=build("UNet2DConditionModel", up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8, **UNET),
        motion_adapter=MotionAdapter(
            block_out_channels=(16, 32), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4,
            use_motion_mid_block=False,
        ).eval(),
    )  # fmt: skip


def sd_controlnet() -> StableDiffusionControlNetPipeline:
    """A picture that controls beside the text; the call names it 'image'."""
    return StableDiffusionControlNetPipeline(
        vae=vae2d(), text_encoder=clip_text(), tokenizer=tokenizer(), scheduler=DDIMScheduler(clip_sample=False), controlnet=controlnet(),
        unet=build("UNet2DConditionModel", up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8, **UNET),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def ltx_parts() -> dict[str, Any]:
    return {
        "tokenizer": tokenizer(), "text_encoder": t5(), "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5, patch_size=1, patch_size_t=1,
            encoder_causal=True, decoder_causal=False,
        ).eval(),
        "transformer": build(
            "LTXVideoTransformer3DModel", in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            cross_attention_dim=16, caption_channels=16,
        ),
    }  # fmt: skip


def ltx_i2v() -> LTXImageToVideoPipeline:
    """A picture beside the text, one for each clip of a call."""
    return LTXImageToVideoPipeline(**ltx_parts())


def ltx_condition() -> LTXConditionPipeline:
    """Pictures beside the text, all those of a list for the same clip."""
    return LTXConditionPipeline(**ltx_parts())


def dit() -> DiTPipeline:
    """A class and no text; a list even of one."""
    return DiTPipeline(
        vae=vae2d(), scheduler=DDIMScheduler(),
        transformer=build(
            "DiTTransformer2DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
            sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
        ),
    )  # fmt: skip


def ddpm() -> DDPMPipeline:
    """Nothing at all."""
    unet = build(
        "UNet2DModel", sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, in_channels=3, out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())


class Case(NamedTuple):
    """A pipeline, and the arguments of a call that suits it: settings and conditions."""

    make: Callable[[], Any]
    settings: dict[str, Any]
    conditions: dict[str, Any]


SMALL = {"num_inference_steps": 2, "height": 32, "width": 32}
CASES: dict[str, Case] = {
    "svd": Case(svd, SMALL | {"num_frames": 3, "decode_chunk_size": 3}, {"image": picture()}),
    "i2vgen": Case(i2vgen, SMALL | {"num_frames": 3}, {"image": picture()}),
    "wan_i2v": Case(wan_i2v, SMALL | {"num_frames": 5}, {"image": picture()}),
    "wan_vace": Case(wan_vace, SMALL | {"num_frames": 5, "max_sequence_length": 8}, {}),
    "cogvideox_i2v": Case(cogvideox_i2v, SMALL | {"num_frames": 9, "max_sequence_length": 8}, {"image": picture()}),
    "cogvideox_v2v": Case(
        cogvideox_v2v, SMALL | {"num_inference_steps": 4, "max_sequence_length": 8}, {"video": [picture(20 * i) for i in range(9)]}
    ),
    "ltx_i2v": Case(ltx_i2v, SMALL | {"num_frames": 9, "max_sequence_length": 8}, {"image": picture()}),
    "ltx_condition": Case(ltx_condition, SMALL | {"num_frames": 9, "max_sequence_length": 8}, {"image": picture()}),
    "dit": Case(dit, {"num_inference_steps": 2}, {"class_labels": 3}),
    "consisid": Case(
        consisid,
        SMALL | {"num_frames": 9, "max_sequence_length": 8},
        {
            "image": picture(),
            "id_cond": torch.linspace(-1, 1, FACE)[None],
            "id_vit_hidden": [torch.ones(1, 3, FACE) / (i + 1) for i in range(2)],
        },
    ),
    "animatediff_controlnet": Case(
        animatediff_controlnet, SMALL | {"num_frames": 3}, {"conditioning_frames": [picture(50 + 50 * i) for i in range(3)]}
    ),
    "sd_controlnet": Case(sd_controlnet, SMALL, {"image": picture()}),
    "ddpm": Case(ddpm, {"num_inference_steps": 2}, {}),
}
PROMPTLESS = ("svd", "dit", "ddpm")


def texts(name: str, count: int) -> list[str]:
    """So many texts for one of :data:`CASES`; empty ones where it takes none."""
    return ["" if name in PROMPTLESS else ("a red ball", "a blue box", "a ball")[i % 3] for i in range(count)]


def made(name: str) -> Any:
    """One of :data:`CASES`, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = CASES[name].make()
    pipe.set_progress_bar_config(disable=True)
    return pipe
