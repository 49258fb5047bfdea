"""Discovery on the denoisers of twelve pipelines: the expected names were written by hand from the sources of the models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from reelquant._errors import UnsupportedError
from reelquant.discover import bind, denoiser_of, denoisers_of, discover, dummy_inputs
from reelquant.discover.arguments import kind_of
from reelquant.discover.lineage import extremes, is_norm
from reelquant.discover.probe import fingerprint
from reelquant.sites import DenoiserMap, Group
from tests.tiny.configs import TINY, build

UNET_BLOCKS = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")


@dataclass(frozen=True)
class Expected:
    """What must be found, as patterns in which ``N`` is a number, ``{a,b}`` either word, ``**`` any path. Exact: no more, no less."""

    entry: str
    exit: str
    temporal: tuple[str, ...]
    prompt: tuple[str, ...]
    together: tuple[tuple[str, ...], ...]
    blocks: tuple[str, ...]
    constant: tuple[str, ...] = ()
    arguments: tuple[str, str, str] = ("timestep", "hidden_states", "encoder_hidden_states")


def qkv(attention: str) -> tuple[str, ...]:
    return tuple(f"{attention}.to_{x}" for x in "qkv")


EXPECTED = {
    "WanTransformer3DModel": Expected(
        entry="patch_embedding",
        exit="proj_out",
        temporal=("condition_embedder.time_embedder.linear_N", "condition_embedder.time_proj"),
        prompt=("condition_embedder.text_embedder.linear_N", "blocks.N.attn2.to_{k,v}"),
        together=(qkv("blocks.0.attn1"), qkv("blocks.1.attn1"), tuple(f"blocks.{i}.attn2.to_{x}" for i in (0, 1) for x in "kv")),
        blocks=("blocks.0", "blocks.1"),
    ),
    "CogVideoXTransformer3DModel": Expected(
        entry="patch_embed.proj",
        exit="proj_out",
        temporal=("time_embedding.linear_N", "transformer_blocks.N.norm{1,2}.linear", "norm_out.linear"),
        prompt=("patch_embed.text_proj",),
        together=(qkv("transformer_blocks.0.attn1"), qkv("transformer_blocks.1.attn1")),
        blocks=("transformer_blocks.0", "transformer_blocks.1"),
    ),
    "LTXVideoTransformer3DModel": Expected(
        entry="proj_in",
        exit="proj_out",
        temporal=("time_embed.emb.timestep_embedder.linear_N", "time_embed.linear"),
        prompt=("caption_projection.linear_N", "transformer_blocks.N.attn2.to_{k,v}"),
        together=(qkv("transformer_blocks.0.attn1"), tuple(f"transformer_blocks.{i}.attn2.to_{x}" for i in (0, 1) for x in "kv")),
        blocks=("transformer_blocks.0", "transformer_blocks.1"),
    ),
    "HunyuanVideoTransformer3DModel": Expected(
        entry="x_embedder.proj",
        exit="proj_out",
        temporal=(
            "time_text_embed.timestep_embedder.linear_N",
            "context_embedder.time_text_embed.timestep_embedder.linear_N",
            # the text refiner gates its residuals with the timestep: everything after the first gate follows it
            "context_embedder.token_refiner.refiner_blocks.N.norm_out.linear",
            "context_embedder.token_refiner.refiner_blocks.N.ff.net.{0.proj,2}",
            "context_embedder.token_refiner.refiner_blocks.1.attn.to_{q,k,v,out.0}",
            "transformer_blocks.N.norm1.linear",
            "transformer_blocks.N.norm1_context.linear",
            "transformer_blocks.0.attn.add_{q,k,v}_proj",  # text tokens, modulated, before they met the video
            "single_transformer_blocks.N.norm.linear",
            "norm_out.linear",
        ),
        prompt=(
            "context_embedder.proj_in",
            "context_embedder.time_text_embed.text_embedder.linear_N",
            "context_embedder.token_refiner.refiner_blocks.0.attn.to_{q,k,v,out.0}",
            "time_text_embed.text_embedder.linear_N",
            "time_text_embed.guidance_embedder.linear_N",
        ),
        together=(
            qkv("transformer_blocks.0.attn"),
            tuple(f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"),
            qkv("single_transformer_blocks.0.attn"),
        ),
        blocks=("transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1"),
    ),
    "MochiTransformer3DModel": Expected(
        entry="patch_embed.proj",
        exit="proj_out",
        temporal=(
            "time_embed.timestep_embedder.linear_N",
            "transformer_blocks.N.norm1.linear",
            "transformer_blocks.0.norm1_context.linear",
            "transformer_blocks.1.norm1_context.linear_1",
            "transformer_blocks.0.attn1.add_{q,k,v}_proj",
            "norm_out.linear",
        ),
        prompt=("time_embed.pooler.to_{q,kv,out}", "time_embed.caption_proj"),
        together=(qkv("transformer_blocks.0.attn1"), tuple(f"transformer_blocks.0.attn1.add_{x}_proj" for x in "qkv")),
        blocks=("transformer_blocks.0", "transformer_blocks.1"),
    ),
    "LatteTransformer3DModel": Expected(
        entry="pos_embed.proj",
        exit="proj_out",
        temporal=("adaln_single.emb.timestep_embedder.linear_N", "adaln_single.linear"),
        prompt=("caption_projection.linear_N", "transformer_blocks.N.attn2.to_{k,v}"),
        together=(
            qkv("transformer_blocks.0.attn1"),
            qkv("temporal_transformer_blocks.1.attn1"),
            tuple(f"transformer_blocks.{i}.attn2.to_{x}" for i in (0, 1) for x in "kv"),
        ),
        blocks=("transformer_blocks.0", "temporal_transformer_blocks.0", "transformer_blocks.1", "temporal_transformer_blocks.1"),
    ),
    "UNetMotionModel": Expected(
        entry="conv_in",
        exit="conv_out",
        temporal=("time_embedding.linear_N", "**.resnets.N.time_emb_proj"),
        prompt=("**.attentions.N.transformer_blocks.0.attn2.to_{k,v}",),  # both attentions of a motion module look at the video
        together=(
            qkv("down_blocks.0.motion_modules.0.transformer_blocks.0.attn1"),
            qkv("down_blocks.0.motion_modules.0.transformer_blocks.0.attn2"),
            qkv("up_blocks.1.attentions.0.transformer_blocks.0.attn1"),
        ),
        blocks=UNET_BLOCKS,
        arguments=("timestep", "sample", "encoder_hidden_states"),
    ),
    "UNet3DConditionModel": Expected(
        entry="conv_in",
        exit="conv_out",
        temporal=("time_embedding.linear_N", "**.resnets.N.time_emb_proj"),
        prompt=("**.attentions.N.transformer_blocks.0.attn2.to_{k,v}",),
        together=(
            qkv("transformer_in.transformer_blocks.0.attn1"),
            qkv("mid_block.temp_attentions.0.transformer_blocks.0.attn2"),
            tuple(
                f"{where}.transformer_blocks.0.attn2.to_{x}"
                for where in ("down_blocks.0.attentions.0", "mid_block.attentions.0", *(f"up_blocks.1.attentions.{i}" for i in (0, 1)))
                for x in "kv"
            ),
        ),
        blocks=("transformer_in", *UNET_BLOCKS),
        arguments=("timestep", "sample", "encoder_hidden_states"),
    ),
    "UNetSpatioTemporalConditionModel": Expected(
        entry="conv_in",
        exit="conv_out",
        temporal=("time_embedding.linear_N", "**.{spatial,temporal}_res_block.time_emb_proj"),
        prompt=("add_embedding.linear_N", "**.attn2.to_{k,v}"),
        constant=("**.time_pos_embed.linear_N",),  # reads the frame numbers
        together=(
            qkv("down_blocks.0.attentions.0.transformer_blocks.0.attn1"),
            qkv("down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1"),
        ),
        blocks=UNET_BLOCKS,
        arguments=("timestep", "sample", "encoder_hidden_states"),
    ),
    "UNet2DConditionModel": Expected(
        entry="conv_in",
        exit="conv_out",
        temporal=("time_embedding.linear_N", "**.resnets.N.time_emb_proj"),
        prompt=("add_embedding.linear_N", "**.attn2.to_{k,v}"),
        together=(qkv("mid_block.attentions.0.transformer_blocks.1.attn1"),),
        blocks=UNET_BLOCKS,
        arguments=("timestep", "sample", "encoder_hidden_states"),
    ),
    "PixArtTransformer2DModel": Expected(
        entry="pos_embed.proj",
        exit="proj_out",
        temporal=("adaln_single.emb.timestep_embedder.linear_N", "adaln_single.linear"),
        prompt=("caption_projection.linear_N", "transformer_blocks.N.attn2.to_{k,v}"),
        together=(qkv("transformer_blocks.1.attn1"), tuple(f"transformer_blocks.{i}.attn2.to_{x}" for i in (0, 1) for x in "kv")),
        blocks=("transformer_blocks.0", "transformer_blocks.1"),
    ),
    "FluxTransformer2DModel": Expected(
        entry="x_embedder",
        exit="proj_out",
        temporal=(
            "time_text_embed.timestep_embedder.linear_N",
            "transformer_blocks.N.norm1.linear",
            "transformer_blocks.N.norm1_context.linear",
            "transformer_blocks.0.attn.add_{q,k,v}_proj",
            "single_transformer_blocks.N.norm.linear",
            "norm_out.linear",
        ),
        prompt=("context_embedder", "time_text_embed.{text,guidance}_embedder.linear_N"),
        together=(
            qkv("transformer_blocks.0.attn"),
            # one norm feeds attention and MLP alike; q, k, v come after the MLP's first half
            ("single_transformer_blocks.0.proj_mlp", *qkv("single_transformer_blocks.0.attn")),
        ),
        blocks=("transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1"),
    ),
}

_FOUND: dict[str, DenoiserMap] = {}


def found(cls: str) -> DenoiserMap:
    """The map of a tiny model, made once."""
    if cls not in _FOUND:
        _FOUND[cls] = discover(TINY[cls]())
    return _FOUND[cls]


def expand(patterns: tuple[str, ...], names: dict) -> set[str]:
    """Names that the patterns match; a pattern without a match is a mistake in the test."""
    hits: set[str] = set()
    for pattern in patterns:
        regex = re.escape(pattern).replace("N", r"\d+").replace(r"\*\*", ".+")
        regex = re.sub(r"\\{(.*?)\\}", lambda m: "(" + m[1].replace(",", "|") + ")", regex)
        matched = {name for name in names if re.fullmatch(regex, name)}
        assert matched, f"{pattern} stands for no layer"
        hits |= matched
    return hits


@pytest.mark.parametrize("cls", EXPECTED)
def test_roles_are_exactly_those_of_the_source(cls: str) -> None:
    expected, map_ = EXPECTED[cls], found(cls)
    assert set(map_.by_role("temporal")) == expand(expected.temporal, map_.layers)
    assert set(map_.by_role("prompt")) == expand(expected.prompt, map_.layers)
    assert set(map_.by_role("constant")) == expand(expected.constant, map_.layers)
    assert map_.by_role("entry") == (expected.entry,)
    assert map_.by_role("exit") == (expected.exit,)


@pytest.mark.parametrize("cls", EXPECTED)
def test_layers_that_read_one_tensor_are_together(cls: str) -> None:
    map_ = found(cls)
    for layers in EXPECTED[cls].together:
        assert map_.group_of(layers[0]).layers == layers
    members = [name for group in map_.groups for name in group.layers]
    assert sorted(members) == sorted(name for name, layer in map_.layers.items() if layer.calls)


@pytest.mark.parametrize("cls", EXPECTED)
def test_blocks_and_arguments(cls: str) -> None:
    map_ = found(cls)
    assert map_.blocks == EXPECTED[cls].blocks
    assert (map_.timestep_argument, map_.latent_argument, map_.prompt_argument) == EXPECTED[cls].arguments
    assert [layer.order for layer in map_.layers.values()] == list(range(len(map_.layers)))  # in these models every layer runs


def test_the_end_of_a_transformer_is_its_last_block_and_of_a_unet_the_last_member_of_each_list() -> None:
    def ends(cls: str) -> set[str]:
        return {name for name, layer in found(cls).layers.items() if layer.last}

    single = ends("HunyuanVideoTransformer3DModel")
    assert single and all(name.startswith("single_transformer_blocks.1.") for name in single)
    assert len(single) == sum(name.startswith("single_transformer_blocks.1.") for name in found("HunyuanVideoTransformer3DModel").layers)
    unet = found("UNetMotionModel")
    parts = {part for name in ends("UNetMotionModel") for part in [".".join(name.split(".")[:4])]}
    last = {name.split(".")[2]: ".".join(name.split(".")[:4]) for name in unet.layers if name.startswith(f"{unet.blocks[-1]}.")}
    assert parts == {last[kind] for kind in ("resnets", "attentions", "motion_modules")}
    assert all(layer.end == name.startswith("up_blocks.1.") for name, layer in unet.layers.items())
    assert all(layer.end == layer.last for layer in found("HunyuanVideoTransformer3DModel").layers.values())


def test_dependencies_are_recorded_exactly() -> None:
    sdxl, svd = found("UNet2DConditionModel").layers, found("UNetSpatioTemporalConditionModel").layers
    assert sdxl["time_embedding.linear_1"].depends == {"timestep"}
    assert sdxl["add_embedding.linear_1"].depends == {"prompt", "other"}
    assert sdxl["mid_block.resnets.0.time_emb_proj"].depends == {"timestep", "prompt", "other"}
    assert sdxl["conv_in"].depends == {"latent"}
    assert svd["add_embedding.linear_1"].depends == {"other"}
    assert found("FluxTransformer2DModel").layers["time_text_embed.guidance_embedder.linear_1"].depends == {"other"}


def test_a_note_says_when_temporal_layers_follow_the_prompt_too() -> None:
    assert "transformer_blocks.0.norm1.linear" in found("MochiTransformer3DModel").notes[0]
    assert found("WanTransformer3DModel").notes == ()


def test_seams_are_at_the_skip_connections_of_the_up_blocks() -> None:
    groups = found("UNet3DConditionModel").groups
    seams = {group.name: group.seam for group in groups if group.seam is not None}
    # channels 16 and 32, one resnet going down, two going up; the second number is what the block below hands up
    below = {"up_blocks.0.resnets.0": 32, "up_blocks.0.resnets.1": 32, "up_blocks.1.resnets.0": 32, "up_blocks.1.resnets.1": 16}
    assert seams == {f"{resnet}.{conv}": n for resnet, n in below.items() for conv in ("conv1", "conv_shortcut")}


def test_tokens_joined_in_a_row_are_no_seam() -> None:
    assert all(group.seam is None for group in found("CogVideoXTransformer3DModel").groups)


def test_norms_of_a_unet_transformer_block_fold() -> None:
    map_ = found("UNet2DConditionModel")
    block = "mid_block.attentions.0.transformer_blocks.0"
    for layer, norm in ((f"{block}.attn1.to_q", "norm1"), (f"{block}.attn2.to_q", "norm2"), (f"{block}.ff.net.0.proj", "norm3")):
        group = map_.group_of(layer)
        assert (group.producer, group.producer_kind, group.foldable, group.fold_shift) == (f"{block}.{norm}", "LayerNorm", True, True)
    into = map_.group_of("mid_block.attentions.0.proj_in")  # group norm, channels moved last, linear
    assert (into.producer, into.foldable) == ("mid_block.attentions.0.norm", True)
    assert not map_.group_of("mid_block.resnets.0.conv1").foldable  # an activation stands between
    assert not map_.group_of("mid_block.attentions.0.transformer_blocks.0.attn2.to_k").foldable


def test_sources_are_values_and_ungated_halves_and_nothing_behind_an_activation() -> None:
    unet = found("UNetMotionModel")
    block = "mid_block.attentions.0.transformer_blocks.0"
    pairs = {(group.name, group.source, group.source_row) for group in unet.groups if group.name.startswith(block) and group.source}
    expected = {(f"{block}.attn{i}.to_out.0", f"{block}.attn{i}.to_v", 0) for i in (1, 2)}
    assert pairs == expected | {(f"{block}.ff.net.2", f"{block}.ff.net.0.proj", 0)}  # GEGLU: the second half is the gate
    assert unet.group_of("mid_block.resnets.0.conv2").source is None
    wan = found("WanTransformer3DModel")
    assert wan.group_of("blocks.0.attn1.to_out.0").source == "blocks.0.attn1.to_v"
    assert wan.group_of("blocks.0.ffn.net.2").source is None  # a GELU stands between
    assert wan.group_of("blocks.1.attn1.to_q").source is None  # the stream of all blocks has many readers


class Halves(nn.Module):
    """A feed-forward whose first half is the gate; with a spy, something else reads the other half as well."""

    def __init__(self, activation: nn.Module, spy: bool = False) -> None:
        super().__init__()
        self.start, self.up, self.down, self.activation, self.spy = nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(6, 8), activation, spy
        self.end = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.start(hidden_states)
        gate, value = self.up(x).chunk(2, -1)
        x = x + self.down(self.activation(gate) * value)
        return self.end(x + value.sum() if self.spy else x)


def test_a_source_may_be_a_part_of_a_layer_and_has_one_reader() -> None:
    def source(model: nn.Module) -> tuple[str | None, int]:
        group = discover(model, {"hidden_states": torch.randn(1, 3, 8)}).group_of("down")
        return group.source, group.source_row

    assert source(Halves(nn.GELU())) == ("up", 6)
    assert source(Halves(nn.ReLU())) == ("up", 0)  # positively homogeneous: either half would do
    assert source(Halves(nn.GELU(), spy=True)) == (None, 0)


def test_modulated_norms_do_not_fold_but_the_plain_one_of_wan_does() -> None:
    map_ = found("WanTransformer3DModel")
    assert not map_.group_of("blocks.0.attn1.to_q").foldable
    assert not map_.group_of("blocks.0.ffn.net.0.proj").foldable
    cross = map_.group_of("blocks.0.attn2.to_q")
    assert (cross.producer, cross.producer_kind, cross.foldable) == ("blocks.0.norm2", "FP32LayerNorm", True)
    assert not found("UNetMotionModel").group_of("mid_block.motion_modules.0.transformer_blocks.0.attn1.to_q").foldable  # + positions


OTHERS = {
    "I2VGenXLUNet": dict(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        num_attention_heads=None,
    ),
    "DiTTransformer2DModel": dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    ),
    "QwenImageTransformer2DModel": dict(
        patch_size=2, in_channels=8, out_channels=2, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "ends", "temporal"),
    [
        ("I2VGenXLUNet", ("conv_in", "conv_out"), ("time_embedding.linear_N", "**.time_emb_proj")),
        (
            "DiTTransformer2DModel",
            ("pos_embed.proj", "proj_out_2"),  # proj_out_1 makes the last modulation
            ("transformer_blocks.N.norm1.{linear,emb.timestep_embedder.linear_1,emb.timestep_embedder.linear_2}", "proj_out_1"),
        ),
        (
            "QwenImageTransformer2DModel",
            ("img_in", "proj_out"),
            (
                "time_text_embed.timestep_embedder.linear_N",
                "transformer_blocks.N.{img,txt}_mod.1",
                "transformer_blocks.0.attn.add_{q,k,v}_proj",
                "norm_out.linear",
            ),
        ),
    ],
)
def test_denoisers_outside_of_the_list_of_families(cls: str, ends: tuple[str, str], temporal: tuple[str, ...]) -> None:
    map_ = discover(build(cls, **OTHERS[cls]))
    assert (map_.by_role("entry"), map_.by_role("exit")) == ((ends[0],), (ends[1],))
    assert set(map_.by_role("temporal")) == expand(temporal, map_.layers)


# --------------------------------------------------------------------------------------------------------- the model is left alone
@pytest.mark.parametrize("cls", ["UNetMotionModel", "WanTransformer3DModel", "MochiTransformer3DModel"])
def test_the_model_is_left_exactly_as_it_was(cls: str) -> None:
    model = TINY[cls]().train()
    model.get_submodule(next(name for name, _ in model.named_children())).eval()  # a mix of flags must survive
    modules = list(model.modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: x.detach().clone() for name, x in tensors.items()}
    storage = {name: x.data_ptr() for name, x in tensors.items()}
    flags, random = [m.training for m in modules], torch.get_rng_state()
    discover(model)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert after.keys() == before.keys()
    assert all(after[name] is tensors[name] and after[name].data_ptr() == storage[name] for name in before)
    assert all(torch.equal(after[name].view(torch.uint8), x.view(torch.uint8)) for name, x in before.items() if x.ndim)
    assert [m.training for m in modules] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_the_model_is_restored_when_probing_fails() -> None:
    model = Gated().train()
    with pytest.raises(UnsupportedError, match="NaN or inf"):
        discover(model, {"hidden_states": torch.full((1, 3, 8), torch.nan), "timestep": torch.ones(1, 8)})
    assert model.training
    assert not model.gate.any()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", ["WanTransformer3DModel", "UNetMotionModel", "FluxTransformer2DModel"])
def test_half_precision_gives_the_same_map(cls: str, dtype: torch.dtype) -> None:
    half, full = discover(TINY[cls]().to(dtype)), found(cls)
    assert {name: (x.role, x.depends) for name, x in half.layers.items()} == {name: (x.role, x.depends) for name, x in full.layers.items()}
    assert half.groups == full.groups


def test_compiled_models_are_looked_at_uncompiled() -> None:
    model = TINY["WanTransformer3DModel"]()
    for block in model.blocks:
        block.compile(backend="eager")
    assert discover(torch.compile(model, backend="eager")) == found("WanTransformer3DModel")


# --------------------------------------------------------------------------------------------------------------------- recorded calls
@pytest.mark.parametrize("cls", ["WanTransformer3DModel", "CogVideoXTransformer3DModel"])
def test_a_recorded_call_gives_the_same_map_as_dummy_inputs(cls: str) -> None:
    model = TINY[cls]()
    dummy = dummy_inputs(model)
    calls: list[dict] = []
    hook = model.register_forward_pre_hook(lambda m, args, kwargs: calls.append(bind(m, args, kwargs)), with_kwargs=True)
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    order = names if cls.startswith("Wan") else ("hidden_states", "encoder_hidden_states", "timestep")
    with torch.no_grad():
        model(*(dummy[name] for name in order), return_dict=False)  # by position, as some pipelines do
    hook.remove()
    assert discover(model, calls[0]) == found(cls)


def test_attention_to_a_single_picture_token_is_constant() -> None:
    # SVD's real condition is one token: the softmax over it is 1, so what leaves the attention follows the picture alone
    model = TINY["UNetSpatioTemporalConditionModel"]()
    inputs = dummy_inputs(model)
    map_ = discover(model, inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :1]})
    ordinary = found("UNetSpatioTemporalConditionModel").by_role("prompt")
    assert set(map_.by_role("prompt")) - set(ordinary) == expand(("**.attn2.to_out.0",), map_.layers)


def test_a_timestep_may_be_a_plain_number() -> None:
    model = TINY["UNet2DConditionModel"]()
    inputs = dummy_inputs(model) | {"timestep": 500}
    assert discover(model, inputs).layers == found("UNet2DConditionModel").layers


# ------------------------------------------------------------------------------------------------------------------- made-up modules
class Gated(nn.Module):
    """A branch that a zero gate switches off, as in adaLN-zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.time, self.after = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.gate = nn.Parameter(torch.zeros(8))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.after(self.first(hidden_states) + self.gate * self.time(timestep))


def test_a_zero_gate_hides_nothing() -> None:
    map_ = discover(Gated(), {"hidden_states": torch.randn(1, 3, 8), "timestep": torch.randn(1, 8)})
    assert map_.layers["after"].depends == {"latent", "timestep"}
    assert {name: layer.role for name, layer in map_.layers.items()} == {"first": "entry", "time": "temporal", "after": "exit"}


class Attention(nn.Module):
    """Norm, then q, k and v; with a spy, something else reads the norm as well."""

    def __init__(self, norm: nn.Module, spy: bool = False, keyword: bool = False) -> None:
        super().__init__()
        self.start, self.norm, self.spy, self.keyword = nn.Linear(8, 8), norm, spy, keyword
        self.q, self.k, self.v, self.idle, self.out = (nn.Linear(8, 8, bias=False) for _ in range(5))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.norm(self.start(hidden_states))
        batch, tokens, _ = x.shape  # looking at the shape is not reading
        q, k, v = (layer(input=x) if self.keyword else layer(x) for layer in (self.q, self.k, self.v))
        return self.out((q @ k.mT).view(batch, tokens, tokens).softmax(-1) @ v + (x * 2 if self.spy else 0))


def read_group(model: nn.Module) -> Group:
    return discover(model, {"hidden_states": torch.randn(1, 3, 8)}).group_of("q")


def test_foldable_until_somebody_else_reads_the_norm() -> None:
    assert read_group(Attention(nn.LayerNorm(8))) == Group(("q", "k", "v"), "main", "norm", "LayerNorm", foldable=True, fold_shift=True)
    assert read_group(Attention(nn.LayerNorm(8), spy=True)) == Group(("q", "k", "v"), "main", "norm", "LayerNorm")


def test_only_a_norm_with_a_bias_takes_a_shift() -> None:
    group = read_group(Attention(nn.RMSNorm(8)))
    assert (group.foldable, group.fold_shift) == (True, False)
    group = read_group(Attention(nn.LayerNorm(8, elementwise_affine=False)))
    assert (group.producer, group.foldable) == ("norm", False)


def test_keyword_calls_and_idle_layers() -> None:
    map_ = discover(Attention(nn.LayerNorm(8), keyword=True), {"hidden_states": torch.randn(1, 3, 8)})
    assert map_.group_of("q").layers == ("q", "k", "v")
    idle = map_.layers["idle"]
    assert (idle.calls, idle.order, idle.depends, list(map_.layers)[-1]) == (0, -1, frozenset(), "idle")
    assert map_.notes == ("1 layers never ran in the probing call, first 'idle'",)


class Convolutions(nn.Module):
    """Two convolutions after group norms; only the unpadded one can take a shift exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.out = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.norm1, self.norm2 = nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)
        self.open, self.padded = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        x = self.start(sample)
        x = self.padded(self.norm2(self.open(self.norm1(x))))
        return self.out(torch.cat([x, x * 2], dim=-3))


def test_a_padded_convolution_does_not_fold() -> None:
    map_ = discover(Convolutions(), {"sample": torch.randn(1, 4, 7, 6)})
    assert (map_.group_of("open").producer, map_.group_of("open").foldable) == ("norm1", True)
    assert (map_.group_of("padded").producer, map_.group_of("padded").foldable) == ("norm2", False)
    assert map_.group_of("out").seam == 4


def test_folding_where_the_map_allows_it_keeps_the_output() -> None:
    model = Attention(nn.LayerNorm(8)).double()
    x, scale, shift = torch.randn(1, 3, 8).double(), torch.rand(8).double() + 0.5, torch.randn(8).double()
    group = discover(model, {"hidden_states": x}).group_of("q")
    before = model(x)
    norm = model.get_submodule(str(group.producer))
    assert isinstance(norm, nn.LayerNorm)
    with torch.no_grad():
        for name in group.layers:
            layer = model.get_submodule(name)
            layer.bias = nn.Parameter(-(layer.weight / scale) @ shift)
            layer.weight.copy_(layer.weight / scale)
        norm.weight.mul_(scale)
        norm.bias.mul_(scale).add_(shift)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------------------ refusals
class Strange(nn.Module):
    """Needs an argument that cannot be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"in_channels": 4}
        self.layer = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor, camera_path: Tensor) -> Tensor:
        return self.layer(hidden_states) + timestep.sum() + camera_path


def test_refusals_name_the_argument_and_the_way_out() -> None:
    with pytest.raises(UnsupportedError, match=r"argument 'camera_path' of Strange.*pass inputs="):
        discover(Strange())
    with pytest.raises(UnsupportedError, match=r"Linear has no config.in_channels.*pass inputs="):
        discover(nn.Linear(3, 3))
    with pytest.raises(UnsupportedError, match=r"missing a required argument: 'camera_path'"):
        discover(Strange(), {"hidden_states": torch.randn(1, 2, 4), "timestep": torch.ones(1)})
    inputs = {"hidden_states": torch.randn(1, 2, 4), "timestep": torch.ones(1), "camera_path": torch.zeros(1)}
    assert discover(Strange(), inputs).by_role("entry") == ("layer",)


def test_every_layout_that_failed_is_told() -> None:
    model = TINY["WanTransformer3DModel"]()
    model.condition_embedder.text_embedder.linear_1 = nn.Linear(5, 24)  # the config says 16
    with pytest.raises(UnsupportedError, match=r"Wan\w+; tried the latent as bcthw .*; bchw .*; btchw .*; bnc .*pass inputs="):
        discover(model)


def test_noise_in_the_forward_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(4, 4), 0

        def forward(self, hidden_states: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(hidden_states + self.calls)

    with pytest.raises(UnsupportedError, match="different values for equal inputs, first at layer 'layer'"):
        discover(Noisy(), {"hidden_states": torch.randn(1, 2, 4)})


# --------------------------------------------------------------------------------------------------------------------- small pieces
def test_denoisers_of_a_pipeline() -> None:
    first, second = TINY["WanTransformer3DModel"](), TINY["WanTransformer3DModel"]()

    pipeline = SimpleNamespace(vae=nn.Linear(2, 2), transformer_2=second, scheduler=object(), transformer=first)
    assert list(denoisers_of(pipeline)) == ["transformer", "transformer_2"]
    name, module = denoiser_of(pipeline)
    assert (name, module is first) == ("transformer", True)
    with pytest.raises(UnsupportedError, match=r"no denoiser: none of its components \(vae\)"):
        denoiser_of(SimpleNamespace(vae=nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (("hidden_states",), "latent"),
        (("audio_hidden_states",), "latent"),
        (("timestep",), "timestep"),
        (("audio_timestep",), "timestep"),
        (("audio_encoder_hidden_states",), "prompt"),
        (("encoder_hidden_states_image",), "image"),
        (("encoder_hidden_states",), "prompt"),
        (("added_cond_kwargs", "text_embeds"), "prompt"),
        (("added_cond_kwargs", "time_ids"), "other"),
        (("image_rotary_emb", 0), "other"),
        (("img_ids",), "other"),
        (("guidance",), "other"),
        (("x", 0), "latent"),
    ],
)
def test_kind_of_an_argument_by_name(path: tuple, kind: str) -> None:
    assert kind_of(path) == kind


def test_fingerprints_tell_tensors_apart_by_one_bit_and_by_order() -> None:
    x = torch.randn(3, 5)
    nudged = x.clone()
    nudged[1, 2] = torch.nextafter(x[1, 2], torch.tensor(torch.inf))
    assert fingerprint(x) == fingerprint(x.clone())
    assert fingerprint(x) != fingerprint(nudged)
    assert fingerprint(x) != fingerprint(x.flip(0))
    assert fingerprint(x) != fingerprint(x.view(5, 3))
    assert fingerprint(torch.zeros(2)) == fingerprint(-torch.zeros(2))


def test_extremes_per_channel() -> None:
    low, high = extremes(torch.tensor([[[1.0, -2.0], [3.0, 5.0]]]), -1)
    assert (low.tolist(), high.tolist()) == ([1.0, -2.0], [3.0, 5.0])
    assert is_norm(nn.GroupNorm(2, 4)) and not is_norm(nn.LayerNorm(4, elementwise_affine=False))
