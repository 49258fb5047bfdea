"""The content of a report with everything in it, and clips to show in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reelquant.evidence.report import Panel

HOSTILE = "<script>alert(1)</script> \"quoted\" & 'so on' </script>"


def counted(frames: int = 8, side: int = 32, offset: float = 0.0) -> Tensor:
    """A clip whose grey level tells the frame: 0.1, 0.2 ..."""
    return (0.1 * torch.arange(1, frames + 1).view(-1, 1, 1, 1) + offset).expand(frames, 3, side, side).clone()


def panels(count: int = 3, frames: int = 8) -> list[Panel]:
    """Clips ``0000``, ``0001`` ... each worse than the one before."""
    prompts = ["a red circle", HOSTILE, "a blue star"]
    return [
        Panel(
            f"{i:04d}",
            prompts[i % 3],
            50 + i,
            {"psnr": 50.0 - i, "ssim": 0.99},
            counted(frames),
            counted(frames, offset=0.01 * i),
            floor=counted(frames, offset=0.005),
        )
        for i in range(count)
    ]


def layer(name: str, role: str, error: float | None, **others: Any) -> dict[str, Any]:
    return dict(name=name, role=role, weight="int8 channel", input="uint8 tensor", solver="nearest", bytes_after=100, error=error) | others


def sample(clips: int = 3, frames: int = 8) -> dict[str, Any]:
    """The content of a report.json with everything in it."""
    floor = {"bf16": dict(value=55.0, low=54.0, high=56.0), "reseed": dict(value=12.0, low=11.0, high=13.0)}
    psnr = dict(title="PSNR", kind="paired", unit="dB", better="higher", about="closeness", value=49.0, low=48.0, high=50.0)
    curves = dict(psnr=[50.0 - i for i in range(frames)], motion_energy=[0.1] * (frames - 1))
    return {
        "schema": 1,
        "kind": "evaluate",
        "tool_version": "0.1.0",
        "created": "2026-01-02T03:04:05Z",
        "reference": dict(name="tiny-dit", dtype="float32"),
        "test": dict(name="out", recipe="minmax-w8a8"),
        "clips": clips,
        "prompts": ["a red circle", HOSTILE, "a blue star"],
        "seeds": [50, 51, 52],
        "call": dict(num_inference_steps=20),
        "metrics": {
            "motion_deviation": dict(
                title="Motion", kind="temporal", better="zero", value=-0.48, low=-0.5, high=-0.4, reference=0.0, floor={}
            ),
            "psnr": psnr | dict(reference=None, floor=floor, within_floor=False, floor_limit="at least 54.0", missing=None),
            "fvd": dict(
                title="FVD", kind="distribution", better="lower", value=None, missing="needs the weights 'i3d': reelquant weights i3d"
            ),
        },
        "per_clip": [
            dict(name=f"{i:04d}", figures=dict(psnr=50.0 - i), curves=curves, reference_curves=dict(motion_energy=[0.2] * (frames - 1)))
            for i in range(clips)
        ],
        "trajectory": dict(
            steps=[1, 2], test=dict(mean=[0.1, 0.2], low=[0.05, 0.1], high=[0.2, 0.3]), floor=dict(bf16=dict(mean=[0.01, 0.02]))
        ),
        "grain_growth": dict(steps=[5, 20], reference=[2.0, 1.0], test=[2.5, 1.5]),
        "saturation": dict(
            share=0.0002,
            reach=1.4,
            excess=0.08,
            steps=[dict(step=0, share=0.0001, excess=0.01), dict(step=4, share=0.0003, excess=0.3)],
            layers=[
                dict(name="blocks.1.ffn.net.2", share=0.004, reach=1.4, noise=1e-5, rounding=1e-5, excess=1.0),
                dict(name="blocks.0.attn1.to_q", share=0.0, reach=0.9, noise=0.0, rounding=1e-5, excess=0.0),
            ],
        ),
        "bias": dict(metric="fvd", sizes=[16, 32], values=[30.0, 20.0], sd=[2.0, 1.0], extrapolated=9.0),
        "near_lossless": dict(holds=False, failed=["psnr"], why="bf16 is closer"),
        "gate": dict(
            preset="default",
            passed=False,
            failures=[
                dict(metric="motion_deviation", value=-0.48, limit="within 0.10 of 0", sentence="It drags.", looks_like="slowed motion")
            ],
            checks=[
                dict(metric="psnr", value=49.0, limit="at least 25", margin=24.0, passed=True),
                dict(metric="motion_deviation", value=-0.48, limit="from -0.1 to 0.1", margin=-0.38, passed=False),
                dict(metric="lpips_alex", value=None, limit="at most 0.15", margin=None, passed=None),
                dict(metric="defects", value=1 / 3, limit="at most 2% of the clips", margin=0.02 - 1 / 3, passed=False),
            ],
        ),
        "defects": [dict(name="slowed motion", clips=["0001"], sentence="It moves at half the speed.")],
        "warnings": ["FVD of 3 clips is biased high"],
        "floors": dict(bf16="the float pipeline again in bfloat16", reseed="the float pipeline again from other noise"),
        "bytes": dict(reference=2000, test=900),
        "speed": dict(
            speedup=dict(median=1.5, low=1.4, high=1.6),
            seconds=dict(reference=dict(median=3.0), test=dict(median=2.0)),
            peak_bytes=dict(reference=4000, test=3000),
            data=dict(rounds=3, threads=2, device="cpu", reference=dict(short="bf16")),
        ),
        "quantization": dict(
            recipe="minmax-w8a8",
            digest="abc",
            denoiser="Wan",
            component="transformer",
            layers=[
                layer("blocks.10.a", "main", 0.001, coverage=0.5),
                layer("blocks.2.a", "main", 0.1, coverage=0.25),
                layer("time", "temporal", None, tdscore=0.99, skewness=-1.0),
            ],
            kept={"first and last layer stay float": ["entry", "exit"]},
            bytes_float=1000,
            bytes_quantized=250,
            bytes_model_float=1200,
            bytes_model=450,
            ratio=4.0,
            kernel=dict(reference=3),
            simulated=True,
            trials=[dict(family="blocks.*.a", options={"0": dict(power=0.5)}, psnr=40.0)],
        ),
        "machine": dict(cpu="some cpu", cores=2, gpu=None, os="Linux"),
        "versions": dict(torch="2.13"),
        "seconds": dict(sample=12.3),
        "expected_seconds": 14.0,
        "peak_memory_gb": 1.2,
    }


def several(names: Sequence[str] = ("w8a8", "w4a8", "w4a4"), clips: int = 3) -> dict[str, Any]:
    """The content of the report.json of several tests; each is smaller, worse and faster than the one before."""
    whole = sample(clips)
    tests = []
    for i, name in enumerate(names):
        psnr = whole["metrics"]["psnr"] | dict(value=49.0 - 5 * i, low=48.0 - 5 * i, high=50.0 - 5 * i)
        test = whole | dict(name=name, folder=name, test=dict(name=name, recipe=name), metrics=whole["metrics"] | dict(psnr=psnr))
        test["bytes"] = dict(reference=2_000_000, test=900_000 - 200_000 * i)
        test["speed"] = whole["speed"] | dict(speedup=dict(median=1.5 + i, low=1.4, high=1.6))
        test["worst_clip"] = dict(name="0002", value=45.0 - 5 * i)
        test["gate"] = whole["gate"] | (dict(passed=True, failures=[]) if i == 0 else {})
        tests.append(test)
    kept = ("schema", "tool_version", "created", "reference", "clips", "prompts", "seeds", "call", "floors", "machine", "versions")
    return {key: whole[key] for key in kept} | dict(kind="several", command=None, quality="psnr", tests=tests)


def side_by_side(names: Sequence[str] = ("w8a8", "w4a8", "w4a4"), frames: int = 8) -> list[Panel]:
    """Clips of several tests; those of each are a little brighter than those of the one before."""
    tests = [counted(frames, offset=0.01 * (i + 1)) for i in range(len(names))]
    return [
        Panel(
            panel.name,
            panel.prompt,
            panel.seed,
            {f"psnr {name}": 50.0 - i - 5 * k for k, name in enumerate(names)},
            panel.reference,
            tests[0],
            tests[1:],
            panel.floor,
        )
        for i, panel in enumerate(panels(frames=frames))
    ]
