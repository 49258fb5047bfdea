"""Every other denoiser of the installed diffusers opens quantized; most are probed, and then they also run."""

from __future__ import annotations

import pytest

from tests.families.sweep import attempt, unlisted
from tests.grids import ALL


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # whatever 58 classes of diffusers have to say about tiny sizes
@pytest.mark.parametrize("name", unlisted() if ALL else [])  # the list alone imports every model of diffusers
def test_an_unlisted_denoiser_is_quantized(name: str) -> None:
    found = attempt(name)
    assert found.quantized > 0
    if name in OUTLINED:
        assert found.refusal, "it is probed now: take it off the list"
    else:
        assert found.refusal is None, found.refusal
        assert found.error is not None and found.error > 20


OUTLINED = frozenset(
    {
        "AceStepTransformer1DModel",
        "AnyFlowFARTransformer3DModel",
        "AnyFlowTransformer3DModel",
        "BriaFibo2Transformer2DModel",
        "BriaFiboTransformer2DModel",
        "CosmosControlNetModel",
        "ErnieImageTransformer2DModel",
        "GlmImageTransformer2DModel",
        "HiDreamImageTransformer2DModel",
        "HunyuanDiT2DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "Ideogram4Transformer2DModel",
        "JoyImageEditPlusTransformer3DModel",
        "Kandinsky3UNet",
        "Kandinsky5Transformer3DModel",
        "Kandinsky6SRTransformer3DModel",
        "Kandinsky6Transformer3DModel",
        "Krea2Transformer2DModel",
        "LuminaNextDiT2DModel",
        "MiniMaxH3Transformer3DModel",
        "MiniMaxMusic3Transformer1DModel",
        "OmniGenTransformer2DModel",
        "PriorTransformer",
        "QwenImage21Transformer2DModel",
        "SanaWMLTX2RefinerTransformer3DModel",
        "SanaWMTransformer3DModel",
        "StableAudio3DiTModel",
        "StableAudioDiTModel",
        "TransformerTemporalModel",
        "UNet1DModel",
        "WanAnimate2Transformer3DModel",
        "WanAnimateTransformer3DModel",
        "ZImageControlNetModel",
        "ZImageTransformer2DModel",
    }
)
"""Classes whose arguments cannot be made up from their configurations."""
