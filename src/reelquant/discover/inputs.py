"""Tiny inputs for a denoiser, from the signature of its forward and from its config.

No model class is named here: arguments are built by argument name, sizes come from config keys, and where neither can tell (is the
latent ``b c t h w`` or ``b t c h w``, or a row of tokens?) the layouts are tried in turn, on sizes that differ on every axis.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.discover.probe import run, steady

LAYOUTS = ("bcthw", "bchw", "btchw", "bnc")
CHANNELS = ("in_channels", "in_visual_dim", "latent_dim", "io_channels")  # config keys of the latent's channels
AUDIO = 5  # length of a made-up sound


@dataclass(frozen=True)
class Sketch:
    """One guess at the sizes of a call.

    Attributes:
        denoiser: the module, for its config and dtype.
        layout: axes of the latent, one of :data:`LAYOUTS`.
        frames, height, width: sizes of the latent.
        prompts: batch of the prompt; AnimateDiff's pipelines repeat it for every frame before they call the denoiser.
        timestep: an integer as most samplers give it, or in [0, 1] for models that multiply it by 1000 themselves (Flux), where a large
            one would overflow half precision.
        all_optional: also build what the signature calls optional and only some models need (I2VGen-XL, DiT).
    """

    denoiser: nn.Module
    layout: str
    frames: int
    height: int
    width: int
    prompts: int = 1
    timestep: float = 500
    all_optional: bool = False

    def get(self, *keys: str) -> Any:
        """The first of these config keys (or attributes) that is set; of a tuple the first member."""
        value = _setting(self.denoiser, *keys)
        return value[0] if isinstance(value, list | tuple) else value

    @property
    def sizes(self) -> dict[str, int]:
        tokens = self.frames * self.height * self.width
        return dict(b=1, c=self.get(*CHANNELS), t=self.frames, h=self.height, w=self.width, n=tokens)

    @property
    def tokens(self) -> int:
        """Length of the prompt. Some models hard-code it."""
        if self.get("added_kv_proj_dim"):
            return 512  # Wan image-to-video: everything before the last 512 tokens is taken for the picture
        return self.get("max_text_seq_length") or 6

    def random(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(len(shape) + sum(shape))
        return torch.randn(*shape, generator=generator).to(_device(self.denoiser), _dtype(self.denoiser))

    def number(self, *values: float) -> Tensor:
        return torch.tensor(values, device=_device(self.denoiser))


def _setting(denoiser: nn.Module, *keys: str) -> Any:
    config = getattr(denoiser, "config", {})
    for key in keys:
        value = config[key] if key in config else denoiser.__dict__.get(key)
        if value is not None:
            return value
    return None


def _dtype(denoiser: nn.Module) -> torch.dtype:
    floating = (p.dtype for p in denoiser.parameters() if p.is_floating_point() and p.element_size() > 1)
    own = getattr(denoiser, "dtype", None)  # diffusers' own, which knows about modules kept in float32
    if isinstance(own, torch.dtype) and own.is_floating_point and own.itemsize > 1:
        return own
    return next(floating, torch.float32)


def _device(denoiser: nn.Module) -> torch.device:
    return next((p.device for p in denoiser.parameters() if not p.is_meta), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ argument name -> value, or None
_TEXT_WIDTH = (
    "text_dim",
    "text_embed_dim",
    "caption_channels",
    "encoder_hid_dim",
    "joint_attention_dim",
    "cross_attention_input_dim",
    "cross_attention_dim",
    "cap_feat_dim",
    "in_text_dim",
    "dit_text_dim",
    "context_in_dim",
    "cond_token_dim",
    "condition_dim",
)


def _latent(s: Sketch) -> Tensor:
    return s.random(*(s.sizes[axis] for axis in s.layout))


def _control(s: Sketch) -> Tensor | None:
    """A video in the latent's shape, with channels of its own."""
    channels = s.get("vace_in_channels")
    return s.random(*((s.sizes | {"c": channels})[axis] for axis in s.layout)) if channels else None


def _prompt(s: Sketch) -> Tensor | None:
    width = s.get(*_TEXT_WIDTH)
    return s.random(s.prompts, s.tokens, width) if width else None


def _mask(s: Sketch) -> Tensor:
    return torch.ones(1, s.tokens, dtype=torch.bool, device=_device(s.denoiser))


def _vector(*keys: str) -> Callable[[Sketch], Tensor | None]:
    return lambda s: s.random(1, s.get(*keys)) if s.get(*keys) else None


def _row(length: Callable[[Sketch], int], *keys: str) -> Callable[[Sketch], Tensor | None]:
    """Tokens of a further modality."""
    return lambda s: s.random(1, length(s), s.get(*keys)) if s.get(*keys) else None


def _guidance(s: Sketch) -> Tensor | None:
    return s.random(1).abs() * 4 if s.get("guidance_embeds") else None


def _image_tokens(s: Sketch) -> Tensor | None:
    return s.random(1, 2 * (s.get("pos_embed_seq_len") or 2), s.get("image_dim")) if s.get("image_dim") else None


def _added_conditions(s: Sketch) -> dict[str, Tensor] | None:
    if s.get("addition_embed_type") == "text_time":  # size, crop and target size, two numbers each; the rest of the width is text
        text = s.get("projection_class_embeddings_input_dim") - 6 * s.get("addition_time_embed_dim")
        return {"text_embeds": s.random(1, text), "time_ids": s.random(1, 6).abs() * 100}
    if s.get("use_additional_conditions"):
        return {"resolution": s.random(1, 2).abs() * 100, "aspect_ratio": s.random(1, 1).abs()}
    return None


def _pair(s: Sketch) -> Tensor:
    return s.random(1, 2).abs() * 100


def _added_time_ids(s: Sketch) -> Tensor:
    count = s.get("projection_class_embeddings_input_dim") // s.get("addition_time_embed_dim")
    return s.random(1, count).abs() * 10


def _positions(length: Callable[[Sketch], int]) -> Callable[[Sketch], Tensor | None]:
    def build(s: Sketch) -> Tensor | None:
        axes = _setting(s.denoiser, "axes_dims_rope", "axes_dim")
        if axes is None:
            return None
        count = length(s)
        return torch.arange(count, device=_device(s.denoiser)).float()[:, None].expand(count, len(axes)).to(_dtype(s.denoiser))

    return build


def _class_label(s: Sketch) -> Tensor | None:
    return s.number(1) if s.get("num_class_embeds", "num_embeds_ada_norm") else None


BUILDERS: dict[str, Callable[[Sketch], Any]] = {
    "hidden_states": _latent,
    "sample": _latent,
    "timestep": lambda s: s.number(s.timestep),
    "timesteps": lambda s: s.number(s.timestep),
    "r_timestep": lambda s: s.number(s.timestep),
    "encoder_hidden_states": _prompt,
    "encoder_hidden_states_2": _row(lambda s: s.tokens, "text_embed_2_dim"),
    "encoder_attention_mask": _mask,
    "encoder_attention_mask_2": _mask,
    "encoder_hidden_states_image": _image_tokens,
    "pooled_projections": _vector("pooled_projection_dim"),
    "guidance": _guidance,
    "timestep_cond": _vector("time_cond_proj_dim"),
    "ofs": lambda s: s.random(1).abs() if s.get("ofs_embed_dim") else None,
    "added_cond_kwargs": _added_conditions,
    "added_time_ids": _added_time_ids,
    "original_size": _pair,
    "target_size": _pair,
    "crop_coords": _pair,
    "class_labels": _class_label,
    "img_ids": _positions(lambda s: s.sizes["n"]),
    "txt_ids": _positions(lambda s: s.tokens),
    "img_shapes": lambda s: [[(s.frames, s.height, s.width)]],
    "txt_seq_lens": lambda s: [s.tokens],
    "fps": lambda s: s.number(0),  # a number for I2VGen-XL, one of two classes for SkyReels-V2
    "image_latents": _latent,
    "control_hidden_states": _control,
    "image_embeddings": _vector("cross_attention_dim"),
    "image_embeds": _row(lambda s: 3, "image_embed_dim"),
    "audio_hidden_states": _row(lambda s: AUDIO, "audio_in_channels"),
    "audio_encoder_hidden_states": _row(lambda s: s.tokens, "caption_channels"),
    "audio_num_frames": lambda s: AUDIO,
    "num_frames": lambda s: s.frames,
    "height": lambda s: s.height,
    "width": lambda s: s.width,
    "return_dict": lambda s: False,
}
_RARELY_NEEDED = {"encoder_attention_mask", "encoder_attention_mask_2", "class_labels", "fps", "image_latents", "image_embeddings"}


def _build(sketch: Sketch) -> dict[str, Any]:
    """Values for every argument that has a builder and whose sizes the config tells."""
    values: dict[str, Any] = {}
    for name, parameter in inspect.signature(sketch.denoiser.forward).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        if name not in BUILDERS or (name in _RARELY_NEEDED and not required and not sketch.all_optional):
            continue
        value = BUILDERS[name](sketch)
        if value is not None:
            values[name] = value
    return values


def _missing(denoiser: nn.Module, built: dict[str, Any]) -> list[str]:
    skip = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(denoiser.forward).parameters.items()
    return [n for n, p in parameters if p.default is inspect.Parameter.empty and p.kind not in skip and n not in built]


def _sketches(denoiser: nn.Module) -> Iterator[Sketch]:
    """Tiny sizes first; then the model's own, for those with learned positions."""
    for frames, height, width in (_tiny(denoiser), *_native(denoiser)):
        for timestep, prompts, all_optional, layout in itertools.product((500, 0.5), (1, frames), (False, True), LAYOUTS):
            yield Sketch(denoiser, layout, frames, height, width, prompts, timestep, all_optional)


def _spatial_step(denoiser: nn.Module) -> int:
    """Height and width must be multiples of this: the patch, or the downsampling of a UNet."""
    patch = _setting(denoiser, "patch_size")
    patch = max(patch[1:] if isinstance(patch, list | tuple) else [patch or 1])
    return patch * 2 ** max(len(_setting(denoiser, "block_out_channels") or [0]) - 1, 0)


def _tiny(denoiser: nn.Module) -> tuple[int, int, int]:
    """The smallest sizes that leave two positions everywhere and that no other axis shares.

    One position would hide dependencies (a normalisation over one element, a softmax over one key); an axis as long as the channels
    would let a wrong layout pass.
    """
    channels, step = _setting(denoiser, *CHANNELS), _spatial_step(denoiser)
    patch = _setting(denoiser, "patch_size")
    step_t = _setting(denoiser, "patch_size_t") or (patch[0] if isinstance(patch, list | tuple) else 1)
    frames = _setting(denoiser, "video_length") or next(f for f in range(2 * step_t, 99, step_t) if f != channels)
    height = next(h for h in range(2 * step, 99 * step, step) if h not in (channels, frames))
    width = next(w for w in range(height + step, 99 * step, step) if w not in (channels, frames))
    return frames, height, width


def _native(denoiser: nn.Module) -> Iterator[tuple[int, int, int]]:
    size = _setting(denoiser, "sample_size")
    high, wide = (size, size) if isinstance(size, int) else (size or (None, None))
    high, wide = _setting(denoiser, "sample_height") or high, _setting(denoiser, "sample_width") or wide
    frames = _setting(denoiser, "sample_frames", "video_length", "num_frames") or 2
    ratio = _setting(denoiser, "temporal_compression_ratio")
    if high and wide:
        yield ((frames - 1) // ratio + 1 if ratio else frames), high, wide


def dummy_inputs(denoiser: nn.Module) -> dict[str, Any]:
    """Keyword arguments on which the denoiser runs: batch one, two frames or so, a few positions, random values (fixed seed).

    Raises:
        UnsupportedError: naming the argument that cannot be built, or every layout that was tried and how it failed.
    """
    name = type(denoiser).__name__
    if _setting(denoiser, *CHANNELS) is None:
        raise UnsupportedError(f"{name} has no config.in_channels to build a latent from; pass inputs= with the arguments of one real call")
    failures: dict[str, str] = {}
    for sketch in _sketches(denoiser):
        inputs = _attempt(sketch, failures)
        if inputs is not None:
            return inputs
    raise UnsupportedError(
        f"no dummy inputs found for {name}; tried the latent as {'; '.join(failures.values())}; also with all optional arguments, "
        "a prompt per frame, a timestep in [0, 1] and the sizes of its config; pass inputs= with the arguments of one real call"
    )


def _attempt(sketch: Sketch, failures: dict[str, str]) -> dict[str, Any] | None:
    denoiser = sketch.denoiser
    built = _build(sketch)
    missing = _missing(denoiser, built)
    if missing:
        raise UnsupportedError(
            f"cannot make up the argument {', '.join(map(repr, missing))} of {type(denoiser).__name__}.forward: known by name are "
            f"{', '.join(BUILDERS)}, with sizes from its config; pass inputs= with the arguments of one real call"
        )
    try:
        with steady(denoiser):
            run(denoiser, built)
    except Exception as error:  # a wrong layout fails in any way a model can fail
        sizes = f"{sketch.frames}x{sketch.height}x{sketch.width}"
        failures.setdefault(sketch.layout, f"{sketch.layout} {sizes} ({type(error).__name__}: {str(error)[:120]})")
        return None
    return built
