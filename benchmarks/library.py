"""Every recipe of the library beside the plain row of the same bits.

Run it from the repository root::

    python -m benchmarks.library --pipeline tiny-dit --clips 64 --output benchmarks/results
    python -m benchmarks.library --pipeline runs/tiny-ltx/pipeline --clips 16 --output benchmarks/results --only "*-w4a4"
    python -m benchmarks.methods    # writes the figures into docs/methods.md

:mod:`benchmarks.beside` says how. The table is ``methods-PIPELINE.md``. Plain rows round weights and inputs as they come, or are the
recipe of the library that does. A recipe that the library gets has to be named here, with what it is held against.
"""

from __future__ import annotations

from typing import Any

from benchmarks.beside import Rows, main
from benchmarks.groups import integers

TEN = {"granularity": "group-10"}


def static(weight: dict[str, Any], inputs: str, parent: str = "minmax-w4a8") -> dict[str, Any]:
    """Plain rounding, inputs with one scale for all clips."""
    name = f"{parent}, {weight.get('format', '')} inputs {inputs}"
    return {"extends": parent, "name": name, "defaults": {"weight": weight, "input": {"format": inputs}}}


def three_bits() -> dict[str, Any]:
    """``qua2-w3.5`` with one format for all layers, at its bytes."""
    plain = {"format": "int3", "granularity": "group-32"}
    steps = [{"solve": "gptq", "correct_bias": True}]
    return {
        "extends": "w4a16",
        "name": "int3 group-32, float inputs",
        "defaults": {"weight": plain},
        "calibrate": {},
        "rules": {1: {"weight": plain}},
        "steps": steps,
    }


INT3 = "int3, groups of 32, float inputs"
INT4, INT4_12, INT4_10 = "int4, groups of 32", "int4, groups of 12", "int4, groups of 10, inputs in groups of 64"
STATIC4 = "int4, groups of 64, inputs uint4 per tensor"
W4A6, W8A4 = "int4, groups of 64, inputs uint6 per tensor", "int8, inputs uint4 per tensor"
ELSEWHERE = {"bottleneck": "resolution", "diffuse-high": "resolution"}
"""Recipes that another benchmark measures: their clips are not those of the float pipeline, or of another size."""
ROWS: Rows = {
    "minmax-w8a8": ("minmax-w8a8", ""),
    **{
        name: (name, "minmax-w8a8")
        for name in ("qvd-w8a8", "block-cache-w8a8", "tfm-w8a8", "bct-w8a8", "quarot-w8a8", "dfq-w8a8", "mxfp8-w8a8", "minmax-w8a8-fp8")
    },
    **{
        name: (name, "qvd-w8a8")
        for name in (
            "deepcache", "faster-diffusion", "cachequant-w8a8", "taylor", "delta-dit", "first-block", "teacache", "seacache", "magcache",
            "profilingdit", "ditfastattn", "half-attention-w8a8", "adaspa", "sparse24-w8a8", "prune-35", "narrow-w8a8",
        )
    },
    "minmax-w6a6": ("minmax-w6a6", ""),
    "qvd-w6a6": ("qvd-w6a6", "minmax-w6a6"),
    "reel-w6a6": ("reel-w6a6", "qvd-w6a6"),
    "minmax-w4a8": ("minmax-w4a8", ""),
    **{
        name: (name, "minmax-w4a8")
        for name in (
            "qvd-w4a8", "lowrank-w4a8", "mixed-w4.5a8", "w4a8-comq", "brecq-w4a8", "q-diffusion-w4a8", "tfmq-w4a8", "viditq-w4a8",
            "ditas-w4a8", "fp-w4a8",
        )
    },
    "mixed-formats": ("mixed-formats", "mixed-w4.5a8"),
    "reel-w4a8": ("reel-w4a8", "qvd-w4a8"),
    W4A6: (static({}, "uint6"), ""),
    "dgq-w4a6": ("dgq-w4a6", W4A6),
    "q-vdit-w4a6": ("q-vdit-w4a6", W4A6),
    W8A4: (static({}, "uint4", "minmax-w8a8"), ""),
    "tdq-w8a4": ("tdq-w8a4", W8A4),
    "resq-w8a4": ("resq-w8a4", W8A4),
    INT4: (integers("int4", "group-32"), ""),
    INT4_10: ({"extends": "svdquant-w4a4", "name": "int4 group-10", "defaults": {"weight": TEN}, "steps": []}, INT4),
    INT4_12: (integers("int4", "group-12"), INT4),
    "nvfp4-w4a4": ("nvfp4-w4a4", INT4_12),
    "mxfp4-w4a4": ("mxfp4-w4a4", INT4),
    "hq-dit-w4a4": ("hq-dit-w4a4", INT4),
    "svdquant-w4a4": ("svdquant-w4a4", INT4_10),
    "reel-w4a4": ("reel-w4a4", "svdquant-w4a4"),
    STATIC4: (static({}, "uint4"), ""),
    "tcaq-w4a4": ("tcaq-w4a4", STATIC4),
    "efficientdm-w4a4": ("efficientdm-w4a4", STATIC4),
    "quest-w4a4": ("quest-w4a4", STATIC4),
    "w8a16": ("w8a16", ""),
    "w8a16-fp8": ("w8a16-fp8", "w8a16"),
    "w4a16": ("w4a16", ""),
    "personalise-w4": ("personalise-w4", "w4a16"),
    INT3: (three_bits(), ""),
    "qua2-w3.5": ("qua2-w3.5", INT3),
}  # fmt: skip


if __name__ == "__main__":
    main(ROWS, "methods", __doc__)
