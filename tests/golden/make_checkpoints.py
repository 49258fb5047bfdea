"""Write the golden checkpoints: small quantized denoisers as one release saved them, with what they computed.

Run this script only with the release that a stored format came from, never with newer code: the folders prove that newer code
still reads what that release wrote. The folders of format 1 were written at commit e413575. From the root of this checkout, with
``RELEASE`` the path of a checkout of that release:

    PYTHONPATH=RELEASE/src:. OMP_NUM_THREADS=1 python tests/golden/make_checkpoints.py FOLDER

Every sub-folder of ``FOLDER`` is one case of :func:`cases`:

- ``config.json`` and ``diffusion_pytorch_model.safetensors``: the denoiser, as ``save_pretrained`` writes it;
- ``expected.safetensors``: the arguments of a few denoiser calls (``hidden.0``, ``time.0``, ``text.0`` ...), the outputs of the
  reference kernels (``output.0`` ...), and the outputs of the same denoiser with float layers that hold the dequantized weights
  (``float.0`` ...);
- ``expected.json``: the SHA-256 of every tensor of the state dict and of every layer's dequantized weight.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.tiny.configs import TINY, build
from tests.tiny.pipelines import FakePipeline
from tests.tiny.stock import realigned

CHECKPOINTS = Path(__file__).with_name("checkpoints")
TEXTS = ("a red circle", "a blue square", "a green star", "a cat")
STEPS = 3
FEW = {"calibrate.prompts": 2, "search.prompts": 1, "search.steps": 2}
PER_STEP = {"format": "int8", "slots": "per_step"}
PER_TOKEN = {"format": "int8", "granularity": "token", "dynamic": True, "range": "mse"}

EVERY_FEATURE: dict[str, Any] = {
    "name": "every-feature",
    "defaults": {"weight": {"format": "int4", "granularity": "group-8"}, "input": {"format": "uint8", "slots": "per_step"}},
    "rules": [
        {"on": "role:entry | role:exit", "keep": True},
        {"on": "*.attn2.to_q", "weight": {"format": "uint3", "granularity": "channel"}, "input": PER_STEP},
        {"on": "*.attn2.to_out.0", "weight": {"format": "log_uniform_5", "granularity": "channel"}, "input": PER_STEP},
        {"on": "*.attn1.to_out.0", "weight": {"format": "int6", "granularity": "tensor"}, "input": PER_TOKEN},
        {"on": "role:temporal", "input": {"format": ["uint8", "log_uniform_8", "power_8"]}},
        {"on": "*.net.2", "weight": {"format": "e4m3", "granularity": "channel"}, "input": {"format": "uint6", "slots": "shared"}},
    ],
    "calibrate": {"prompts": 2, "seed": 1000},
    "temporal": "table",
    "protect_steps": [0, -1],
    "guidance": "apart",
    "attention": {"scores": "int8"},
    "steps": [
        {"transform": "rotate", "on": "*.to_q | *.net.2"},
        {"transform": "shift", "center": "mid", "on": "role:main"},
        {"transform": "range_integrate", "power": 0.5, "on": "role:main"},
        {"solve": "gptq", "correct_bias": True, "on": "role:main"},
    ],
}
"""Uses everything that format 1 can store: see ``test_the_folders_cover_the_format``."""

BATCHED: dict[str, Any] = EVERY_FEATURE | {
    "name": "batched-guidance",
    "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": {"format": "int6"}},
    "rules": [{"on": "role:entry | role:exit", "keep": True}],
    "temporal": "quantize",
    "protect_steps": {"steps": [1], "inputs": "8-bit"},
    "attention": {"scores": "int8", "values": "e4m3"},
    "steps": [],
}
"""Both halves of a guidance pair in one call, and what the other recipe leaves at its other value."""

GUIDED = ("every-feature", "batched-guidance")
CONVOLUTIONS = {"convolution": "qvd-w8a8", "convolution-without-bias": "w4a16"}


def cases() -> dict[str, Any]:
    """The recipe of every golden folder, by the folder's name: every recipe of the release, and four more."""
    from reelquant.recipes.recipe import names

    return {name: name for name in names()} | {"every-feature": EVERY_FEATURE, "batched-guidance": BATCHED} | CONVOLUTIONS


class BatchedPipeline(FakePipeline):
    """A sampler that computes both halves of a guidance pair in one call."""

    def denoise(self, x: Tensor, timestep: Tensor, prompt: Sequence[str]) -> Tensor:
        without, with_ = super().denoise(torch.cat([x] * 2), timestep, ["" for _ in prompt] + list(prompt)).chunk(2)
        return without + 0.5 * (with_ - without)


def pipeline(case: str) -> FakePipeline:
    """A sampler around the float denoiser of a case."""
    denoiser = motion_unet() if case in CONVOLUTIONS else TINY["WanTransformer3DModel"]()
    return BatchedPipeline(denoiser) if case == "batched-guidance" else FakePipeline(denoiser, guided=case in GUIDED)


def motion_unet() -> nn.Module:
    """The smallest UNet with two-dimensional convolutions that diffusers builds; AnimateDiff uses the class."""
    return build(
        "UNetMotionModel",
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlockMotion",),
        up_block_types=("CrossAttnUpBlockMotion",),
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=4,
        use_motion_mid_block=False,
    )


def calls_of(pipe: FakePipeline) -> list[dict[str, Tensor]]:
    """The arguments of the denoiser's calls for one clip, then for one at a timestep that calibration did not see."""
    found: list[dict[str, Tensor]] = []
    signature = inspect.signature(type(pipe.denoiser).forward)

    def record(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind(denoiser, *args, **kwargs).arguments
        found.append({name: value.clone() for name, value in given.items() if isinstance(value, Tensor)})

    hook = pipe.denoiser.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        pipe(list(TEXTS[-1:]), [torch.Generator().manual_seed(7)], num_inference_steps=STEPS)
    hook.remove()
    return [*found, found[0] | {"timestep": found[0]["timestep"] * 0.9}]


def outputs_of(denoiser: nn.Module, calls: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """What the reference kernels compute for these calls, one after the other."""
    import reelquant.kernels

    with torch.no_grad(), reelquant.kernels.backend("reference"):
        return [denoiser(**arguments, return_dict=False)[0] for arguments in calls]


def with_float_layers(denoiser: nn.Module) -> nn.Module:
    """A copy whose layers are float and hold the dequantized weights; its inputs and its attention are not rounded."""
    from reelquant.nn import dequantized, quantized_layers, set_module, stop_attention

    copied = copy.deepcopy(denoiser)
    for name, layer in quantized_layers(copied).items():
        set_module(copied, name, dequantized(layer, torch.float32))
    stop_attention(copied)
    return copied


def hashes_of(denoiser: nn.Module) -> dict[str, dict[str, str]]:
    """The SHA-256 of every stored tensor and of every layer's weight, decoded from its codes."""
    from reelquant.nn import quantized_layers

    layers = quantized_layers(denoiser)
    return {
        "tensors": {name: sha256(tensor) for name, tensor in sorted(denoiser.state_dict().items())},
        "weights": {name: sha256(layer.packed.dequantize()) for name, layer in sorted(layers.items())},
    }


def sha256(tensor: Tensor) -> str:
    """Of the tensor's shape, dtype and bytes."""
    plain = tensor.detach().cpu().contiguous()
    described = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    return hashlib.sha256(described + plain.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def quantized(case: str) -> FakePipeline:
    """The pipeline of a case, quantized with its recipe, its config filled in for ``save_pretrained``."""
    import reelquant
    from reelquant.checkpoint import adopt
    from reelquant.recipes.recipe import load_recipe

    pipe, source = pipeline(case), cases()[case]
    recipe = load_recipe(source, {} if load_recipe(source).data_free else FEW)
    reelquant.quantize(pipe, recipe, list(TEXTS), num_inference_steps=STEPS)
    adopt(pipe.denoiser, recipe)
    return pipe


def write(case: str, folder: Path) -> None:
    """Write one golden folder."""
    pipe = quantized(case)
    pipe.denoiser.save_pretrained(folder)
    calls = calls_of(pipe)
    opened: Any = type(pipe.denoiser).from_pretrained(folder)
    realigned(opened)
    tensors = {f"{name}.{i}": value for i, arguments in enumerate(calls) for name, value in arguments.items()}
    tensors |= {f"output.{i}": value for i, value in enumerate(outputs_of(opened, calls))}
    tensors |= {f"float.{i}": value for i, value in enumerate(outputs_of(with_float_layers(opened), calls))}
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps(hashes_of(opened), indent=1) + "\n")


def main(folder: Path) -> None:
    """Write all golden folders."""
    torch.set_num_threads(1)
    for case in cases():
        write(case, folder / case)
        print(case)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
