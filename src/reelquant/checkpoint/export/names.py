"""Names of tensors in the original checkpoints, which ComfyUI and GGUF readers know, from those of diffusers.

Only models whose original tensors are those of diffusers one by one are listed: others fuse or split tensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

WAN = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"^(vace_blocks\.\d+)\.proj_in\.", r"\1.before_proj."),
    (r"^(vace_blocks\.\d+)\.proj_out\.", r"\1.after_proj."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.norm2\.", ".norm-2."),  # norms 2 and 3 change places
    (r"\.norm3\.", ".norm2."),
    (r"\.norm-2\.", ".norm3."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)
LTX = (
    (r"^proj_in\.", "patchify_proj."),
    (r"^time_embed\.", "adaln_single."),
    (r"\.norm_([qk])\.", r".\1_norm."),
)


@dataclass(frozen=True)
class Naming:
    """How a file calls its tensors.

    Attributes:
        words: for people.
        architecture: what GGUF readers call the model.
        rules: patterns and replacements, applied in this order.
    """

    words: str
    architecture: str
    rules: Sequence[tuple[str, str]] = ()

    def __call__(self, name: str) -> str:
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name


ORIGINAL: dict[str, Naming] = {
    "WanTransformer3DModel": Naming("those of the original Wan checkpoints", "wan", WAN),
    "WanVACETransformer3DModel": Naming("those of the original Wan checkpoints", "wan", WAN),
    "SkyReelsV2Transformer3DModel": Naming("those of the original SkyReels-V2 checkpoints (as Wan's)", "wan", WAN),
    "LTXVideoTransformer3DModel": Naming("those of the original LTX-Video checkpoints", "ltxv", LTX),
}
DIFFUSERS = Naming(
    "those of diffusers, by which ComfyUI recognises few models: there is no table of original names for this one", "diffusers"
)


def naming_of(kind: str) -> Naming:
    """Names for a class of model."""
    return ORIGINAL.get(kind, DIFFUSERS)
