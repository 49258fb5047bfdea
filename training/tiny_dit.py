"""Train the bundled ``tiny-dit``: a stock WanPipeline (UMT5 encoder, Wan VAE, Wan transformer) for captioned clips of moving shapes.

Stages, in this order (one core; each writes below ``runs/tiny-dit``)::

    PYTHONPATH=src python training/tiny_dit.py vae --minutes 11
    PYTHONPATH=src python training/tiny_dit.py latents
    PYTHONPATH=src python training/tiny_dit.py dit --minutes 70
    PYTHONPATH=src python training/tiny_dit.py export
    PYTHONPATH=src python training/tiny_dit.py evaluate --count 200 --guidance 3 --steps 20
    PYTHONPATH=src python training/tiny_dit.py ceilings
"""

from __future__ import annotations

import shutil
import time
import types
from functools import partial

import torch
import torch.nn.functional as F
from autoencoder import around_object, from_model, judge_reconstructions, loss_of, save_latents, to_model, train_autoencoder
from common import (
    CURVES,
    RUNS,
    TEST_SEED,
    WEIGHTS,
    Ema,
    Muon,
    averaged,
    contact_sheet,
    generate,
    rounded,
    say,
    split_parameters,
    stage_parser,
)
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from flow import Plan, matched_noise, noise_levels, some_captions, train_flow
from plot import draw, gather
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from reelquant.models.judge import accuracy
from reelquant.models.sampling import write_notes
from reelquant.models.shapes import Scene, covering_captions, random_clip, vocabulary

RUN = RUNS / "tiny-dit"
FRAMES = 13
CALL = {"height": 64, "width": 64, "num_frames": FRAMES, "num_inference_steps": 20, "guidance_scale": 3.0}  # what samples well

# ---------------------------------------------------------------------------------------------------------------------------- vae

VAE_CONFIG = {
    "base_dim": 48,
    "z_dim": 8,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "is_residual": True,
    "patch_size": 4,
    "in_channels": 48,
    "out_channels": 48,
    "scale_factor_temporal": 2,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * 8,
    "latents_std": [1.0] * 8,
}


def _resample_whole(self: WanResample, x: Tensor, feat_cache: object = None, feat_idx: object = None) -> Tensor:
    """WanResample.forward on a whole sequence at once, equal to the chunked forward of the stock autoencoder."""
    batch, _, frames, _, _ = x.shape
    if self.mode == "upsample3d":  # the first frame stays single, every other becomes two
        later = self.time_conv(x[:, :, 1:])
        later = later.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
        x = torch.cat([x[:, :, :1], later], 2)
        frames = x.shape[2]
    x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).transpose(1, 2)
    if self.mode == "downsample3d":
        x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
    return x


def make_vae() -> AutoencoderKLWan:
    """A fresh autoencoder, its posterior nearly noiseless at the start (unit noise, the default, stalls the training)."""
    vae = AutoencoderKLWan(**VAE_CONFIG)
    with torch.no_grad():
        vae.quant_conv.weight[VAE_CONFIG["z_dim"] :].mul_(0.1)
        vae.quant_conv.bias[VAE_CONFIG["z_dim"] :].fill_(-5.0)
    return vae


def use_whole_sequences(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Let :func:`encode_whole` and :func:`decode_whole` work, which take far fewer calls than the stock chunks."""
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.forward = types.MethodType(_resample_whole, module)
    return vae


def encode_whole(vae: AutoencoderKLWan, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance ``[n, 8, latent frames, h / 8, w / 8]`` of clips ``[n, 3, frames, h, w]`` in [-1, 1]."""
    mean, log_var = vae.quant_conv(vae.encoder(patchify(clips, 4))).chunk(2, 1)
    return mean, log_var.clamp(-30, 20)


def decode_whole(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Clips ``[n, 3, frames, h, w]``, not clamped (a clamp has no gradient outside [-1, 1])."""
    return unpatchify(vae.decoder(vae.post_quant_conv(latents), first_chunk=True), 4)


def crop_objects(clips: Tensor, generator: torch.Generator, size: int = 32) -> Tensor:
    """Cut a window around the object's place in a random frame, aligned to the latent grid: ``[n, 3, frames, size, size]``."""
    crops = []
    for clip in clips:
        frame = clip[:, int(torch.randint(clip.shape[1], (), generator=generator))]
        rows, columns = around_object(frame[:, None], size, 8, generator)
        crops.append(clip[..., rows, columns])
    return torch.stack(crops)


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Stock encode (mean) and decode of uint8 clips ``[n, frames, 3, h, w]``: float in [0, 1]."""
    return torch.cat([from_model(decode_whole(vae, encode_whole(vae, to_model(part))[0])) for part in clips.split(16)])


def train_vae(minutes: float, seed: int = 0, resume: bool = False) -> None:
    """Train the autoencoder: three steps of four on windows around the object, every fourth on whole clips."""
    torch.manual_seed(seed)
    vae = use_whole_sequences(make_vae())
    loss = partial(loss_of, partial(encode_whole, vae), partial(decode_whole, vae))
    train_autoencoder(vae, loss, crop_objects, reconstruct_averaged, RUN / "vae.pt", minutes, frames=FRAMES, seed=seed, resume=resume)


def reconstruct_averaged(ema: Ema, clips: Tensor) -> Tensor:
    """As :func:`reconstruct`, by the averaged weights."""
    vae = use_whole_sequences(make_vae())
    ema.copy_to(vae)
    with torch.autocast("cpu", torch.bfloat16):
        return reconstruct(vae, clips)


# ------------------------------------------------------------------------------------------------------------------------ latents


def make_latents(count: int = 10_000) -> None:
    """Encode clips of the seeds 0 to ``count`` and note the latents' mean and deviation per channel."""
    vae = use_whole_sequences(make_vae())
    vae.load_state_dict(averaged(RUN / "vae.pt"))
    save_latents(lambda clips: encode_whole(vae, clips)[0], count, FRAMES, RUN / "latents.pt")


# ---------------------------------------------------------------------------------------------------------------------------- dit

TEXT_CONFIG = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "vocab_size": 48,
}
DIT_CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 768,
    "num_layers": 6,
}
TEXT_LENGTH = 11  # of the longest caption, its end token included
STOCK_TEXT_LENGTH = 512  # what the stock pipeline pads to


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, an end token after the last."""
    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=STOCK_TEXT_LENGTH, **special)


class TrainingAttention:
    """The stock attention, cheaper to train on a CPU: plain products, and captions that only seem to be padded to the stock length.

    The stock pipeline pads captions with zeros to 512 positions and masks none of them. All pads are one and the same vector, so one
    pad whose logit is raised by the logarithm of their number gives exactly the same result.
    """

    def __init__(self) -> None:
        self.bias: Tensor | None = None  # [n, 1, 1, TEXT_LENGTH + 1], added to the logits of cross attention

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        """Same arguments as the stock WanAttnProcessor."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(source)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(source).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        if rotary_emb is not None:
            query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        query = query.transpose(1, 2) * query.shape[-1] ** -0.5
        logits = query.to(value.dtype) @ key.transpose(1, 2).to(value.dtype).mT
        if encoder_hidden_states is not None:
            logits = logits + self.bias.to(logits.dtype)
        out = logits.softmax(-1).to(value.dtype) @ value
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``[n, tokens, heads, channels]``, neighbouring channels forming the pairs."""
    first, second = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2].to(x.dtype), sin[..., 1::2].to(x.dtype)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


def make_transformer() -> WanTransformer3DModel:
    """A fresh transformer whose blocks start as the identity and whose output starts at zero."""
    transformer = WanTransformer3DModel(**DIT_CONFIG)
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(transformer.patch_embedding.weight.flatten(1))
    zeros = [transformer.condition_embedder.time_proj, transformer.proj_out, *(block.attn2.to_out[0] for block in transformer.blocks)]
    for module in zeros:
        nn.init.zeros_(module.weight)
    for module in (transformer, *transformer.blocks):
        nn.init.zeros_(module.scale_shift_table)
    return transformer


class TextToLatents(nn.Module):
    """Text encoder and transformer, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = UMT5EncoderModel(UMT5Config(**TEXT_CONFIG))
        self.transformer = make_transformer()
        self.attention = TrainingAttention()
        for block in self.transformer.blocks:
            block.attn1.set_processor(self.attention)
            block.attn2.set_processor(self.attention)

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """Velocity ``[n, 8, t, h, w]`` at noisy latents of that shape, levels ``[n]`` and token ids ``[n, TEXT_LENGTH]``."""
        mask = tokens != 0
        text = self.text_encoder(tokens, mask.long()).last_hidden_state * mask[..., None]
        text = F.pad(text, (0, 0, 0, 1))  # the one pad
        pads = (STOCK_TEXT_LENGTH - mask.sum(1, keepdim=True)).float().log()
        bias = torch.cat([torch.zeros(mask.shape).masked_fill(~mask, -1e4), pads], 1)
        self.attention.bias = bias[:, None, None]
        return self.transformer(noisy, sigma * 1000, text, return_dict=False)[0].float()


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """Token ids ``[n, TEXT_LENGTH]``."""
    return tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt").input_ids


class LatentData:
    """Normalized latents with captions; the noise is drawn again each time."""

    def __init__(self, seed: int):
        stored = torch.load(RUN / "latents.pt")
        self.mean, self.std = stored["mean"], stored["std"]
        shape = (1, -1, 1, 1, 1)
        self.latents = ((stored["latents"].float() - self.mean.view(shape)) / self.std.view(shape)).half()
        self.scenes = [Scene(**fields) for fields in stored["scenes"]]
        self.tokenizer = make_tokenizer()
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, n: int, held_out: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, noise, levels and tokens. The last 100 latents are held out; noise goes to the latents it is closest to."""
        g, total = self.generator, len(self.scenes)
        index = torch.arange(total - n, total) if held_out else torch.randint(total - 100, (n,), generator=g)
        latents = self.latents[index].float()
        noise, sigma = matched_noise(latents, g), noise_levels(n, g)
        captions = some_captions([self.scenes[i] for i in index.tolist()], g)
        return latents, noise, sigma, tokenize(self.tokenizer, captions)


def flow_loss(model: TextToLatents, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Mean squared error of the velocity, noise minus latents."""
    latents, noise, sigma, tokens = batch
    level = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(latents * (1 - level) + noise * level, sigma, tokens)
    return (velocity - (noise - latents)).square().mean()


def train_dit(minutes: float, seed: int = 0, resume: bool = False) -> None:
    """Train text encoder and transformer. Everything needed to go on is saved every 250 steps."""
    torch.manual_seed(seed)
    model, data = TextToLatents(), LatentData(seed)
    for block in model.transformer.blocks:  # a quarter faster
        block.compile(dynamic=False)
    matrices, rest = split_parameters(model, lambda name, p: p.ndim == 2 and name.startswith("transformer.blocks."))
    optimizers = [Muon(matrices, lr=2e-3), torch.optim.AdamW(rest, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    train_flow(model, optimizers, data.batch, lambda part: flow_loss(model, part), Plan(), RUN / "dit.pt", minutes, resume)


# ------------------------------------------------------------------------------------------------------------- export and figures


def build_pipeline() -> WanPipeline:
    """The stock pipeline with the latest weights, in float32."""
    latents = torch.load(RUN / "latents.pt", mmap=True)
    statistics = {"latents_mean": latents["mean"].tolist(), "latents_std": latents["std"].tolist()}
    vae = AutoencoderKLWan(**{**VAE_CONFIG, **statistics})
    vae.load_state_dict(averaged(RUN / "vae.pt"))
    text_encoder, transformer = UMT5EncoderModel(UMT5Config(**TEXT_CONFIG)), WanTransformer3DModel(**DIT_CONFIG)
    weights = averaged(RUN / "dit.pt")
    for name, module in (("text_encoder", text_encoder), ("transformer", transformer)):
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        missing, unexpected = module.load_state_dict(own, strict=False)
        if unexpected or set(missing) - {"encoder.embed_tokens.weight"}:  # that one is tied to "shared.weight"
            raise RuntimeError(f"{name}: missing {missing}, unexpected {unexpected}")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    parts = {"tokenizer": make_tokenizer(), "text_encoder": text_encoder, "vae": vae, "transformer": transformer, "scheduler": scheduler}
    pipe = WanPipeline(**parts)
    pipe.text_encoder.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export() -> None:
    """Write the pipeline folder in float16, replacing the old one at once."""
    folder, fresh = WEIGHTS / "tiny-dit", WEIGHTS / ".tiny-dit-fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    build_pipeline().to(torch.float16).save_pretrained(fresh, safe_serialization=True)
    index = fresh / "model_index.json"
    index.write_text(index.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    tokenizer = fresh / "tokenizer" / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    write_notes(fresh, CALL, covering_captions(24))
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    say(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20, "MiB")


def write_curve() -> None:
    """Gather the figures of both trainings in one file, and draw it."""
    draw(gather({stage: RUN / f"{stage}.csv" for stage in ("vae", "dit")}, CURVES / "tiny-dit.csv"))


def evaluate(count: int, guidance: float, steps: int, latest: bool) -> None:
    """The judge on generated clips of unseen seeds, and a contact sheet. ``latest`` weights, or the exported folder."""
    pipe = build_pipeline() if latest else DiffusionPipeline.from_pretrained(WEIGHTS / "tiny-dit", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captions = [random_clip(TEST_SEED + 10_000 + i, frames=1)[1] for i in range(count)]
    start = time.perf_counter()
    call = CALL | {"guidance_scale": guidance, "num_inference_steps": steps}
    clips = generate(pipe, captions, **call)
    seconds = (time.perf_counter() - start) / count
    say(f"generated n={count} guidance={guidance} steps={steps} {seconds:.2f} s a clip:", rounded(accuracy(clips, captions)))
    contact_sheet(clips[:12], RUN / f"sheet-g{guidance:g}-s{steps}.png", captions[:12])


def ceilings(count: int) -> None:
    """The judge on real clips of unseen seeds and on their reconstructions by the exported autoencoder."""
    vae = AutoencoderKLWan.from_pretrained(WEIGHTS / "tiny-dit", subfolder="vae", torch_dtype=torch.float32)
    vae = use_whole_sequences(vae)
    judge_reconstructions(partial(reconstruct, vae), count, FRAMES, RUN / "sheet-vae.png")


def main() -> None:
    """Command line."""
    parser = stage_parser(__doc__, ("vae", "latents", "dit", "export", "evaluate", "ceilings"), RUN, minutes=11.0, count=200)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--latest", action="store_true", help="evaluate the latest checkpoint instead of the exported folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stages = {
        "vae": lambda: train_vae(args.minutes, resume=args.resume),
        "latents": make_latents,
        "dit": lambda: train_dit(args.minutes, resume=args.resume),
        "export": lambda: (export(), write_curve()),
        "evaluate": lambda: evaluate(args.count, args.guidance, args.steps, args.latest),
        "ceilings": lambda: ceilings(args.count),
    }
    stages[args.stage]()


if __name__ == "__main__":
    main()
